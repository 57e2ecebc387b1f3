"""Times the LM head's Triton kernels on a GPU beside logits in fp32 and beside verl's fused kernel.

    python -m benchmarks.head_gpu [--tokens 1024 4096 16384] [--hidden 1024 4096]
                                  [--output FILE.json]

Hidden states [T, H] and weight [V, H] in bf16 to log-prob and entropy per token, forward only
(scoring) and with the gradients of hidden states and weight (training; both outputs are in the
loss). "triton" is what the actor calls, `score` and `fused_loss`: for each chunk of tokens
statistics without logits, then the gradient of its logits and two matrix products; the weight's
gradient is summed in fp32. "materialised" rounds logits to bf16, as an LM head does, holds them in
fp32 and leaves the rest to autograd. "verl" is the kernel
`verl.utils.kernel.linear_cross_entropy`, where verl is installed.

Methods take turns, after a warm-up in which blocks are tuned. Seconds are a median, by CUDA events.
Memory is the peak above the inputs; gradients that are returned are part of it and listed apart.
`difference` is the largest of a method's log-probs and entropies, in nats, from the materialised
ones, or from ours where those do not fit in memory. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from megatron_policysplit.distributed.device import mixed_products, tile_elements
from megatron_policysplit.vocab_parallel import Head, VocabularyShard, fused_loss, score

WARM_UP = 3


@dataclass(frozen=True)
class Inputs:
    """What every method gets."""

    hidden: Tensor  # [T, H] bf16
    weight: Tensor  # [V, H] bf16
    targets: Tensor  # [T] int64
    grad_logprobs: Tensor  # [T] fp32, upstream gradient of the log-probs
    grad_entropy: Tensor  # [T] fp32, upstream gradient of the entropies
    chunk: int  # tokens at a time, for "triton"

    @classmethod
    def random(cls, tokens: int, features: int, vocab: int, chunk: int, device: str) -> Inputs:
        random = torch.Generator(device).manual_seed(0)
        normal = {"generator": random, "device": device}
        return cls(
            torch.randn(tokens, features, **normal).bfloat16(),
            (torch.randn(vocab, features, **normal) * 2 / features**0.5).bfloat16(),
            torch.randint(vocab, (tokens,), **normal),
            *torch.randn(2, tokens, **normal),
            chunk,
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that a method returns."""
        return self.hidden.nbytes + self.weight.nbytes


# (inputs, whether to compute gradients) -> (log-prob [T], entropy [T]), and with gradients also
# (d hidden [T, H], d weight [V, H]).
Method = Callable[[Inputs, bool], tuple[Tensor, ...]]


