"""Converted checkpoints in Megatron-Core at any layout, and training checkpoints converted, in real process groups."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from tests.support.conversion import assert_same_model, make_tree, tensors_of
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model

MODELS = [("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
VOCAB = 131  # odd, so that tensor parallelism pads it


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(Hugging Face directory, converted directory) of every model; the last is in bf16."""
    root = tmp_path_factory.mktemp("models")
    pairs = []
    for family, tied in MODELS:
        original = make_model(root / f"{family}-{tied}", family, tied=tied, vocab=VOCAB)
        hf_to_megatron(original, root / f"{family}-{tied}-megatron")
        pairs.append((str(original), str(root / f"{family}-{tied}-megatron")))
    hf_to_megatron(pairs[-1][0], root / "bf16-megatron", dtype="bfloat16", allow_downcast=True)
    megatron_to_hf(root / "bf16-megatron", root / "bf16")
    return [*pairs, (str(root / "bf16"), str(root / "bf16-megatron"))]


def start(tensor, pipeline):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    return initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, data=1), seed=1, timeout_seconds=60)


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_megatron_loads_the_weights_of_the_original(models, tensor, pipeline):
    counts = run_distributed(check_loading, tensor * pipeline, models, tensor, pipeline)
    assert all(count > 0 for count in counts)


def check_loading(rank, models, tensor, pipeline):
    start(tensor, pipeline)
    from megatron_policysplit.actor.megatron_weights import load_megatron_weights
    from megatron_policysplit.actor.weights import load_weights

    count = 0
    for hf, megatron in models:
        dtype = torch.bfloat16 if hf.endswith("bf16") else torch.float32
        expected = nan_model(hf, dtype)
        load_weights(expected, hf)
        ours, stock = nan_model(hf, dtype), nan_model(hf, dtype)
        load_megatron_weights(ours, megatron)
        load_as_stock_megatron_does(stock, megatron)
        for model in (ours, stock):
            for (name, parameter), (_, wanted) in zip(
                model.named_parameters(), expected.named_parameters(), strict=True
            ):
                assert torch.equal(parameter, wanted), (hf, name)
                count += 1
    return count


def nan_model(hf, dtype):
    """A parameter or a padding row that loading skips must show."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.model import build_model

    model = build_model(read_hf_config(hf), dtype=dtype)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def load_as_stock_megatron_does(model, megatron):
    """Everything that the model asks for, extra states included, must be in the checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    content = dist_checkpointing.load_content_metadata(megatron)
    wanted = model.sharded_state_dict(metadata=content)
    loaded = dist_checkpointing.load({"model": wanted}, megatron, strict=StrictHandling.RAISE_UNEXPECTED)
    model.load_state_dict(loaded["model"], strict=True)


def test_a_training_checkpoint_exports_what_the_trainer_exports(tmp_path):
    """Saved at TP 2 x PP 2, with an optimizer, where the configuration of the run names the model."""
    models = {}
    for family, tied in (("qwen3", True), ("llama", False)):
        models[family] = make_model(tmp_path / family / "model", family, tied=tied, vocab=VOCAB)
        (models[family] / "chat_template.jinja").write_text("{{ messages }}")
    run_distributed(save_training_checkpoints, 4, [str(path) for path in models.values()])
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


def save_training_checkpoints(rank, models):
    layout = start(2, 2)
    for model in models:
        save_training_checkpoint(rank, layout, model, str(Path(model).parent / "run"))


def save_training_checkpoint(rank, layout, model_path, run_dir):
    from safetensors.torch import save_file

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import checkpoint
    from megatron_policysplit.actor.step import Actor
    from megatron_policysplit.actor.weights import export_weights
    from megatron_policysplit.config import Config, ParallelConfig
    from megatron_policysplit.config_load import to_yaml

    config = Config()
    config.model.path, config.model.dtype, config.run.dir = model_path, "float32", run_dir
    config.data.path = "unused.jsonl"
    config.parallel = ParallelConfig(tensor=2, pipeline=2, data=1)
    actor = Actor(config, read_hf_config(model_path), layout)
    with torch.no_grad():
        for number, parameter in enumerate(actor.model.parameters()):
            parameter.mul_(1.25 + number / 64)
    _tie(actor, read_hf_config(model_path))
    checkpoint.save(actor, checkpoint.TrainerState(step=7), Path(run_dir) / "checkpoints", keep=1)
    weights = dict(export_weights(actor.model, actor.hf_config, "leader"))
    if rank == layout.leader:
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


