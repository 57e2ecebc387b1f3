"""Times scoring and training of Policy Split on one GPU, at the sizes of real models.

    python -m benchmarks.gpu [--shapes 0.6b 1.7b] [--rollouts 64] [--response 1024] [--prompt 256]
                             [--micro-batch-tokens 8192] [--repeats 3] [--output FILE.json]

The model is a Qwen3 with random weights and the sizes of the published one of that name; weights in
bf16, Adam's state and gradients in fp32. A batch is questions with 8 responses each, half of them
of each mode, of random lengths from a quarter of --response up to it, and every response under both
prompts (the high-entropy one 64 tokens longer). `score` is `Actor.log_probs`: old log-probs, exact
entropies and the KL between the modes. `update` is one optimizer step over all rows: forward,
backward, reduction of gradients, clipping, Adam. Every batch has rows of its own; the first is
given apart, for kernels are compiled and tuned in it. A model's FLOP per token are
2 x (parameters of the layers and the LM head) and 4 x layers x heads x head size x the mean number
of tokens that causal attention sees, forward; three times that with backward. Tokens are those of
the rows, without padding. With --shapes tiny it runs on a CPU too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_policysplit.algorithms.signals import RowSettings, SignalBuilder, live_rows
from megatron_policysplit.config import Config
from megatron_policysplit.rows import Mode, Rollout, Row, share_rollouts

SAMPLES = 8
SYSTEM_TOKENS = 64  # of the high-entropy prompt
# Of the published Qwen3 models: hidden size, MLP size, layers, heads, key-value heads, tied head.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, True),
    "0.6b": (1024, 3072, 28, 16, 8, True),
    "1.7b": (2048, 6144, 28, 16, 8, True),
    "4b": (2560, 9728, 36, 32, 8, True),
    "8b": (4096, 12288, 36, 32, 8, False),
}
HEAD_DIM = 128
# Dense bf16 FLOP/s of vendor sheets, by the name that torch gives a device.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


def make_model(path: Path, shape: str, vocabulary: int) -> None:
    """A Hugging Face directory with random bf16 weights. Two norms and seven matrices a layer."""
    from safetensors.torch import save_file

    hidden, mlp, layers, heads, groups, tied = SHAPES[shape]
    path.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": 40960,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }
    (path / "config.json").write_text(json.dumps(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=draw, device=device) * columns**-0.5
        return values.bfloat16().cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden),
        "model.norm.weight": ones(hidden),
    }
    if not tied:
        tensors["lm_head.weight"] = matrix(vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", heads * HEAD_DIM, hidden),
            ("self_attn.k_proj", groups * HEAD_DIM, hidden),
            ("self_attn.v_proj", groups * HEAD_DIM, hidden),
            ("self_attn.o_proj", hidden, heads * HEAD_DIM),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ):
            tensors[f"{prefix}{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = ones(hidden)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"{prefix}{name}.weight"] = ones(HEAD_DIM)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def make_rows(arguments: argparse.Namespace, vocabulary: int, batch: int) -> list[Row]:
    """A batch of responses of random tokens, each under both prompts."""
    draw = random.Random(batch)
    rollouts, prompts = [], {}
    for question in range(arguments.rollouts // SAMPLES):
        normal = [draw.randrange(vocabulary) for _ in range(arguments.prompt)]
        system = [draw.randrange(vocabulary) for _ in range(SYSTEM_TOKENS)]
        prompts[question] = {Mode.NORMAL: normal, Mode.HIGH_ENTROPY: system + normal}
        for number in range(SAMPLES):
            length = draw.randint(max(1, arguments.response // 4), arguments.response)
            rollouts.append(
                Rollout(
                    batch=batch,
                    question=question,
                    mode=(Mode.NORMAL, Mode.HIGH_ENTROPY)[number % 2],
                    sample=number // 2,
                    tokens=[draw.randrange(vocabulary) for _ in range(length)],
                    engine_logprobs=[-10.0] * length,
                    finish_reason="stop",
                    weight_versions=[(0, batch)],
                    loss_mask=[1] * length,
                    reward=float(number // 2 % 2),  # every group has both, so every row is trained
                )
            )
    return share_rollouts(rollouts, prompts)


def make_config(model: Path, arguments: argparse.Namespace) -> Config:
    config = Config()
    config.model.path, config.model.dtype = str(model), "bfloat16"
    config.rollout.samples_per_question = SAMPLES
    config.rollout.max_response_tokens = arguments.response
    config.train.max_tokens_per_micro_batch = arguments.micro_batch_tokens
    config.algorithm.options = {"policy_split": {"eta": 0.1}}
    return config


def measure(shape: str, arguments: argparse.Namespace, layout: Any) -> dict[str, Any]:
    """Build the actor, score and train, and return figures."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.algorithms.methods import build_algorithm

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / shape
        make_model(path, shape, arguments.vocabulary)
        config = make_config(path, arguments)
        seconds_to_build, actor = _timed(lambda: Actor(config, read_hf_config(path), layout))
    print(f"{shape}: built in {seconds_to_build:.1f} s", flush=True)
    algorithm, settings = build_algorithm(config.algorithm), RowSettings.of(config)
    batches, first_ratios = [], []
    _reset_peak()
    for number in range(arguments.repeats + 1):
        rows = make_rows(arguments, arguments.vocabulary, number)
        placed = actor.place(rows, live_rows(rows, algorithm, settings), seed=number)
        score_seconds, old = _timed(partial(actor.log_probs, placed))
        builder = SignalBuilder(
            rows, old, placed.plan, algorithm, settings, state=None, seed=number
        )
        signals = builder.for_step(0, None)
        update_seconds, update = _timed(partial(actor.update, placed, 0, signals))
        first_ratios.append(float(update.metrics.ratio_off_one))
        batches.append(_rates(shape, arguments, rows, placed, score_seconds, update_seconds))
        print(f"{shape}: batch {number}: {_line(batches[-1])}", flush=True)
    result = {
        "shape": shape,
        "parameters": sum(parameter.numel() for parameter in actor.model.parameters()),
        "build_seconds": seconds_to_build,
        "first_batch": batches[0],
        "batches": batches[1:],
        "peak_bytes": _peak(),
        "largest_first_ratio_off_one": max(first_ratios),
    }
    del actor
    return result


