"""What quantizing refuses, in one sentence, with nothing left; and who refuses its output."""

import errno
import importlib.util
import json
import os
import shutil

import pytest
import torch
import typer
from safetensors.torch import save_file

from checkpoints_conv import check_safetensors
from checkpoints_conv.describe import describe
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.quantize import quantize
from megatron_policysplit.cli import convert
from megatron_policysplit.cli.fp8_calibration import input_maxima
from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.load import load_config
from megatron_policysplit.errors import ConfigError, DataError, ModelError, UserError
from megatron_policysplit.training.preflight import preflight
from tests.support.conversion import tensors_of
from tests.support.fp8 import WHOLE_BLOCKS, write_questions
from tests.support.toy_chat import make_chat_model

WEIGHT = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=2, **WHOLE_BLOCKS)


@pytest.fixture(scope="module")
def block(original, tmp_path_factory):
    quantize(original, tmp_path_factory.mktemp("models") / "block", "fp8-block")
    return next(tmp_path_factory.getbasetemp().glob("models*/block"))


@pytest.fixture
def model(original, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def refused(match, out, model, *, form="fp8-block", kind=ModelError, **options):
    """One sentence; nothing is left at `out` or beside it."""
    with pytest.raises(kind, match=match) as raised:
        quantize(model, out, form, **options)
    assert "\n" not in str(raised.value)
    assert not out.exists() and not list(out.parent.glob(".*"))


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensor(path, name, tensor):
    """In a directory of one file; None takes the tensor out."""
    changed = {key: value for key, value in {**tensors_of(path), name: tensor}.items() if value is not None}
    save_file(changed, path / "model.safetensors", metadata={"format": "pt"})


def test_without_modelopt(model, out, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "modelopt" else find(name))
    refused(r"pip install megatron_policysplit\[quantize\]", out, model, kind=ConfigError)


def test_damaged_and_unsupported_models(model, out):
    weight = tensors_of(model)[WEIGHT]
    change_tensor(model, WEIGHT, torch.full_like(weight, float("nan")))
    refused(f"tensor {WEIGHT} in .* not finite; nothing is kept", out, model)
    change_tensor(model, WEIGHT, None)
    refused(f"lacks tensor {WEIGHT}", out, model)
    change_tensor(model, WEIGHT, weight)
    quantize(model, out, "fp8-block")
    shutil.rmtree(out)
    change_config(model, architectures=["GemmaForCausalLM"])
    refused("'GemmaForCausalLM' is not supported; supported are LlamaForCausalLM", out, model)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"hidden_size": 192}, "hidden_size=192"),
        ({"intermediate_size": 200}, "intermediate_size=200"),
        ({"head_dim": 32}, "num_key_value_heads x head_dim=64"),
        ({"num_attention_heads": 6, "head_dim": 64, "num_key_value_heads": 3}, "num_key_value_heads x head_dim=192"),
    ],
)
def test_blocks_that_do_not_fit(tmp_path, out, sizes, named):
    """SGLang refuses a fused matrix that is not made of whole blocks, and cannot scale odd inputs."""
    model = make_chat_model(tmp_path / "odd", num_hidden_layers=1, **{**WHOLE_BLOCKS, **sizes})
    refused(f"{named} of the model is no multiple of 128; use --format fp8", out, model)


def test_an_output_that_is_taken_or_has_no_room(model, out, monkeypatch):
    out.mkdir()
    (out / "file").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not an empty directory"):
        quantize(model, out, "fp8-block")
    shutil.rmtree(out)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))

    def never():
        raise AssertionError("the model was measured in vain")

    refused("no space left for --out", out, model, form="fp8", input_maxima=never)


def test_no_space_while_writing(model, out, monkeypatch):
    write = os.pwrite
    calls = []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    refused("no space left for .*nothing was kept", out, model)
    assert len(calls) == 9


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "questions.jsonl does not exist"),
        ("", "holds no questions"),
        ('{"question": "a", "answer": "b"}\n{"question"', "questions.jsonl:2 is not JSON"),
        ('{"text": "a"}', "questions.jsonl:1 has the columns text"),
    ],
)
def test_bad_calibration_files(model, out, tmp_path, content, match):
    file = tmp_path / "questions.jsonl"
    if content is not None:
        file.write_text(content)
    measure = lambda: input_maxima(model, file, ModesConfig())  # noqa: E731
    refused(match, out, model, form="fp8", kind=DataError, input_maxima=measure)


