"""The LM head without its logits: statistics from hidden states, a chunk of tokens at a time.

Logits [chunk, V / TP] exist for one chunk; what is kept for the tokens of a whole call is a few
floats each. `score` is forward only. `head_statistics` and `head_pair_statistics` are
differentiable: their backward makes the logits again, chunk by chunk. `fused_loss` (its own file)
needs no second pass. Only rows that count should be passed in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_policysplit.vocab_parallel.chunk_pass import (
    ChunkPass,
    States,
    chunk_pass,
    shard_logits,
)
from megatron_policysplit.vocab_parallel.nucleus import Nucleus, find_nucleus
from megatron_policysplit.vocab_parallel.pairs import PairPlan, Pairs
from megatron_policysplit.vocab_parallel.reduction import (
    Merged,
    MergedPair,
    Slopes,
    Tokens,
    logits_gradient,
    merge,
    merge_pair,
    pair_gradient,
    statistics_dtype,
)
from megatron_policysplit.vocab_parallel.shard import Gathering, Head
from megatron_policysplit.vocab_parallel.statistics import PairStatistics
from megatron_policysplit.vocab_parallel.weight_gradient import WeightGradient


class Scores(NamedTuple):
    """logprobs, entropy [T]; kl: KL(first || second) and KL(second || first) of each pair, [P].
    Nats.

    nucleus: of each token, if it was asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    kl: tuple[Tensor, Tensor] | None = None
    nucleus: Nucleus | None = None


@torch.no_grad()
def score(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: Tensor,
    pairs: Pairs | None = None,
    nucleus: float | None = None,
) -> Scores:
    """Statistics of hidden [T, H] at targets [T] (int64, global ids) and temperature [T], and the
    exact KL of pairs.

    nucleus: probability mass of the nucleus whose threshold and entropy are wanted; in plain torch
    only. One all-gather for the whole call, with a nucleus one more a chunk, or more. A token's
    bits depend on its chunk alone, not on pairs. Raises ValueError for a nucleus from a head of
    Triton kernels, and for a pair without a token of this call.
    """
    if nucleus is not None:
        needs_logits(head)
    passing = chunk_pass(head, len(hidden))
    dtype = statistics_dtype(hidden)
    temperature = temperature.to(dtype)
    tokens = Tokens(targets, temperature)
    parts = [hidden.new_empty(4, len(hidden), dtype=dtype)]
    paired = None if pairs is None else _PairScores(head, hidden, temperature, pairs)
    if paired is not None:
        parts.append(paired.parts)
    inner = Nucleus(torch.empty_like(temperature), torch.empty_like(temperature))
    for span in head.chunks(len(hidden)):
        parts[0][:, span], logits = passing.reduce(hidden[span], tokens[span])
        if nucleus is not None:
            found = find_nucleus(logits, parts[0][:, span], temperature[span], head.shard, nucleus)
            inner.threshold[span], inner.entropy[span] = found.threshold, found.entropy
        if paired is not None:
            paired.reduce(passing, span, logits)
    gathered = Gathering(parts, head.shard).wait()
    merged = merge(gathered[0], temperature)
    kl = None if paired is None else paired.merge(gathered[1])
    return Scores(merged.logprobs, merged.entropy, kl, None if nucleus is None else inner)


