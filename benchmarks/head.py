"""Times the LM head with and without its logits, on the CPU with tensor parallelism 2.

    python -m benchmarks.head [--tokens 1024 4096 16384] [--hidden 1024 4096]
                              [--vocabulary 151936] [--results FILE]

Two ranks (gloo), fp32, one thread each. `chunked` is what the actor does: `vocab_parallel.score`
(forward) and `vocab_parallel.fused_loss` (forward and backward), 256 tokens at a time.
`materialising` is what is common elsewhere: fp32 logits of all tokens; maximum, sum, target and
entropy reduced one after the other; softmax beside the logits, saved for backward, which works in
place. Both must give the same mean log-prob and the same norms of gradients. Every case runs in
processes of its own. Memory is a rank's peak beyond what it held before and beyond the gradients of
weights and hidden states that exist at the time: `fused_loss` makes them in its forward pass. Where
the materialising method does not fit into half of the machine's memory its bytes are computed: two
fp32 tensors of all logits. Prints a Markdown table; the last line is JSON with every case.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_policysplit.distributed.launch import free_port, rank_environment
from megatron_policysplit.vocab_parallel import Head, VocabularyShard, fused_loss, score

RANKS, CHUNK, MIB = 2, 256, 2**20


class Materialised(torch.autograd.Function):
    """Log-prob and entropy of logits [T, V / TP] as other trainers compute them.

    Four all-reduces in forward; logits and softmax exist for all tokens.
    """

    @staticmethod
    def forward(ctx, logits, targets, shard):
        highest = logits.max(1).values
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
        local = targets - shard.start
        owned = (local >= 0) & (local < shard.columns)
        local = local.clamp(0, shard.columns - 1)[:, None]
        shifted = logits.sub_(highest[:, None])
        at_target = shifted.gather(1, local)[:, 0].where(owned, 0.0)
        dist.all_reduce(at_target, group=shard.group)
        softmax = shifted.exp()
        total = softmax.sum(1)
        dist.all_reduce(total, group=shard.group)
        softmax.div_(total[:, None])
        mean = torch.einsum("tv,tv->t", softmax, shifted)
        dist.all_reduce(mean, group=shard.group)
        ctx.save_for_backward(softmax, local, owned)
        return at_target - total.log(), total.log() - mean

    @staticmethod
    def backward(ctx, by_logprob, by_entropy):
        softmax, local, owned = ctx.saved_tensors
        grad = softmax.mul_(-by_logprob[:, None])
        grad.scatter_add_(1, local, by_logprob.where(owned, 0.0)[:, None])
        return grad, None, None


class SummedOverRanks(torch.autograd.Function):
    """Identity; backward sums the gradient over the ranks."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


