"""Converted checkpoints in Megatron-Core at any layout, and training checkpoints converted, in real process groups."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from tests.dist.test_experts import pipeline_logits
from tests.support.conversion import assert_same_model, make_tree, tensors_of
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.megatron_models import (
    Shape,
    assert_same_parameters,
    load_as_stock_megatron_does,
    loaded_model,
    nan_model,
    parallel_config,
    save_as_stock_megatron_does,
    save_state,
    start,
)

MODELS = [
    ("llama", False),
    ("mistral", False),
    ("mistral", True),
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("qwen3", False),
    ("qwen3_moe", True),
    ("qwen3_moe", False),
]
MOE = "qwen3_moe"
SHAPES = [
    Shape(),
    Shape(tensor=2),
    Shape(pipeline=2),
    Shape(tensor=2, pipeline=2),
    Shape(expert=2),
    Shape(tensor=2, expert=2),
    Shape(pipeline=2, expert=2),
]
VOCAB = 131  # odd, so that tensor parallelism pads it
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(Hugging Face directory, converted directory) of every model; of the last two again in bf16.

    Beside the mixtures of experts in float32: transformers' logits.
    """
    root = tmp_path_factory.mktemp("models")
    pairs = []
    for family, tied in MODELS:
        original = make_model(root / f"{family}-{tied}", family, tied=tied, vocab=VOCAB)
        hf_to_megatron(original, root / f"{family}-{tied}-megatron")
        pairs.append((str(original), str(root / f"{family}-{tied}-megatron")))
    for family in ("qwen3", MOE):
        name = root / f"{family}-bf16"
        hf_to_megatron(root / f"{family}-False", f"{name}-megatron", dtype="bfloat16", allow_downcast=True)
        megatron_to_hf(f"{name}-megatron", name)
        pairs.append((str(name), f"{name}-megatron"))
    return pairs


def dtype_of(hf):
    return torch.bfloat16 if hf.endswith("bf16") else torch.float32


@pytest.fixture(scope="module")
def logits_of_experts(models):
    """transformers', by directory."""
    from transformers import AutoModelForCausalLM

    logits = {}
    for hf, _ in models:
        if MOE in hf and not hf.endswith("bf16"):
            with torch.no_grad():
                logits[hf] = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)(tokens()).logits
    return logits


def tokens():
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_megatron_loads_the_weights_of_the_original(models, logits_of_experts, shape):
    """Parameters of every model; logits of a mixture of experts, those of the others being a test of one rank."""
    chosen = [pair for pair in models if shape.expert == 1 or MOE in pair[0]]
    ranks = run_distributed(check_loading, shape.world, chosen, shape)
    assert all(count > 0 for count, _ in ranks)
    found = [logits for _, logits in ranks if logits]
    assert len(found) == shape.tensor * shape.expert  # of every rank of the last stage
    for logits in found:
        assert set(logits) == set(logits_of_experts)
        for hf, values in logits.items():
            assert (torch.from_numpy(values) - logits_of_experts[hf]).abs().max() < TOLERANCE, hf


def check_loading(rank, models, shape):
    """How many parameters were compared, and logits by directory."""
    start(shape)
    from megatron_policysplit.actor.megatron_weights import load_megatron_weights

    count, logits = 0, {}
    for hf, megatron in models:
        expected = loaded_model(hf, dtype_of(hf))
        for load in (load_megatron_weights, load_as_stock_megatron_does):
            model = nan_model(hf, dtype_of(hf))
            load(model, megatron)
            count += assert_same_parameters(model, expected)
        if MOE in hf and dtype_of(hf) == torch.float32:
            logits[hf] = pipeline_logits(model, tokens(), shape.tensor)
    return count, {hf: values.numpy() for hf, values in logits.items() if values is not None}


TRAINED = {
    Shape(tensor=2, pipeline=2): [("qwen3", True), ("llama", False), ("mistral", False)],
    Shape(tensor=2, expert=2): [(MOE, False)],
    Shape(pipeline=2, expert=2): [(MOE, True)],
}
OTHER = {2: Shape(), 1: Shape(expert=2)}  # to load at what was saved at so many stages