class _PairScores:
    """The pairs of a call of `score`: parts [6, P], in the plan's order, to be gathered; then the
    KL both ways.
    """

    def __init__(self, head: Head, hidden: Tensor, temperature: Tensor, pairs: Pairs):
        self._plan, self._hidden, self._others = (
            PairPlan.of(pairs, len(hidden), head.chunk),
            hidden,
            pairs.hidden,
        )
        near, far = self._plan.near.to(hidden.device), self._plan.far.to(hidden.device)
        if pairs.temperature is not None:
            temperature = torch.cat([temperature, pairs.temperature.to(temperature.dtype)])
        self._near, self._far = temperature[near], temperature[far]
        self.parts = hidden.new_empty(6, len(near), dtype=temperature.dtype)

    def reduce(self, passing: ChunkPass, span: slice, logits: Tensor | None) -> None:
        """The pairs of the chunk at `span`, whose logits [C, padded columns] are there or not."""
        chunk, device = self._hidden[span], self._hidden.device
        for block in self._plan.blocks(span):
            near = States(chunk, self._near[block.pairs], block.near.to(device), logits)
            rows, temperature = block.far.to(device), self._far[block.pairs]
            if block.positions is None:
                far = States(chunk, temperature, rows, logits)
            else:
                far = States(self._states(block.positions), temperature, rows)
            self.parts[:, block.pairs] = passing.reduce_pair(near, far)

    def _states(self, positions: Tensor) -> Tensor:
        """Hidden states [F, H] at ascending positions, first those of this call."""
        own = int(torch.searchsorted(positions, len(self._hidden)))
        mine, others = (places.to(self._hidden.device) for places in positions.tensor_split([own]))
        if not len(others):
            return self._hidden[mine]
        return torch.cat([self._hidden[mine], self._others[others - len(self._hidden)]])

    def merge(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """[shards, 6, P] to KL(first || second) and KL(second || first), [P] each, in the order of
        `Pairs`.
        """
        both, swapped = (
            merge_pair(gathered, self._near, self._far),
            self._plan.swapped.to(gathered.device),
        )
        order = self._plan.order.to(gathered.device)
        there, back = torch.empty_like(both.kl_ab), torch.empty_like(both.kl_ab)
        there[order] = torch.where(swapped, both.kl_ba, both.kl_ab)
        back[order] = torch.where(swapped, both.kl_ab, both.kl_ba)
        return there, back


def needs_logits(head: Head) -> None:
    """Raises ValueError for a head whose kernels make none."""
    if head.triton:
        raise ValueError(
            "the nucleus is found in logits, which the Triton kernels of the LM head never hold"
        )


def head_statistics(
    head: Head, hidden: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-prob of the target and entropy, nats: ([T], [T]); differentiable in `hidden` [T, H] and
    `head.weight`.

    Forward: one all-gather. Backward makes the logits again; one all-reduce, of the gradient of
    `hidden`.
    """
    return _HeadStatistics.apply(hidden, head.weight, targets, temperature, head)


def head_pair_statistics(
    head: Head,
    hidden_a: Tensor,
    hidden_b: Tensor,
    targets: Tensor,
    temperature_a: Tensor,
    temperature_b: Tensor,
) -> PairStatistics:
    """Statistics of two policies at the same tokens and the exact KL between them, [T] each; all
    differentiable in both hidden states [T, H] and in `head.weight`.

    Forward: one all-gather. Backward makes the logits again; one all-reduce, of both gradients
    together.
    """
    return PairStatistics(
        *_HeadPairStatistics.apply(
            hidden_a, hidden_b, head.weight, targets, temperature_a, temperature_b, head
        )
    )


class _HeadStatistics(torch.autograd.Function):
    """Forward communicates once (all-gather of floats per token), backward once (all-reduce of [T,
    H]).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, head):
        ctx.set_materialize_grads(False)
        passing, dtype = chunk_pass(head, len(hidden)), statistics_dtype(hidden)
        tokens = Tokens(targets, temperature.to(dtype))
        parts = hidden.new_empty(4, len(hidden), dtype=dtype)
        for span in head.chunks(len(hidden)):
            parts[:, span], _ = passing.reduce(hidden[span], tokens[span])
        merged = merge(Gathering([parts], head.shard).wait()[0], tokens.temperature)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, *vars(tokens).values(), *vars(merged).values())
        return merged.logprobs, merged.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob, by_entropy):
        hidden, weight, targets, temperature, *kept = ctx.saved_tensors
        head, tokens, merged = ctx.head, Tokens(targets, temperature), Merged(*kept)
        slopes = Slopes(
            torch.zeros_like(merged.logprobs) if by_logprob is None else by_logprob, by_entropy
        )
        passing, total = chunk_pass(head, len(hidden)), WeightGradient(weight)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for span in head.chunks(len(hidden)):
            grad = passing.gradient(hidden[span], None, tokens[span], merged[span], slopes[span])
            torch.mm(grad, weight, out=grad_hidden[span])
            total.add(grad, hidden[span])
        return head.sum_over_ranks(grad_hidden), total.deliver(), None, None, None