def test_layers_stored_one_by_one_are_read_too(tmp_path):
    """As Megatron-Core writes them for layers that are not alike."""
    original = make_model(tmp_path / "model", "qwen3", tied=False, vocab=VOCAB)
    run_distributed(save_layer_by_layer, 1, str(original), str(tmp_path / "saved"))
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", hf=original)
    assert_same_model(original, tmp_path / "back")


def save_layer_by_layer(rank, model_path, out):
    start(1, 1)
    from megatron.core import dist_checkpointing

    from megatron_policysplit.actor.weights import load_weights

    model = nan_model(model_path, torch.float32)
    load_weights(model, model_path)
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    Path(out).mkdir()
    dist_checkpointing.save({"model": state}, out)


def test_logits_are_those_of_transformers(models, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(models[0][0], damaged)
    tensors = tensors_of(damaged)
    tensors["model.layers.2.self_attn.k_proj.weight"][5] *= 1.1
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    run_distributed(check_all_logits, 1, models[:-1], str(damaged))


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
    run_distributed(check_against_mbridge, 1, sorted(pairs, key=lambda pair: pair[0].endswith("-True")))


def check_against_mbridge(rank, pairs):
    """mbridge loads the original into Megatron-Core and exports it; it is given Transformer Engine's names."""
    start(1, 1)
    from mbridge import AutoBridge

    from checkpoints_conv import architecture_of, read_hf_config

    for hf, exported in pairs:
        config = read_hf_config(hf)
        table = architecture_of(config).by_megatron_name(config)
        dtype = torch.bfloat16 if hf.endswith("bf16") else torch.float32
        model = nan_model(hf, dtype)
        bridge = AutoBridge.from_pretrained(hf, dtype=dtype)
        names = {name: table[name].megatron[-1] for name in dict(model.named_parameters())}
        extra = {name: name for name in model.state_dict() if name not in names}
        bridge._weight_name_mapping_mcore_local_to_global = lambda model, consider_ep=True, n=names | extra: n
        bridge.load_weights([model], hf)
        theirs = dict(bridge.export_weights([model]))
        ours = tensors_of(exported)
        assert set(theirs) == set(ours)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), (hf, name)


def test_several_processes_share_a_conversion(tmp_path):
    original = make_tree(make_model(tmp_path / "model", "qwen2", tied=False, vocab=VOCAB))
    run_distributed(convert_there_and_back, 2, str(original), str(tmp_path))
    files = sorted(file.name for file in (tmp_path / "megatron").glob("*.distcp"))
    assert files == ["__0_0.distcp", "__1_0.distcp"]
    assert min(file.stat().st_size for file in (tmp_path / "megatron").glob("*.distcp")) > 100_000  # shared evenly
    assert_same_model(original, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "megatron", "back"}


def convert_there_and_back(rank, original, root):
    from checkpoints_conv.ranks import started_ranks
    from megatron_policysplit.errors import ModelError

    ranks = started_ranks()
    assert (ranks.rank, ranks.size) == (rank, 2)
    with pytest.raises(ModelError, match="config.json is missing"):
        hf_to_megatron(root, f"{root}/megatron", ranks=ranks)
    with pytest.raises(ModelError, match="exists and is not an empty directory"):
        hf_to_megatron(original, original, ranks=ranks)
    hf_to_megatron(original, f"{root}/megatron", ranks=ranks)
    megatron_to_hf(f"{root}/megatron", f"{root}/back", ranks=ranks, max_shard_bytes=100_000)
