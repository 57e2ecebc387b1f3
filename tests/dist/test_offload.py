"""Offloading in real process groups: everything is freed, and training goes on as if it had not been, bit for bit."""

import itertools
from dataclasses import dataclass, field

import pytest

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, VOCAB, Case, update_batch

BATCHES = 3
CHUNK_BYTES = 1000  # no multiple of anything: storages lie across chunks, some across many


@dataclass(frozen=True)
class Setup:
    name: str
    shape: tuple[int, int, int]  # TP, PP, DP
    settings: dict = field(default_factory=dict, hash=False)


SETUPS = [
    Setup("tp2-fp32", (2, 1, 1), {"algorithm.kl_coef": 0.3}),
    Setup("tp2-bf16", (2, 1, 1), {"model.dtype": "bfloat16"}),
    Setup("dp2-fp32-sharded", (1, 1, 2), {"train.distributed_optimizer": True}),
    Setup("dp2-bf16-sharded", (1, 1, 2), {"train.distributed_optimizer": True, "model.dtype": "bfloat16"}),
    Setup("pp2-bf16", (1, 2, 1), {"model.dtype": "bfloat16"}),
]


# --- in every process --------------------------------------------------------------------------------


def run(rank, setup, path):
    import torch

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.offload import Offload
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, data = setup.shape
    layout = initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, data=data), seed=1, timeout_seconds=60)
    case = Case(setup.name, settings={"algorithm.options.policy_split.eta": 0.5, **setup.settings})
    config = case.config(path)

    def actor():
        return Actor(config, read_hf_config(path), layout)

    plain, moved = actor(), actor()
    offload = Offload(moved.ddp, moved.optimizer, chunk_bytes=CHUNK_BYTES)
    host = None
    for batch in range(BATCHES):
        assert outcome(plain, case, layout, batch) == outcome(moved, case, layout, batch)
        assert_same(state(plain), state(moved))
        before, aliases, weights = state(moved), shared(moved), exported(moved)
        go_away(offload, moved, before)
        assert_same(exported(moved, read=offload.read), weights)
        chunks = [[chunk.data_ptr() for chunk in memory.chunks] for memory in offload._host.values()]
        assert host in (None, chunks), "host memory is allocated once"
        host = chunks
        come_back(offload)
        assert_same(state(moved), before)
        assert shared(moved) == aliases, "every view is of the storage it was of"
        assert all(not parameter.main_grad.any() for parameter in moved.model.parameters())
    assert not torch.equal(next(iter(before.values())), next(iter(state(actor()).values()))), "training changed nothing"
    check_read_of_a_view(offload, moved)
    return len(before)


def outcome(actor, case, layout, batch):
    """One step: per row the statistics, and the update's metrics, as plain numbers."""
    rows = case.rows(batch) if layout.is_leader else []
    placed = actor.place(rows, case.live(rows, actor.config), seed=SEED + batch)
    old = actor.log_probs(placed)
    reference = actor.reference_log_probs(placed) if actor.config.algorithm.kl_coef > 0 else None
    update = update_batch(actor, placed, case.builder(rows, old, placed, actor.config, reference))
    return [(row.logprobs.tolist(), row.entropy.tolist()) for row in old], update


def live_tensors(actor):
    """Every tensor that training reads, by name."""
    tensors = dict(actor.model.named_parameters()) | {f"buffer {n}": b for n, b in actor.model.named_buffers()}
    for number, optimizer in enumerate(actor.optimizer.megatron.chained_optimizers):
        masters = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
        for index, master in enumerate(masters):
            tensors[f"optimizer {number} master {index}"] = master
            for name, value in optimizer.optimizer.state[master].items():
                tensors[f"optimizer {number} {name} {index}"] = value
    return tensors


def state(actor):
    return {name: tensor.detach().clone() for name, tensor in live_tensors(actor).items()}


def assert_same(found, expected):
    import torch

    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def gradients(actor):
    return {f"gradient of {name}": parameter.main_grad for name, parameter in actor.model.named_parameters()}