def ppo(old: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """PPO's clipped loss, summed over tokens and divided by a constant."""
    ratio = torch.exp(logprobs - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).sum() / 1000


def run_chunked(hidden, weight, shard, targets, old, advantages, backward: bool):
    head, ones = Head(weight, shard, CHUNK), torch.ones(len(hidden))
    if not backward:
        return score(head, hidden, targets, ones).logprobs, None

    def token_loss(span, logprobs, entropy):
        return ppo(old[span], advantages[span], logprobs)

    result = fused_loss(head, hidden, targets, ones, token_loss)
    return result.logprobs, result.loss


def run_materialising(hidden, weight, shard, targets, old, advantages, backward: bool):
    with torch.set_grad_enabled(backward):
        logits = SummedOverRanks.apply(hidden) @ weight.t()
        logprobs, _ = Materialised.apply(logits, targets, shard)
        return logprobs.detach(), ppo(old, advantages, logprobs)


METHODS = {"chunked": run_chunked, "materialising": run_materialising}
MAKES_GRADIENTS_IN_FORWARD = {"chunked": True, "materialising": False}


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Set VmHWM back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(
    rank: int,
    method: str,
    tokens: int,
    hidden_size: int,
    vocabulary: int,
    backward: bool,
    repeats: int,
):
    """(seconds of each repetition, peak bytes, checksums) of one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    columns = -(-vocabulary // RANKS)
    shard = VocabularyShard.of(vocabulary, columns, rank, dist.group.WORLD)
    weight = torch.randn(columns, hidden_size, generator=torch.Generator().manual_seed(rank)).div_(
        hidden_size**0.5
    )
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    old = torch.full((tokens,), -math.log(vocabulary) - 0.5)
    weight.requires_grad_(backward)
    hidden.requires_grad_(backward)
    # A small call first: threads and libraries start before the clock does.
    small = hidden.detach()[:8].clone().requires_grad_(backward)
    _, loss = METHODS[method](small, weight, shard, targets[:8], old[:8], advantages[:8], backward)
    if backward:
        loss.backward()
    gradients = (weight.numel() + hidden.numel()) * 4 if backward else 0
    seconds, peak = [], 0
    for _ in range(repeats):
        loss = hidden.grad = weight.grad = None
        dist.barrier()
        before = resident("VmRSS")
        reset_peak()
        began = time.perf_counter()
        logprobs, loss = METHODS[method](hidden, weight, shard, targets, old, advantages, backward)
        in_forward = gradients * MAKES_GRADIENTS_IN_FORWARD[method]
        peak = max(peak, resident("VmHWM") - before - in_forward)
        if backward:
            reset_peak()
            loss.backward()
            peak = max(peak, resident("VmHWM") - before - gradients)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    sums = [logprobs.double().mean().item()]
    if backward:
        sums += [hidden.grad.double().norm().item(), weight.grad.double().norm().item()]
    dist.destroy_process_group()
    return seconds, peak, sums


def rank_main(port: int, rank: int, *arguments):
    os.environ |= rank_environment(rank, RANKS, port)
    return measure(rank, *arguments)


def case(
    method: str, tokens: int, hidden_size: int, vocabulary: int, backward: bool, repeats: int
) -> dict:
    """Run one case on all ranks. Seconds are the slowest rank's, memory the largest rank's."""
    arguments = (method, tokens, hidden_size, vocabulary, backward, repeats)
    port = free_port()
    with multiprocessing.get_context("spawn").Pool(RANKS) as pool:
        results = pool.starmap(
            rank_main, [(port, rank, *arguments) for rank in range(RANKS)], chunksize=1
        )
    slowest = [max(times) for times in zip(*(seconds for seconds, _, _ in results), strict=True)]
    return {
        "method": method,
        "tokens": tokens,
        "hidden": hidden_size,
        "backward": backward,
        "seconds": round(statistics.median(slowest), 3),
        "repetitions": [round(value, 3) for value in slowest],
        "memory_mib": round(max(peak for _, peak, _ in results) / MIB, 1),
        "sums": results[0][2],
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown"
    )


def computed_mib(tokens: int, vocabulary: int) -> float:
    """MiB of two fp32 tensors of all logits of a rank."""
    return 2 * 4 * tokens * -(-vocabulary // RANKS) / MIB


def table_row(chunked: dict, materialising: dict | None, vocabulary: int) -> str:
    """A line of the Markdown table; materialising: None where it does not fit into memory."""
    seconds, ratio = "-", "-"
    memory = f"{computed_mib(chunked['tokens'], vocabulary):.0f} (computed)"
    if materialising is not None:
        seconds, memory = f"{materialising['seconds']:.2f}", f"{materialising['memory_mib']:.0f}"
        ratio = f"{materialising['seconds'] / chunked['seconds']:.2f}"
    name = "forward+backward" if chunked["backward"] else "forward"
    cells = (
        chunked["tokens"],
        chunked["hidden"],
        name,
        f"{chunked['seconds']:.2f}",
        seconds,
        ratio,
    )
    cells = (*map(str, cells), f"{chunked['memory_mib']:.0f}", memory)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument(
        "--repeats", type=int, default=3, help="for 1024 tokens; fewer for more tokens, at least 1"
    )
    parser.add_argument("--results", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    if arguments.vocabulary % RANKS:
        parser.error(
            f"--vocabulary {arguments.vocabulary} is not a multiple of {RANKS}, which "
            "materialising needs"
        )
    import psutil

    half_mib, cases = psutil.virtual_memory().total / MIB / 2, []
    print(
        "| T | H | pass | chunked s | materialising s | ratio | chunked MiB | materialising MiB |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for hidden_size in arguments.hidden:
        for tokens in arguments.tokens:
            for backward in (False, True):
                repeats = max(1, arguments.repeats * 1024 // tokens)
                shape = (tokens, hidden_size, arguments.vocabulary, backward, repeats)
                chunked = case("chunked", *shape)
                cases.append(chunked)
                materialising = None
                if RANKS * computed_mib(tokens, arguments.vocabulary) < half_mib:
                    materialising = case("materialising", *shape)
                    for ours, theirs in zip(chunked["sums"], materialising["sums"], strict=True):
                        assert math.isclose(ours, theirs, rel_tol=1e-4), (chunked, materialising)
                    cases.append(materialising)
                print(table_row(chunked, materialising, arguments.vocabulary), flush=True)
    machine = {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "torch": torch.__version__,
    }
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "vocabulary": arguments.vocabulary,
        "cases": cases,
    }
    result |= {"ranks": RANKS, "chunk": CHUNK}
    if arguments.results is not None:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