@pytest.mark.parametrize(("shape", "kinds"), TRAINED.items(), ids=map(str, TRAINED))
def test_a_training_checkpoint_exports_what_the_trainer_exports(tmp_path, shape, kinds):
    """Saved with an optimizer, where the configuration of the run names the model; and loaded at another layout."""
    models = {}
    for family, tied in kinds:
        models[family] = make_model(tmp_path / family / "model", family, tied=tied, vocab=VOCAB)
        (models[family] / "chat_template.jinja").write_text("{{ messages }}")
    run_distributed(save_training_checkpoints, shape.world, shape, [str(path) for path in models.values()])
    for family, original in models.items():
        run, back = tmp_path / family / "run", tmp_path / family / "back"
        megatron_to_hf(run / "checkpoints" / "step_000007", back)
        exported, found = load_file(run / "exported.safetensors"), load_file(back / "model.safetensors")
        assert set(found) == set(exported)
        for name, tensor in exported.items():
            assert found[name].dtype == tensor.dtype == torch.float32 and torch.equal(found[name], tensor), name
        untrained = load_file(original / "model.safetensors")
        assert not any(torch.equal(found[name], untrained[name]) for name in found)
        assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    other = OTHER[shape.pipeline]
    run_distributed(load_at_another_layout, other.world, other, [str(tmp_path / family) for family, _ in kinds])


def save_training_checkpoints(rank, shape, models):
    layout = start(shape)
    for model in models:
        save_training_checkpoint(rank, shape, layout, model, str(Path(model).parent / "run"))


def save_training_checkpoint(rank, shape, layout, model_path, run_dir):
    from safetensors.torch import save_file

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import checkpoint
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.weights import export_weights
    from megatron_policysplit.config import Config
    from megatron_policysplit.config.load import to_yaml

    config = Config()
    config.model.path, config.model.dtype, config.run.dir = model_path, "float32", run_dir
    config.data.path = "unused.jsonl"
    config.parallel = parallel_config(shape)
    actor = Actor(config, read_hf_config(model_path), layout)
    with torch.no_grad():
        for number, parameter in enumerate(actor.model.parameters()):
            parameter.mul_(1.25 + number / 64)
    _tie(actor, read_hf_config(model_path))
    checkpoint.save(actor, checkpoint.TrainerState(step=7), Path(run_dir) / "checkpoints", keep=1)
    destination = "leader" if layout.data_rank == 0 else "nowhere"
    weights = dict(export_weights(actor.model, actor.hf_config, destination))
    if rank == layout.chief:
        save_file(weights, Path(run_dir) / "exported.safetensors")
        (Path(run_dir) / "config.yaml").write_text(to_yaml(config))


def _tie(actor, hf_config):
    """The copies of a tied embedding on the first and last stage must stay equal, as training keeps them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if hf_config["tie_word_embeddings"] and parallel_state.is_rank_in_embedding_group():
        weight = actor.model.shared_embedding_or_output_weight()
        group = parallel_state.get_embedding_group()
        dist.broadcast(weight.data, src=min(dist.get_process_group_ranks(group)), group=group)


def load_at_another_layout(rank, shape, folders):
    """Straight from the training checkpoint, and from what was converted of it there and back."""
    start(shape)
    from megatron_policysplit.actor.megatron_weights import load_megatron_weights

    for folder in folders:
        model = nan_model(f"{folder}/back", torch.float32)
        load_megatron_weights(model, f"{folder}/run/checkpoints/step_000007")
        assert assert_same_parameters(model, loaded_model(f"{folder}/back", torch.float32)) > 0


FORMS = {
    "a tensor for each layer": {"non_homogeneous_layers": True},
    "a tensor for each matrix": {"singleton_local_shards": True},
}


@pytest.mark.parametrize("content", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize(("family", "shape"), [("qwen3", Shape()), (MOE, Shape()), (MOE, Shape(expert=2))])
def test_other_forms_of_stored_layers_are_read_too(tmp_path, family, shape, content):
    """As Megatron-Core writes them for layers that are not alike, and for optimizers that want whole matrices."""
    original = make_model(tmp_path / "model", family, tied=False, vocab=VOCAB, num_hidden_layers=2)
    run_distributed(save_in_form, shape.world, shape, str(original), str(tmp_path / "saved"), content)
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", hf=original)
    assert_same_model(original, tmp_path / "back")


def save_in_form(rank, shape, model_path, out, content):
    start(shape)
    save_as_stock_megatron_does(loaded_model(model_path, torch.float32), out, **content)


def test_blocks_of_several_experts_are_read_too(tmp_path):
    """As Megatron-Core's legacy GroupedMLP writes those of one rank together."""
    original = make_model(tmp_path / "model", MOE, tied=False, vocab=VOCAB, num_hidden_layers=2)
    run_distributed(save_experts_together, 1, str(original), str(tmp_path / "saved"))
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", hf=original)
    assert_same_model(original, tmp_path / "back")