def exported(actor, **options):
    from megatron_policysplit.actor.weights import export_weights

    return dict(export_weights(actor.model, actor.hf_config, "every_rank", **options))


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def shared(actor):
    """Pairs of tensors on one storage, where they lie on it, and Megatron's own views beside them."""
    tensors = live_tensors(actor) | gradients(actor)
    for number, buffer in enumerate(actor.ddp.buffers):
        tensors[f"buffer {number}"] = buffer.grad_data
        for index, bucket in enumerate(buffer.buckets):
            tensors[f"bucket {number} {index}"] = bucket.grad_data
            if bucket.param_data is not None:
                tensors[f"bucket {number} {index} of parameters"] = bucket.param_data
    by_storage = {}
    for name, tensor in tensors.items():
        place = (name, tensor.storage_offset(), tuple(tensor.shape), tensor.untyped_storage().nbytes())
        by_storage.setdefault(storage_of(tensor), []).append(place)
    return by_storage


def go_away(offload, actor, before):
    """Offload part by part: each is freed then, and only it."""
    import torch

    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    assert RotaryEmbedding.forward.cache_info().currsize > 0
    parameters = {storage_of(p) for p in (*actor.model.parameters(), *actor.model.buffers())}
    grads = {storage_of(gradient) for gradient in gradients(actor).values()}
    states = {storage_of(tensor) for tensor in live_tensors(actor).values()} - parameters - grads
    assert parameters and grads and states
    assert not parameters & grads
    sizes = {storage_of(t): t.untyped_storage().nbytes() for t in (live_tensors(actor) | gradients(actor)).values()}

    expected = 0
    for part, group in (("optimizer", states), ("gradients", grads), ("parameters", parameters)):
        refused(offload, [f"offload_{other}" for other in ("optimizer", "gradients", "parameters") if other != part])
        refused(offload, [f"restore_{part}"])
        getattr(offload, f"offload_{part}")()
        expected += sum(sizes[key] for key in group)
        assert offload.bytes_away == expected
        for name, tensor in (live_tensors(actor) | gradients(actor)).items():
            here = storage_of(tensor) in states | grads | parameters
            gone = {"optimizer": states, "gradients": states | grads}.get(part, states | grads | parameters)
            assert here
            assert (tensor.untyped_storage().nbytes() == 0) == (storage_of(tensor) in gone), (part, name)
    assert RotaryEmbedding.forward.cache_info().currsize == 0, "tables of rotary positions are no parameters"
    refused(offload, ["offload_optimizer", "offload_gradients", "offload_parameters"])
    refused(offload, ["restore_gradients", "restore_optimizer"])
    for name, parameter in itertools.chain(actor.model.named_parameters(), actor.model.named_buffers()):
        found = offload.read(parameter)
        expected_values = before[name if name in before else f"buffer {name}"]
        assert found.shape == parameter.shape and torch.equal(found, expected_values), name
    with pytest.raises(RuntimeError, match=r"shape \(3,\) is none of the parameters"):
        offload.read(torch.zeros(3))


def come_back(offload):
    assert offload.away == ("optimizer", "gradients", "parameters")
    offload.restore_parameters()
    refused(offload, ["restore_parameters", "restore_optimizer", "offload_gradients"])
    offload.restore_gradients()
    offload.restore_optimizer()
    refused(offload, ["restore_optimizer"])
    assert offload.away == () and offload.bytes_away == 0


def refused(offload, names):
    away, size = offload.away, offload.bytes_away
    for name in names:
        verb, part = name.split("_")
        with pytest.raises(RuntimeError, match=f"cannot {verb} {part} with .* away; the order is optimizer, gradients"):
            getattr(offload, name)()
    assert (offload.away, offload.bytes_away) == (away, size)


def check_read_of_a_view(offload, actor):
    """Of a part of a parameter, and of its transpose; while parameters are here `read` copies nothing."""
    import torch

    parameter = max(actor.model.parameters(), key=torch.Tensor.numel)
    views = [parameter.detach()[1:3, 1:4], parameter.detach().t(), parameter.detach()[-1]]
    expected = [view.clone() for view in views]
    assert offload.read(parameter).data_ptr() == parameter.data_ptr()
    assert not offload.read(parameter).requires_grad
    offload.offload_optimizer(), offload.offload_gradients(), offload.offload_parameters()
    assert all(torch.equal(offload.read(view), values) for view, values in zip(views, expected, strict=True))
    come_back(offload)


# --- in this process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", tied=True, vocab=VOCAB,
                          num_hidden_layers=2))  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_training_goes_on_bit_for_bit(setup, path):
    world = setup.shape[0] * setup.shape[1] * setup.shape[2]
    assert all(count > 20 for count in run_distributed(run, world, setup, path, timeout_seconds=240))
