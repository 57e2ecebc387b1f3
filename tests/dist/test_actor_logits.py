"""The actor against transformers, in real process groups, and its weights out and back in."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model

VOCAB = 131  # odd, so that tensor parallelism pads it
MODELS = [(family, tied) for family in ("llama", "mistral", "qwen2", "qwen3") for tied in (False, True)]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A model directory; beside it, transformers' logits. names: its state dict's, a tied head left out."""

    path: str
    names: tuple[str, ...]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_case(root / f"{family}-{'tied' if tied else 'untied'}", family, tied) for family, tied in MODELS]


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_logits_and_weights_equal_transformers(cases, tensor, pipeline):
    results = run_distributed(check_cases, tensor * pipeline, cases, tensor, pipeline)
    last_stage = [differences for differences in results if differences]
    assert len(last_stage) == tensor
    for differences in last_stage:
        print(f"TP={tensor} PP={pipeline}: " + ", ".join(f"{d:.1e}" for d in differences))
        assert len(differences) == len(cases) and max(differences) < TOLERANCE


def test_a_failing_consumer_stops_every_rank(cases):
    """At any moment of the export, on any rank; and the ranks can go on together afterwards."""
    run_distributed(check_failing_consumers, 2, cases[-1])


def make_case(path, family, tied):
    from transformers import AutoModelForCausalLM

    make_model(path, family, tied=tied, vocab=VOCAB)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(tokens()).logits
    if family == "llama":  # the rope scaling must matter, or equal logits would say nothing about it
        model.model.rotary_emb.inv_freq.copy_(model.config.rope_parameters["rope_theta"] ** -(torch.arange(8) / 8))
        with torch.no_grad():
            assert (model(tokens()).logits - logits).abs().max() > 100 * TOLERANCE
    save_file({"logits": logits}, logits_file(path))
    return Case(str(path), tuple(name for name in model.state_dict() if not (tied and name == "lm_head.weight")))


def tokens():
    return torch.randint(0, VOCAB, (2, 48), generator=torch.Generator().manual_seed(7))


def logits_file(path):
    return f"{path}-logits.safetensors"


def start(tensor, pipeline):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    return initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, data=1), seed=1, timeout_seconds=60)


def loaded_model(case):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.model import build_model
    from megatron_policysplit.actor.weights import load_weights

    hf_config = read_hf_config(case.path)
    model = build_model(hf_config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # a parameter or padding row that loading skips must show
    load_weights(model, case.path)
    return model, hf_config


def check_cases(rank, cases, tensor, pipeline):
    """Check exports and parameter marks; return the largest logit difference of each case (last stage)."""
    layout = start(tensor, pipeline)
    from megatron_policysplit.actor.weights import export_weights

    differences = []
    for case in cases:
        model, hf_config = loaded_model(case)
        logits = pipeline_logits(model, tokens())
        assert (logits is not None) == layout.is_last_stage
        if logits is not None:
            differences.append((logits - load_file(logits_file(case.path))["logits"]).abs().max().item())
        assert_equals_files(list(export_weights(model, hf_config, "every_rank")), case)
        to_leader = list(export_weights(model, hf_config, "leader"))
        assert bool(to_leader) == (rank == layout.leader)
        if rank == layout.leader:
            assert_equals_files(to_leader, case)
        assert_marked_for_gradient_norm(model, hf_config, tensor)
    return differences


def pipeline_logits(model, ids):
    """logits[b, s, vocab] over all tensor-parallel ranks, on the last stage; None on the others."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    outputs = []

    def keep(hidden, non_loss_data=False):
        outputs.append(hidden)
        return hidden

    def forward_step(iterator, model):
        return model(input_ids=ids, position_ids=positions, attention_mask=None), keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not outputs:
            return None
        hidden = outputs[0]  # [s, b, h]
        shard = hidden.reshape(-1, hidden.shape[-1]) @ model.head(1).weight.t()
        shards = [torch.empty_like(shard) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        dist.all_gather(shards, shard, group=parallel_state.get_tensor_model_parallel_group())
    logits = torch.cat(shards, dim=-1)
    assert (model.vocab_size, model.padded_vocab_size) == (VOCAB, logits.shape[-1])
    assert (logits[:, VOCAB:] == 0).all()
    return logits[:, :VOCAB].view(ids.shape[1], ids.shape[0], -1).transpose(0, 1)


def assert_equals_files(exported, case):
    """transformers' names in transformers' order, and the bits of the files."""
    files = load_file(f"{case.path}/model.safetensors")
    assert [name for name, _ in exported] == list(case.names)
    for name, tensor in exported:
        assert torch.equal(tensor, files[name]), name


def assert_marked_for_gradient_norm(model, hf_config, tensor):
    """Megatron's gradient norm counts a parameter on all TP ranks only if it is marked as sharded."""
    from checkpoints_conv import find_architecture

    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    for name, parameter in model.named_parameters():
        mapping = architecture.by_megatron_name(hf_config)[name]
        sharded = mapping.local_shape(sizes, 2) != mapping.local_shape(sizes, 1)
        assert getattr(parameter, "tensor_model_parallel", False) == sharded, name


def check_failing_consumers(rank, case):
    layout = start(1, 2)
    from megatron_policysplit.actor.weights import consume_weights
    from megatron_policysplit.errors import TrainingError

    model, hf_config = loaded_model(case)
    last = len(case.names)
    for failing_rank, after in ((0, 0), (1, 5), (0, last), (1, last)):

        def consumer(stream, failing_rank=failing_rank, after=after):
            for count, _ in enumerate(stream):
                if (rank, count) == (failing_rank, after):
                    raise ValueError("disk full")
            if rank == failing_rank:
                raise ValueError("disk full")

        with pytest.raises(ValueError if rank == failing_rank else TrainingError) as error:
            consume_weights(model, hf_config, "every_rank", consumer)
        assert ("disk full" in str(error.value)) == (rank == failing_rank)
    # A consumer may take fewer tensors than there are.
    assert consume_weights(model, hf_config, "every_rank", lambda stream: next(stream)[0]) == case.names[0]
    names = consume_weights(model, hf_config, "leader", lambda stream: [name for name, _ in stream])
    assert names == (list(case.names) if rank == layout.leader else [])
    with pytest.raises(ValueError, match="destination='somewhere' is not one of"):
        consume_weights(model, hf_config, "somewhere", list)


def test_cases_cover_what_they_should(cases):
    configs = [json.loads(open(f"{case.path}/config.json").read()) for case in cases]
    assert any(
        config.get("head_dim", 16) * config["num_attention_heads"] != config["hidden_size"] for config in configs
    )
    assert any(name.endswith("q_proj.bias") for case in cases for name in case.names)
    assert any(name.endswith("q_norm.weight") for case in cases for name in case.names)
