"""FP8 directories in SGLang: its configuration, its loader and its model, without its kernels, which need a GPU."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conv.quantize import quantize
from megatron_policysplit.cli.fp8_calibration import input_maxima
from megatron_policysplit.config import ModesConfig
from tests.support.conversion import tensors_of
from tests.support.fp8 import WHOLE_BLOCKS, last_logits, served_model, write_questions
from tests.support.sglang import ROOT, interpreter, require_server_environment
from tests.support.toy_chat import make_chat_model

pytestmark = pytest.mark.contract

PROMPTS = [list(range(60, 100)), [65, 70, 100, 31], [200] * 7]
LAYERS = 2
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
CASES = {
    ("qwen3", "fp8"): ("modelopt_fp8", {"modelopt": 4 * LAYERS}),
    ("qwen3", "fp8-block"): ("fp8", {"block": 4 * LAYERS}),
    ("qwen3_moe", "fp8"): ("modelopt_fp8", {"modelopt": 2 * LAYERS, "modelopt experts": LAYERS}),
    ("qwen3_moe", "fp8-block"): ("fp8", {"block": 2 * LAYERS, "block experts": LAYERS}),
}


def served(model, work):
    """What SGLang says of itself, and the tensors that `sglang_fp8.py` wrote."""
    require_server_environment()
    (work / "prompts.json").write_text(json.dumps(PROMPTS))
    script = ROOT / "tests" / "support" / "sglang_fp8.py"
    command = [interpreter(), "-P", script, model, work / "prompts.json", work / "out.safetensors"]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), load_file(work / "out.safetensors")


def as_loaded(tensors):
    """The tensors of our directory under SGLang's names: what it fuses one above the other, scales side by side."""
    expected = {}
    heads = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        stem, _, part = module.rpartition(".")
        scalar = kind in ("weight_scale", "input_scale")
        if ".experts." in name:
            expert, into = int(stem.rpartition(".")[2]), "w2" if part == "down_proj" else "w13"
            slots = expected.setdefault(f"{stem.rpartition('.')[0]}.{into}_{kind}", {})
            slots[expert, heads.get(part, 0)] = tensor
        else:
            fused = next((to for to, parts in FUSED.items() if part in parts), None)
            if fused is None:
                expected[name] = tensor.reshape(1) if scalar else tensor
            else:
                expected.setdefault(f"{stem}.{fused}.{kind}", {})[heads[part]] = tensor
    return {name: joined(name, value) for name, value in expected.items()}


def joined(name, value):
    if not isinstance(value, dict):
        return value
    if ".experts." not in name:
        parts = [value[key] for key in sorted(value)]
        return torch.stack(parts) if parts[0].dim() == 0 else torch.cat(parts)
    by_expert = [[part for (of, _), part in sorted(value.items()) if of == e] for e in range(1 + max(value)[0])]
    if name.endswith("input_scale") or (name.endswith("w2_weight_scale")):
        return torch.stack([parts[0] for parts in by_expert])
    together = torch.stack if name.endswith("weight_scale") else torch.cat
    return torch.stack([together(parts) for parts in by_expert])


@pytest.mark.parametrize(("family", "form"), CASES)
def test_sglang_loads_and_computes_what_is_written(tmp_path, family, form):
    """Every tensor lands where it belongs, and nothing is missing; logits (float16) are those of transformers on the
    dequantized weights (float32), ten times closer than to those of the original."""
    from transformers import AutoModelForCausalLM

    sizes = {**WHOLE_BLOCKS, "num_hidden_layers": LAYERS}
    sizes |= {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    original = make_chat_model(tmp_path / "model", family=family, tied=family == "qwen3", **sizes)
    questions, out = write_questions(tmp_path / "questions.jsonl"), tmp_path / "out"

    def measure():
        return input_maxima(original, questions, ModesConfig())

    quantize(original, out, form, input_maxima=measure if form == "fp8" else None)
    said, found = served(out, tmp_path)
    assert (said["quantization"], said["called"]) == CASES[family, form]
    logits = found.pop("logits")
    loaded = {name.removeprefix("loaded."): tensor for name, tensor in found.items()}
    expected = as_loaded(tensors_of(out))
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        found = loaded[name]
        if tensor.dtype == torch.float32 and "scale" not in name:  # what is not quantized is cast to the server's type
            tensor = tensor.to(torch.float16)
        if "embed_tokens" in name or "lm_head" in name:  # SGLang pads the vocabulary
            found = found[: len(tensor)]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
    reference = last_logits(served_model(out, original, round_inputs=False), PROMPTS)
    plain = last_logits(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32), PROMPTS)
    assert (logits - reference).abs().mean() < 0.1 * (reference - plain).abs().mean()
