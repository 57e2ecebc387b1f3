"""Weight gradients that layers add to the fp32 sum themselves: who is told to, how the model is built, what it gives.

Transformer Engine's layers do it on a GPU. Here its modules are stand-ins; and Megatron's own layers do it by the same
contract with DDP (`main_grad`, `grad_added_to_main_grad`, a gradient without meaning for autograd), with a product in
plain torch where Apex's kernel would be.
"""

import sys
import types

import pytest
import torch

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, VOCAB, Case


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("transformer_engine", [False, True])
def test_only_transformer_engine_on_a_gpu_fuses(monkeypatch, gpu, transformer_engine):
    from megatron_policysplit.actor import megatron_on_cpu

    monkeypatch.setattr(megatron_on_cpu, "on_cpu", lambda: not gpu)
    fused = megatron_on_cpu.model_options(transformer_engine, False)["gradient_accumulation_fusion"]
    assert fused == (gpu and transformer_engine)


def fuse_everywhere():
    """Have `build_model` ask for fusion on the CPU, too."""
    from megatron_policysplit.actor import model

    options = model.model_options
    model.model_options = lambda *arguments: {**options(*arguments), "gradient_accumulation_fusion": True}


# --- construction around stand-ins for Transformer Engine --------------------------------------------


def build(rank, path):
    """Which modules of a model were told to fuse, and what Megatron's own check says before and after."""
    from tests.support import fake_transformer_engine

    fake_transformer_engine.install()
    from megatron.core.tensor_parallel import layers

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import gradient_fusion, model
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    initialize(ParallelConfig(), seed=1, timeout_seconds=60)
    fuse_everywhere()
    config = read_hf_config(path)
    built = model.build_model(config, dtype=torch.float32, transformer_engine=True)
    told = {
        name.rpartition(".")[2]: module.fuse_wgrad_accumulation
        for name, module in built.named_modules()
        if hasattr(module, "fuse_wgrad_accumulation")
    }
    assert not layers._grad_accum_fusion_available, "Megatron's check is as it was"
    with pytest.raises(ZeroDivisionError), gradient_fusion.idle_output_layer():
        raise ZeroDivisionError
    assert not layers._grad_accum_fusion_available, "after an error, too"
    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        layers.ColumnParallelLinear(4, 4, config=built.config, init_method=torch.nn.init.zeros_, bias=False)
    return told


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_layers_are_told_and_the_output_layer_is_built(tmp_path, family):
    path = make_model(tmp_path / family, family, tied=False, vocab=VOCAB, num_hidden_layers=2)
    (told,) = run_distributed(build, 1, str(path), start="spawn")
    assert set(told) >= {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"} and all(told.values())


# --- gradients ---------------------------------------------------------------------------------------


def product_of_apex(hidden, grad_output, main_grad):
    """What Apex's kernel does: main_grad += grad_output^T hidden, in fp32."""
    main_grad.add_(grad_output.t() @ hidden)


def gradients(rank, path, tensor, fused):
    """main_grad of every parameter after a step of several micro-batches."""
    from megatron.core.tensor_parallel import layers

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    calls = []
    if fused:
        fuse_everywhere()
        kernel = lambda *arguments: (calls.append(None), product_of_apex(*arguments))  # noqa: E731
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=kernel)
        # Memory that nobody has written holds NaN: what autograd gets in place of a gradient must go nowhere.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
    layout = initialize(ParallelConfig(tensor=tensor), seed=1, timeout_seconds=60)
    case = Case("fusion", settings={"algorithm.options.policy_split.eta": 0.5})
    actor = Actor(case.config(path), read_hf_config(path), layout)
    assert not any(parameter.main_grad.any() for parameter in actor.model.parameters())
    rows = case.rows(0) if layout.is_leader else []
    placed = actor.place(rows, case.live(rows, actor.config), seed=SEED)
    assert len(placed.trained(0)) > 2
    old = actor.log_probs(placed)
    builder = case.builder(rows, old, placed, actor.config)
    sums = []
    actor.optimizer.step = lambda **unused: sums.extend(p.main_grad.clone() for p in actor.model.parameters())
    for _ in range(2):  # the second step begins with the sums of the first
        sums.clear()
        actor.update(placed, 0, builder.for_step(0, None))
    layers_of_matrices = 4 * len(actor.model.decoder.layers)
    assert len(calls) == (2 * len(placed.trained(0)) * layers_of_matrices if fused else 0)
    return sums


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
def test_fused_gradients_are_the_gradients(tmp_path, tied, tensor):
    path = str(make_model(tmp_path / "model", "qwen3", tied=tied, vocab=VOCAB, num_hidden_layers=2))
    plain, fused = (run_distributed(gradients, tensor, path, tensor, fused) for fused in (False, True))
    for expected, found in zip(plain, fused, strict=True):
        assert len(found) == len(expected) and all(tensor.abs().max() > 0 for tensor in expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


# --- memory ------------------------------------------------------------------------------------------


def test_placeholders_are_dropped(monkeypatch):
    """The cache of transformer_engine/pytorch/module/base.py (2.11), by shape and dtype."""
    from megatron_policysplit.actor.gradient_fusion import drop_placeholders

    base = types.ModuleType("transformer_engine.pytorch.module.base")
    base._dummy_wgrads = {(2, 3, torch.bfloat16): torch.empty(2, 3)}
    monkeypatch.setitem(sys.modules, base.__name__, base)
    drop_placeholders()
    assert base._dummy_wgrads == {}
    monkeypatch.delitem(sys.modules, base.__name__)
    drop_placeholders()  # nothing to do where it was never imported