def save_experts_together(rank, model_path, out):
    start()
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    model = loaded_model(model_path, torch.float32)
    state = {k: value for k, value in model.sharded_state_dict().items() if ".local_experts." not in k}
    for layer, block in enumerate(model.decoder.layers):
        for linear in ("linear_fc1", "linear_fc2"):
            weights = torch.stack([getattr(expert, linear).weight for expert in block.mlp.experts.local_experts])
            halves = weights.detach().chunk(2, dim=1) if linear == "linear_fc1" else [weights.detach()]
            for number, half in enumerate(halves):
                state[f"{layer}.{linear}.{number}"] = ShardedTensor.from_rank_offsets(
                    f"decoder.layers.mlp.experts.experts.{linear}.weight",
                    half.contiguous(),
                    (0, layer, 2),
                    (2, number, len(halves)),
                    prepend_axis_num=1,
                )
    save_state(state, out)


def test_logits_are_those_of_transformers(models, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(models[0][0], damaged)
    tensors = tensors_of(damaged)
    tensors["model.layers.2.self_attn.k_proj.weight"][5] *= 1.1
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    in_float32 = [pair for pair in models if dtype_of(pair[0]) == torch.float32]
    run_distributed(check_all_logits, 1, in_float32, str(damaged))


def check_all_logits(rank, models, damaged):
    """Of every model in float32; and a checkpoint of other weights is told."""
    from megatron_policysplit.actor.logits import TOLERANCE, check_logits
    from megatron_policysplit.errors import ModelError

    for hf, megatron in models:
        compared = check_logits(hf, megatron)
        assert compared.difference < TOLERANCE < 1 < compared.largest, hf
    with pytest.raises(ModelError, match=f"logits of .* differ from those of {damaged} by .*; convert the model again"):
        check_logits(damaged, models[0][1])


def test_exports_equal_those_of_mbridge(models, tmp_path):
    pairs = []
    for number, (hf, megatron) in enumerate(models):
        megatron_to_hf(megatron, tmp_path / str(number))
        pairs.append((hf, str(tmp_path / str(number))))
    # Tied ones last: after one, mbridge takes all models of the family for tied.
    tied_last = sorted(pairs, key=lambda pair: pair[0].endswith("-True"))
    # In a fresh process: stand-ins for Transformer Engine come before Megatron-Core looks for it.
    run_distributed(check_against_mbridge, 1, tied_last, start="spawn")


def check_against_mbridge(rank, pairs):
    """mbridge loads the original into Megatron-Core and exports it; it knows Transformer Engine's names only."""
    from tests.support import fake_transformer_engine

    fake_transformer_engine.install()
    start()
    from mbridge import AutoBridge
    from mbridge.core import register_model
    from mbridge.models.llama import LLaMABridge

    register_model("mistral")(LLaMABridge)  # which it has not on its list
    for hf, exported in pairs:
        model = nan_model(hf, dtype_of(hf), transformer_engine=True)
        bridge = AutoBridge.from_pretrained(hf, dtype=dtype_of(hf))
        bridge.load_weights([model], hf)
        theirs = dict(bridge.export_weights([model]))
        ours = tensors_of(exported)
        assert set(theirs) == set(ours)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), (hf, name)


@pytest.mark.parametrize("family", ["qwen2", MOE])
def test_several_processes_share_a_conversion(tmp_path, family):
    original = make_tree(make_model(tmp_path / "model", family, tied=False, vocab=VOCAB))
    run_distributed(convert_there_and_back, 2, str(original), str(tmp_path))
    files = sorted(file.name for file in (tmp_path / "megatron").glob("*.distcp"))
    assert files == ["__0_0.distcp", "__1_0.distcp"]
    assert min(file.stat().st_size for file in (tmp_path / "megatron").glob("*.distcp")) > 100_000  # shared evenly
    assert_same_model(original, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "megatron", "back"}


def convert_there_and_back(rank, original, root):
    import torch.distributed as dist

    from checkpoints_conv.ranks import Ranks, group_ranks
    from megatron_policysplit.errors import ModelError

    assert group_ranks() == Ranks(0, 1)
    dist.init_process_group("gloo")
    ranks = group_ranks()
    assert (ranks.rank, ranks.size) == (rank, 2)
    with pytest.raises(ModelError, match="config.json is missing"):
        hf_to_megatron(root, f"{root}/megatron", ranks=ranks)
    with pytest.raises(ModelError, match="exists and is not an empty directory"):
        hf_to_megatron(original, original, ranks=ranks)
    hf_to_megatron(original, f"{root}/megatron", ranks=ranks)
    megatron_to_hf(f"{root}/megatron", f"{root}/back", ranks=ranks, max_shard_bytes=100_000)
