"""The checks, most important first, each with its time limit on an H100."""

from __future__ import annotations

from benchmarks.gpu_check.runner import Check

_AT = "benchmarks.gpu_check."

CHECKS = (
    Check(
        "head",
        "the LM head's kernels agree with fp64 at Qwen3's vocabulary",
        f"{_AT}suites:head",
        150,
        needs_gpu=True,
    ),
    Check(
        "train_local",
        "Policy Split trains in bf16 on Megatron-Core's own layers, NCCL beside gloo, and the "
        "first ratio is exactly 1",
        f"{_AT}training:train_local",
        150,
    ),
    Check(
        "train_transformer_engine",
        "the same on Transformer Engine's layers",
        f"{_AT}training:train_transformer_engine",
        150,
        needs_gpu=True,
    ),
    Check(
        "actor",
        "the reference policy takes no GPU memory; fused weight gradients; deterministic training",
        f"{_AT}suites:actor",
        90,
        needs_gpu=True,
    ),
    Check(
        "offload",
        "the actor's memory leaves the GPU and comes back with the same bits",
        f"{_AT}suites:offload",
        60,
        needs_gpu=True,
    ),
    Check(
        "checkpoints",
        "a run goes on after other optimizers, layers and devices",
        f"{_AT}training:checkpoints",
        240,
    ),
    Check(
        "layer_names",
        "names and shapes of Transformer Engine's layers are those of the tables",
        f"{_AT}suites:layer_names",
        60,
        needs_gpu=True,
    ),
    Check(
        "cuda_ipc",
        "memory handed to another process is this one's again afterwards",
        f"{_AT}device:cuda_ipc",
        60,
        needs_gpu=True,
    ),
    Check(
        "fp8",
        "Transformer Engine's linear layer in FP8, with the same bits under no_grad",
        f"{_AT}device:fp8",
        60,
        needs_gpu=True,
    ),
    Check("bandwidth", "products and copies, in TFLOP/s and GB/s", f"{_AT}device:bandwidth", 60),
    Check(
        "throughput",
        "tokens/s of scoring and of an optimizer step at 1.7B sizes",
        f"{_AT}device:throughput",
        120,
        needs_gpu=True,
    ),
    Check(
        "smollm2",
        "twenty steps of Policy Split on SmolLM2-135M-Instruct",
        f"{_AT}training:smollm2",
        180,
        needs_gpu=True,
    ),
    Check(
        "sglang",
        "a real SGLang server beside the actor, and one on the actor's own GPU",
        f"{_AT}training:sglang",
        240,
        needs_gpu=True,
    ),
)