def _rates(
    shape: str,
    arguments: argparse.Namespace,
    rows: list[Row],
    placed: Any,
    score_seconds: float,
    update_seconds: float,
) -> dict[str, Any]:
    """One batch in figures."""
    tokens, flops = sum(row.length for row in rows), _flops(shape, arguments.vocabulary, rows)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = PEAK_FLOPS.get(name)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "padded_tokens": sum(batch.tokens.numel() for batch in placed.trained(0)),
        "score_seconds": score_seconds,
        "update_seconds": update_seconds,
        "score_tokens_per_second": tokens / score_seconds,
        "update_tokens_per_second": tokens / update_seconds,
        "score_share_of_peak": flops / score_seconds / peak if peak else None,
        "update_share_of_peak": 3 * flops / update_seconds / peak if peak else None,
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    _synchronize()
    began = time.perf_counter()
    result = work()
    _synchronize()
    return time.perf_counter() - began, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int | None:
    """The peak of allocated bytes since `_reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _flops(shape: str, vocabulary: int, rows: list[Row]) -> float:
    """FLOP of a forward pass over the rows; the head's over the response tokens alone."""
    hidden, mlp, layers, heads, groups, _ = SHAPES[shape]
    attention = HEAD_DIM * hidden * (2 * heads + 2 * groups)
    layer = attention + 3 * mlp * hidden
    total = 0.0
    for row in rows:
        total += 2.0 * layers * layer * row.length
        total += 2.0 * vocabulary * hidden * row.response_length
        total += 4.0 * layers * heads * HEAD_DIM * row.length * (row.length + 1) / 2
    return total


def main() -> None:
    arguments = _arguments()
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.config import ParallelConfig

    layout = parallel.initialize(ParallelConfig(), seed=0)
    results = []
    for shape in arguments.shapes:
        results.append(measure(shape, arguments, layout))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    on_gpu = torch.cuda.is_available()
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "date": date.today().isoformat(),
        "versions": _versions(),
        "settings": {
            name: value
            for name, value in vars(arguments).items()
            if name not in ("output", "shapes")
        },
        "results": results,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {"torch": torch.__version__}
    for name in ("megatron-core", "transformer-engine", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _line(batch: dict[str, Any]) -> str:
    share = batch["update_share_of_peak"]
    return (
        f"{batch['tokens']} tokens, scored in {batch['score_seconds']:.2f} s "
        f"({batch['score_tokens_per_second']:.0f} tokens/s), trained on in "
        f"{batch['update_seconds']:.2f} s ({batch['update_tokens_per_second']:.0f} tokens/s"
        + (f", {100 * share:.1f} % of the device's bf16 peak)" if share else ")")
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "1.7b"])
    parser.add_argument("--rollouts", type=int, default=64, help=f"a multiple of {SAMPLES}")
    parser.add_argument("--response", type=int, default=1024, help="longest response, tokens")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the normal prompt")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