class _HeadPairStatistics(torch.autograd.Function):
    """Forward communicates once (all-gather of floats per token), backward once (all-reduce of [2,
    T, H]).
    """

    @staticmethod
    def forward(ctx, hidden_a, hidden_b, weight, targets, temperature_a, temperature_b, head):
        passing, dtype = chunk_pass(head, len(hidden_a)), statistics_dtype(hidden_a)
        policies = a, b = (
            States(hidden_a, temperature_a.to(dtype)),
            States(hidden_b, temperature_b.to(dtype)),
        )
        parts = [hidden_a.new_empty(count, len(hidden_a), dtype=dtype) for count in (4, 4, 6)]
        for span in head.chunks(len(hidden_a)):
            for policy, part in zip(policies, parts[:2], strict=True):
                part[:, span], _ = passing.reduce(
                    policy.hidden[span], Tokens(targets, policy.temperature)[span]
                )
            parts[2][:, span] = passing.reduce_pair(a[span], b[span])
        gathered_a, gathered_b, gathered_pair = Gathering(parts, head.shard).wait()
        merged_a, merged_b = merge(gathered_a, a.temperature), merge(gathered_b, b.temperature)
        pair = merge_pair(gathered_pair, a.temperature, b.temperature)
        ctx.head = head
        kept = [value for merged in (merged_a, merged_b, pair) for value in vars(merged).values()]
        ctx.save_for_backward(
            hidden_a, hidden_b, weight, targets, a.temperature, b.temperature, *kept
        )
        own = (merged_a.logprobs, merged_a.entropy, merged_b.logprobs, merged_b.entropy)
        return (*own, pair.kl_ab, pair.kl_ba)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob_a, by_entropy_a, by_logprob_b, by_entropy_b, by_kl_ab, by_kl_ba):
        hidden_a, hidden_b, weight, targets, t_a, t_b, *kept = ctx.saved_tensors
        head, merged_a, merged_b, pair = (
            ctx.head,
            Merged(*kept[:4]),
            Merged(*kept[4:8]),
            MergedPair(*kept[8:]),
        )
        tokens_a, tokens_b = Tokens(targets, t_a), Tokens(targets, t_b)
        slopes_a, slopes_b = Slopes(by_logprob_a, by_entropy_a), Slopes(by_logprob_b, by_entropy_b)
        total = WeightGradient(weight)
        grad_hidden = torch.empty(2, *hidden_a.shape, dtype=hidden_a.dtype, device=hidden_a.device)
        for span in head.chunks(len(hidden_a)):
            shape = (2, span.stop - span.start, len(weight))
            logits = torch.empty(shape, dtype=t_a.dtype, device=weight.device)
            a, b = (
                shard_logits(hidden_a[span], weight, logits[0]),
                shard_logits(hidden_b[span], weight, logits[1]),
            )
            grads = to_a, to_b = torch.empty_like(logits)
            logits_gradient(a, tokens_a[span], merged_a[span], slopes_a[span], head.shard, out=to_a)
            logits_gradient(b, tokens_b[span], merged_b[span], slopes_b[span], head.shard, out=to_b)
            kl = (pair[span], by_kl_ab[span], by_kl_ba[span])
            pair_gradient(a, b, t_a[span], t_b[span], *kl, head.shard, to_a, to_b)
            for own, hidden, grad in zip(grad_hidden, (hidden_a, hidden_b), grads, strict=True):
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=own[span])
                total.add(grad, hidden[span])
        to_hidden_a, to_hidden_b = head.sum_over_ranks(grad_hidden)
        return to_hidden_a, to_hidden_b, total.deliver(), None, None, None, None
