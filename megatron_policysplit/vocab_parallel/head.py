"""The LM head without its logits: statistics from hidden states, a chunk of tokens at a time.

Logits [chunk, V / TP] exist for one chunk at a time; for the tokens of a whole call only a few
floats each are held. `score` is forward only. `head_statistics` and `head_pair_statistics` are
differentiable: their backward makes the logits again, chunk by chunk. `fused_loss` (its own file)
needs no second pass. Every hidden state that is passed in costs its logits, so pass only those
whose statistics are used.
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
from megatron_policysplit.vocab_parallel.nucleus import Nucleus
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
    """What `score` returns, in nats."""

    logprobs: Tensor  # [T]
    entropy: Tensor  # [T]
    # KL(first || second) and KL(second || first) of each pair, [P] each; None without pairs.
    kl: tuple[Tensor, Tensor] | None = None
    nucleus: Nucleus | None = None  # of each token, if a nucleus was asked for


@torch.no_grad()
def score(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: Tensor,
    pairs: Pairs | None = None,
    nucleus: float | None = None,
) -> Scores:
    """Compute log-probs, entropies and the exact KL of pairs of tokens; forward only.

    Collectives over the tensor-parallel group: one all-gather for the whole call, and with a
    nucleus at least one more per chunk, or by kernels per tile of a chunk's rows. A token's bits
    depend on its chunk alone, not on pairs. Raises ValueError for a pair without a token of this
    call.

    hidden: [T, H].
    targets: [T] int64, global ids.
    temperature: [T].
    pairs: pairs of tokens whose KL is computed both ways.
    nucleus: probability mass of the nuclei whose thresholds and entropies are computed.
    """
    passing = chunk_pass(head, len(hidden))
    dtype = statistics_dtype(hidden)
    temperature = temperature.to(dtype)
    tokens = Tokens(targets, temperature)
    parts = [hidden.new_empty(4, len(hidden), dtype=dtype)]
    paired = None if pairs is None else _PairScores(head, hidden, temperature, pairs)
    if paired is not None:
        parts.append(paired.parts)
    nuclei = Nucleus(torch.empty_like(temperature), torch.empty_like(temperature))
    for span in head.chunks(len(hidden)):
        parts[0][:, span], logits = passing.reduce(hidden[span], tokens[span])
        if nucleus is not None:
            part = passing.find_nucleus(
                hidden[span], logits, parts[0][:, span], tokens[span], nucleus
            )
            nuclei.threshold[span], nuclei.entropy[span] = part.threshold, part.entropy
        # While the chunk's logits exist.
        if paired is not None:
            paired.reduce(passing, span, logits)
    gathered = Gathering(parts, head.shard).wait()
    merged = merge(gathered[0], temperature)
    kl = None if paired is None else paired.merge(gathered[1])
    return Scores(merged.logprobs, merged.entropy, kl, None if nucleus is None else nuclei)


class _PairScores:
    """The KL of the pairs of a call of `score`.

    `reduce` fills `parts` [6, P], in the plan's order, chunk by chunk; the caller gathers them from
    all ranks, and `merge` makes the KL of them.
    """

    def __init__(self, head: Head, hidden: Tensor, temperature: Tensor, pairs: Pairs):
        self._plan = PairPlan.of(pairs, len(hidden), head.chunk)
        self._hidden, self._earlier_hidden = hidden, pairs.hidden
        near, far = self._plan.near.to(hidden.device), self._plan.far.to(hidden.device)
        if pairs.temperature is not None:
            temperature = torch.cat([temperature, pairs.temperature.to(temperature.dtype)])
        self._near_temperature, self._far_temperature = temperature[near], temperature[far]
        self.parts = hidden.new_empty(6, len(near), dtype=temperature.dtype)

    def reduce(self, passing: ChunkPass, span: slice, logits: Tensor | None) -> None:
        """Reduce the pairs of the chunk at `span`; logits: [C, padded columns], None by kernels."""
        chunk, device = self._hidden[span], self._hidden.device
        for block in self._plan.blocks(span):
            temperature = self._near_temperature[block.pairs]
            near = States(chunk, temperature, block.near.to(device), logits)
            rows, temperature = block.far.to(device), self._far_temperature[block.pairs]
            if block.positions is None:
                far = States(chunk, temperature, rows, logits)
            else:
                # Far tokens outside of the chunk: their logits are made from their hidden states.
                far = States(self._hidden_at(block.positions), temperature, rows)
            self.parts[:, block.pairs] = passing.reduce_pair(near, far)

    def _hidden_at(self, positions: Tensor) -> Tensor:
        """Hidden states [F, H] at ascending positions: of this call first, then of earlier ones."""
        count = int(torch.searchsorted(positions, len(self._hidden)))
        current, earlier = (
            part.to(self._hidden.device) for part in positions.tensor_split([count])
        )
        if not len(earlier):
            return self._hidden[current]
        earlier = earlier - len(self._hidden)
        return torch.cat([self._hidden[current], self._earlier_hidden[earlier]])

    def merge(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """Merge [shards, 6, P] to KL(first || second) and KL(second || first), [P] each.

        The result is in the order of `Pairs`.
        """
        # From near (policy a) to far (b); near may be the first or the second of the pair.
        merged = merge_pair(gathered, self._near_temperature, self._far_temperature)
        swapped = self._plan.swapped.to(gathered.device)
        order = self._plan.order.to(gathered.device)
        kl_first, kl_second = torch.empty_like(merged.kl_ab), torch.empty_like(merged.kl_ab)
        kl_first[order] = torch.where(swapped, merged.kl_ba, merged.kl_ab)
        kl_second[order] = torch.where(swapped, merged.kl_ab, merged.kl_ba)
        return kl_first, kl_second


def head_statistics(
    head: Head, hidden: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the log-prob of the target and the entropy of every token, in nats: ([T], [T]).

    hidden [T, H]; targets [T] int64 global ids; temperature [T]. Differentiable in `hidden` and
    `head.weight`. Collectives over the tensor-parallel group: one all-gather in forward; one
    all-reduce in backward, of the gradient of `hidden`. Backward makes the logits again.
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
    """Compute statistics of two policies at the same tokens and their exact KL, [T] each, nats.

    hidden_* [T, H]; targets [T] int64 global ids; temperature_* [T]. Differentiable in both hidden
    states and in `head.weight`. Collectives over the tensor-parallel group: one all-gather in
    forward; one all-reduce in backward, of both gradients together. Backward makes the logits
    again.
    """
    return PairStatistics(
        *_HeadPairStatistics.apply(
            hidden_a, hidden_b, head.weight, targets, temperature_a, temperature_b, head
        )
    )


class _HeadStatistics(torch.autograd.Function):
    """Forward: one all-gather of floats per token. Backward: one all-reduce of [T, H]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, head):
        # A loss without the entropy then gives None for its derivative, which saves work.
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
        hidden, weight, targets, temperature, *statistics = ctx.saved_tensors
        head, tokens, merged = ctx.head, Tokens(targets, temperature), Merged(*statistics)
        if by_logprob is None:
            by_logprob = torch.zeros_like(merged.logprobs)
        slopes = Slopes(by_logprob, by_entropy)
        passing, total = chunk_pass(head, len(hidden)), WeightGradient(head, at_once=True)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for span in head.chunks(len(hidden)):
            grad = passing.gradient(hidden[span], None, tokens[span], merged[span], slopes[span])
            torch.mm(grad, weight, out=grad_hidden[span])
            total.add(grad, hidden[span])
        return head.sum_over_ranks(grad_hidden), total.deliver(), None, None, None


