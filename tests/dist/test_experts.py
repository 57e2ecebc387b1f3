"""A mixture of experts against transformers, over tensor, pipeline and expert parallelism, and its weights out again."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model

VOCAB = 131
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2)]  # ranks of TP, PP and EP
REPLICAS = 2  # at most; each has tokens of its own
TOLERANCE = 1e-4
FEW_ELEMENTS = 12_000  # of the experts' buckets: one expert has 7,680, so that a layer's experts are several buckets
CONFIGS = {
    "normalized": {},
    "plain": {"norm_topk_prob": False, "tie_word_embeddings": True},
    "one": {"norm_topk_prob": False, "num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Case:
    """A model directory; beside it, transformers' logits of each replica's tokens."""

    path: str

    @property
    def logits_file(self):
        return f"{self.path}-logits.safetensors"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_case(root / name, changes) for name, changes in CONFIGS.items()]


@pytest.mark.parametrize(("tensor", "pipeline", "expert"), LAYOUTS)
def test_logits_and_weights_equal_transformers(cases, tensor, pipeline, expert):
    results = run_distributed(check_cases, tensor * pipeline * expert, cases, (tensor, pipeline, expert))
    last_stage = [differences for differences in results if differences]
    assert len(last_stage) == tensor * expert
    for differences in last_stage:
        print(f"TP={tensor} PP={pipeline} EP={expert}: " + ", ".join(f"{d:.1e}" for d in differences))
        assert len(differences) == len(cases) and max(differences) < TOLERANCE


def make_case(path, changes):
    from transformers import AutoModelForCausalLM

    make_model(path, "qwen3_moe", tied=changes.get("tie_word_embeddings", False), vocab=VOCAB, **changes)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = {str(replica): model(tokens(replica)).logits for replica in range(REPLICAS)}
    case = Case(str(path))
    save_file(logits, case.logits_file)
    return case


def tokens(replica):
    """Of different widths, so that the replicas of an expert-parallel group exchange unequal numbers of tokens."""
    return torch.randint(0, VOCAB, (2, 48 - 16 * replica), generator=torch.Generator().manual_seed(replica))


def start(shape):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, expert = shape
    parallel = ParallelConfig(
        tensor=tensor, pipeline=pipeline, data=expert, expert=expert, sequence=tensor > 1
    )
    return initialize(parallel, seed=1, timeout_seconds=60)


def loaded_model(case, layout):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.model import build_model
    from megatron_policysplit.actor.weights import load_weights

    hf_config = read_hf_config(case.path)
    model = build_model(hf_config, dtype=torch.float32, sequence=layout.sequence)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_weights(model, case.path)
    return model, hf_config


def check_cases(rank, cases, shape):
    """Check exports; return the largest logit difference of each case (last stage)."""
    layout = start(shape)
    from megatron_policysplit.actor import export_buckets, weights

    export_buckets.EXPERT_BUCKET_ELEMENTS = FEW_ELEMENTS
    tensor, pipeline, expert = shape
    plans = []
    make_plan = weights.export_plan
    weights.export_plan = lambda *layout: plans.append(layout) or make_plan(*layout)
    differences = []
    for case in cases:
        model, hf_config = loaded_model(case, layout)
        logits = pipeline_logits(model, tokens(layout.data_rank), tensor)
        assert (logits is not None) == layout.is_last_stage
        if logits is not None:
            theirs = load_file(case.logits_file)[str(layout.data_rank)]
            differences.append((logits - theirs).abs().max().item())
        check_plan(make_plan(hf_config, tensor, pipeline, expert), expert)
        listed = [(tensor.name, tensor.shape) for tensor in export_buckets.exported_tensors(hf_config, pipeline)]
        plans.clear()
        exported = list(weights.export_weights(model, hf_config, "every_rank"))
        assert [(name, tuple(tensor.shape)) for name, tensor in exported] == listed
        assert_equals_files(exported, case)
        check_destinations(model, hf_config, layout, case)
        assert plans == [(hf_config, tensor, pipeline, expert)]  # of three exports
    check_failing_consumers(rank, model, hf_config, tensor * pipeline * expert)
    return differences


def check_plan(plan, expert):
    """Experts travel in several buckets a layer, each of them one rank's, none of them too large."""
    owners = [bucket.owner for bucket in plan if bucket.owner is not None]
    assert len(owners) == 4 * 8 and set(owners) == set(range(expert))
    full = [sum(len(mapping.sources) for mapping in bucket.mappings) for bucket in plan if bucket.owner is not None]
    assert sum(full) == 4 * 8 * 3


def check_destinations(model, hf_config, layout, case):
    from megatron_policysplit.actor.weights import export_weights

    first = layout.data_rank == 0
    to_leader = list(export_weights(model, hf_config, "leader" if first else "nowhere"))
    assert bool(to_leader) == layout.is_chief
    if layout.is_chief:
        assert_equals_files(to_leader, case)
    of_stage = list(export_weights(model, hf_config, "stage_leader" if first else "nowhere"))
    assert bool(of_stage) == (first and layout.tensor_rank == 0)
    files = load_file(f"{case.path}/model.safetensors")
    assert all(torch.equal(tensor, files[name]) for name, tensor in of_stage)
    stage = str(layout.pipeline_rank * 4 // layout.pipeline)
    assert not of_stage or f"model.layers.{stage}.mlp.experts.7.up_proj.weight" in dict(of_stage)


def check_failing_consumers(rank, model, hf_config, world):
    """A consumer that fails stops the ranks of every replica that shares the experts."""
    from megatron_policysplit.actor.weights import consume_weights
    from megatron_policysplit.errors import TrainingError

    for failing_rank, after in ((0, 0), (world - 1, 40)):

        def consumer(stream, failing_rank=failing_rank, after=after):
            for count, _ in enumerate(stream):
                if (rank, count) == (failing_rank, after):
                    raise ValueError("disk full")

        with pytest.raises(ValueError if rank == failing_rank else TrainingError):
            consume_weights(model, hf_config, "every_rank", consumer)
    names = consume_weights(model, hf_config, "every_rank", lambda stream: [name for name, _ in stream])
    assert names[0] == "model.embed_tokens.weight"


def assert_equals_files(exported, case):
    files = load_file(f"{case.path}/model.safetensors")
    assert sorted(name for name, _ in exported) == sorted(files)
    for name, tensor in exported:
        assert torch.equal(tensor, files[name]), name


def pipeline_logits(model, ids, tensor):
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
            model=model.eval(),
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not outputs:
            return None
        hidden = model.whole(outputs[0])  # [s, b, h]
        shard = hidden.reshape(-1, hidden.shape[-1]) @ model.head(1).weight.t()
        shards = [torch.empty_like(shard) for _ in range(tensor)]
        dist.all_gather(shards, shard, group=parallel_state.get_tensor_model_parallel_group())
    logits = torch.cat(shards, dim=-1)[:, :VOCAB]
    return logits.view(ids.shape[1], ids.shape[0], -1).transpose(0, 1)