def triton_head(inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    shard = VocabularyShard(0, len(inputs.weight), None, tile_elements())
    head = Head(inputs.weight, shard, inputs.chunk, triton=True, mixed_products=mixed_products())
    temperature = torch.ones_like(inputs.grad_logprobs)
    if not backward:
        return score(head, inputs.hidden, inputs.targets, temperature)[:2]
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_()

    def token_loss(span: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
        return (logprobs * inputs.grad_logprobs[span] + entropy * inputs.grad_entropy[span]).sum()

    result = fused_loss(
        replace(head, weight=weight), hidden, inputs.targets, temperature, token_loss
    )
    return result.logprobs, result.entropy, *torch.autograd.grad(result.loss, (hidden, weight))


def materialised(inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    return _by_autograd(_full_softmax, inputs, backward)


def _full_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ weight.T).float().log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def find_verl() -> Method | None:
    """Return verl's kernel as a method, None where verl is not installed.

    Versions of verl order its arguments differently, and `apply` takes none by name, so they are
    put in the order that its signature says.
    """
    try:
        from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy
    except ImportError:
        return None
    names = list(inspect.signature(LinearCrossEntropy.forward).parameters)[1:]
    fixed = {"reduction": "none", "temperature": 1.0, "dist_process_group": None}
    if unknown := set(names) - {"hidden", "weight", "labels"} - set(fixed):
        raise SystemExit(
            f"this version of verl's kernel takes {sorted(unknown)}, which the benchmark does not "
            "know"
        )

    def kernel(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        values = {"hidden": hidden, "weight": weight, "labels": targets} | fixed
        return LinearCrossEntropy.apply(*(values[name] for name in names))

    return lambda inputs, backward: _by_autograd(kernel, inputs, backward)


def _by_autograd(function, inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    if not backward:
        with torch.no_grad():
            return function(inputs.hidden, inputs.weight, inputs.targets)
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_()
    outputs = function(hidden, weight, inputs.targets)
    grads = torch.autograd.grad(
        outputs, (hidden, weight), (inputs.grad_logprobs, inputs.grad_entropy)
    )
    return *(output.detach() for output in outputs), *grads


def measure(
    inputs: Inputs, methods: dict[str, Method | None], backward: bool, repeats: int
) -> list[dict]:
    """Measure all methods in turns: a row for each, with the reason where one cannot run here."""
    rows = {name: {"method": name} for name in methods}
    outputs: dict[str, Tensor] = {}
    for name, method in methods.items():
        if method is None:
            rows[name]["failed"] = "not installed"
            continue
        try:
            for _ in range(WARM_UP):
                method(inputs, backward)
            outputs[name], rows[name]["peak_bytes"] = _peak(method, inputs, backward)
        except torch.OutOfMemoryError:
            if name == "triton":  # the others are compared with it
                raise
            rows[name]["failed"] = "out of memory"
        torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in outputs}
    for _ in range(repeats):
        for name in outputs:
            seconds[name].append(_seconds(methods[name], inputs, backward))
    reference = outputs.get("materialised", outputs["triton"])
    for name in outputs:
        rows[name]["seconds"] = statistics.median(seconds[name])
        rows[name]["lowest_seconds"] = min(seconds[name])
        rows[name]["highest_seconds"] = max(seconds[name])
        rows[name]["difference"] = (outputs[name] - reference).abs().max().item()
    ours = rows["triton"]
    for name in outputs:
        rows[name]["times_our_seconds"] = rows[name]["seconds"] / ours["seconds"]
        rows[name]["times_our_bytes"] = rows[name]["peak_bytes"] / ours["peak_bytes"]
    return list(rows.values())


def _peak(method: Method, inputs: Inputs, backward: bool) -> tuple[Tensor, int]:
    """Log-probs and entropies [2, T] of one call, on the host, and its peak of allocated bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = method(inputs, backward)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return torch.stack(outputs[:2]).cpu(), peak


def _seconds(method: Method, inputs: Inputs, backward: bool) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    method(inputs, backward)
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def main() -> None:
    arguments = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks.head_gpu needs a CUDA device, and PyTorch {torch.__version__} sees none "
            "here"
        )
    methods = {"triton": triton_head, "materialised": materialised, "verl": find_verl()}
    cases = []
    for features in arguments.hidden:
        for tokens in arguments.tokens:
            inputs = Inputs.random(tokens, features, arguments.vocab, arguments.chunk, "cuda")
            for backward in (False, True):
                name = "forward+backward" if backward else "forward"
                rows = measure(inputs, methods, backward, arguments.repeats)
                case = {"tokens": tokens, "hidden": features, "pass": name, "methods": rows}
                cases.append(case | ({"gradient_bytes": inputs.gradient_bytes} if backward else {}))
                print(f"T {tokens}, H {features}, {name}", flush=True)
                for row in rows:
                    print(f"  {row['method']:12s} {_figures(row)}", flush=True)
    result = {
        "device": torch.cuda.get_device_name(),
        "device_bytes": torch.cuda.get_device_properties(0).total_memory,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "vocab": arguments.vocab,
        "dtype": "bfloat16",
        "chunk_tokens": arguments.chunk,
        "repeats": arguments.repeats,
        "cases": cases,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _figures(row: dict) -> str:
    if "failed" in row:
        return row["failed"]
    return (
        f"{row['seconds'] * 1e3:9.2f} ms ({row['times_our_seconds']:.2f} x ours), "
        f"{row['peak_bytes'] / 1e6:9.1f} MB ({row['times_our_bytes']:.2f} x ours), differs "
        f"{row['difference']:.1e} nats"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[1024, 4096], help="features of a hidden state"
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--chunk", type=int, default=1024, help="tokens that are computed at a time"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