class _HeadPairStatistics(torch.autograd.Function):
    """Forward: one all-gather of floats per token. Backward: one all-reduce of [2, T, H]."""

    @staticmethod
    def forward(ctx, hidden_a, hidden_b, weight, targets, temperature_a, temperature_b, head):
        passing, dtype = chunk_pass(head, len(hidden_a)), statistics_dtype(hidden_a)
        a = States(hidden_a, temperature_a.to(dtype))
        b = States(hidden_b, temperature_b.to(dtype))
        parts = [hidden_a.new_empty(count, len(hidden_a), dtype=dtype) for count in (4, 4, 6)]
        for span in head.chunks(len(hidden_a)):
            for policy, part in zip((a, b), parts[:2], strict=True):
                tokens = Tokens(targets, policy.temperature)[span]
                part[:, span], _ = passing.reduce(policy.hidden[span], tokens)
            parts[2][:, span] = passing.reduce_pair(a[span], b[span])
        gathered_a, gathered_b, gathered_pair = Gathering(parts, head.shard).wait()
        merged_a, merged_b = merge(gathered_a, a.temperature), merge(gathered_b, b.temperature)
        pair = merge_pair(gathered_pair, a.temperature, b.temperature)
        ctx.head = head
        inputs = (hidden_a, hidden_b, weight, targets, a.temperature, b.temperature)
        saved = [value for merged in (merged_a, merged_b, pair) for value in vars(merged).values()]
        ctx.save_for_backward(*inputs, *saved)
        statistics = (merged_a.logprobs, merged_a.entropy, merged_b.logprobs, merged_b.entropy)
        return (*statistics, pair.kl_ab, pair.kl_ba)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob_a, by_entropy_a, by_logprob_b, by_entropy_b, by_kl_ab, by_kl_ba):
        hidden_a, hidden_b, weight, targets, t_a, t_b, *saved = ctx.saved_tensors
        merged_a, merged_b, pair = Merged(*saved[:4]), Merged(*saved[4:8]), MergedPair(*saved[8:])
        head = ctx.head
        tokens_a, tokens_b = Tokens(targets, t_a), Tokens(targets, t_b)
        slopes_a, slopes_b = Slopes(by_logprob_a, by_entropy_a), Slopes(by_logprob_b, by_entropy_b)
        total = WeightGradient(head, at_once=True)
        grad_hidden = torch.empty(2, *hidden_a.shape, dtype=hidden_a.dtype, device=hidden_a.device)
        for span in head.chunks(len(hidden_a)):
            shape = (2, span.stop - span.start, len(weight))
            logits = torch.empty(shape, dtype=t_a.dtype, device=weight.device)
            a = shard_logits(hidden_a[span], weight, logits[0], head.mixed_products)
            b = shard_logits(hidden_b[span], weight, logits[1], head.mixed_products)
            # Into new tensors: the KL's gradient needs the logits of both policies afterwards.
            grads = to_a, to_b = torch.empty_like(logits)
            logits_gradient(a, tokens_a[span], merged_a[span], slopes_a[span], head.shard, out=to_a)
            logits_gradient(b, tokens_b[span], merged_b[span], slopes_b[span], head.shard, out=to_b)
            kl = (pair[span], by_kl_ab[span], by_kl_ba[span])
            pair_gradient(a, b, t_a[span], t_b[span], *kl, head.shard, to_a, to_b)
            for out, hidden, grad in zip(grad_hidden, (hidden_a, hidden_b), grads, strict=True):
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=out[span])
                total.add(grad, hidden[span])
        to_hidden_a, to_hidden_b = head.sum_over_ranks(grad_hidden)
        return to_hidden_a, to_hidden_b, total.deliver(), None, None, None, None