def test_prompts_and_models_that_do_not_fit(model, out, tmp_path):
    from transformers import AutoTokenizer

    file = write_questions(tmp_path / "questions.jsonl", ["what? " * 100])
    measure = lambda: input_maxima(model, file, ModesConfig())  # noqa: E731
    change_config(model, max_position_embeddings=1000)
    refused(
        r"prompt of \d+ tokens is longer than .*=1000", out, model, form="fp8", kind=DataError, input_maxima=measure
    )
    change_config(model, max_position_embeddings=4096)
    weight = tensors_of(model)["model.norm.weight"]
    norm = "model.layers.0.input_layernorm.weight"
    change_tensor(model, norm, torch.full_like(weight, float("inf")))
    refused(r"activations of .* cannot be measured \(detected inf values", out, model, form="fp8", input_maxima=measure)
    change_tensor(model, norm, weight)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["what?"])
    tokenizer.save_pretrained(model)
    refused(
        "question 0: the normal prompt has the token 'what\\?' of id 258, .* ends at vocab_size=258; remove the token",
        *(out, model),
        form="fp8",
        kind=DataError,
        input_maxima=measure,
    )
    (model / "chat_template.jinja").unlink()
    refused("has no chat template", out, model, form="fp8", input_maxima=measure)


def command(model, out, form, **options):
    convert.quantize(model, out, convert.Fp8Format(form), **options)


def test_options_that_do_not_go_together(model, out, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--format fp8 needs --calibration FILE"):
        command(model, out, "fp8")
    given = {"calibration": tmp_path, "calibration_questions": 3, "high_entropy_prompt_file": "prompt.txt"}
    for name, value in given.items():
        with pytest.raises(ConfigError, match="--format fp8-block .* is not calibrated"):
            command(model, out, "fp8-block", **{name: value})
    with pytest.raises(typer.BadParameter, match="5XB"):
        command(model, out, "fp8-block", max_shard_size="5XB")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="^quantize runs as one process, but this is rank 1 of 2 "):
        command(model, out, "fp8-block")
    assert not out.exists()


def test_the_command(model, out, tmp_path, capsys):
    command(model, out, "fp8-block")
    written = capsys.readouterr().out.splitlines()
    assert written == [f"wrote {out}: 0.00 GB", "SGLang can serve it with --tp-size 1"]
    shutil.rmtree(out)
    file = write_questions(tmp_path / "questions.jsonl")
    (tmp_path / "prompt.txt").write_text("Be bold.")
    options = {
        "calibration": file,
        "calibration_questions": 2,
        "high_entropy_prompt_file": str(tmp_path / "prompt.txt"),
    }
    command(model, out, "fp8", **options)
    assert capsys.readouterr().out == f"wrote {out}: 0.00 GB\n"
    maxima = input_maxima(model, file, ModesConfig(high_entropy_prompt="Be bold."), questions=2)
    assert tensors_of(out)[WEIGHT.replace(".weight", ".input_scale")] == torch.tensor(maxima[WEIGHT]) / 448
    (tmp_path / "prompt.txt").unlink()
    shutil.rmtree(out)
    with pytest.raises(ConfigError, match="prompt.txt cannot be read"):
        command(model, out, "fp8", **options)


def test_training_and_conversion_refuse_quantized_weights(block, out, tmp_path):
    sentence = "quantization_config .quant_method='fp8'.: quantized weights are for serving alone; give the directory"
    refused(sentence, out, block)
    for work in (lambda: hf_to_megatron(block, out), lambda: check_safetensors(block)):
        with pytest.raises(ModelError, match=sentence):
            work()
    file = write_questions(tmp_path / "questions.jsonl")
    given = [f"model.path={block}", f"data.path={file}", f"run.dir={tmp_path / 'run'}", "data.batch_questions=4"]
    with pytest.raises(UserError, match=sentence):
        preflight(load_config(None, given))
    assert not out.exists()


def test_inspect_wants_a_whole_directory(block, tmp_path):
    found = describe(block)
    assert found["quantized"] == (
        "fp8-block (FP8, a scale for each 128 x 128 weights, activations scaled as they come), for serving alone"
    )
    assert found["dtype"] == "float32, float8_e4m3fn"
    copied = shutil.copytree(block, tmp_path / "copy")
    scale, weight = WEIGHT + "_scale_inv", tensors_of(block)[WEIGHT]
    for tensor, match in (
        (None, f"lacks tensor {scale} that Qwen3ForCausalLM in fp8-block needs"),
        (torch.ones(2, 1), rf"tensor {scale} in .* has shape \[2, 1\]"),
    ):
        change_tensor(copied, scale, tensor)
        with pytest.raises(ModelError, match=match):
            describe(copied)
    change_tensor(copied, scale, tensors_of(block)[scale])
    change_tensor(copied, WEIGHT, weight.float())
    with pytest.raises(ModelError, match=f"tensor {WEIGHT} in .* has dtype F32; it must be F8_E4M3"):
        describe(copied)
    change_tensor(copied, WEIGHT, weight)
    change_tensor(copied, "model.layers.1.self_attn.k_proj.input_scale", torch.ones(()))
    with pytest.raises(ModelError, match="k_proj.input_scale that Qwen3ForCausalLM in fp8-block does not know"):
        describe(copied)
    for other in ({"quant_method": "gptq", "bits": 4}, "gptq"):
        change_config(copied, quantization_config=other)
        with pytest.raises(ModelError, match="quant_method='gptq' is not one of .*: fp8, fp8-block"):
            describe(copied)
