"""Seeded sampling for the `local` engine, inside transformers' greedy generation.

transformers' own sampling draws from one generator for the whole batch, so that a response would
depend on what else is in the batch. Here every row has its own uniforms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LogitsProcessor, StoppingCriteria

# Logits sampled at a time: their float64 copies stay in the processor's cache.
BLOCK_ELEMENTS = 2**20


class SeededSampler(LogitsProcessor):
    """Samples a token for every row and leaves it as the only finite score, for greedy search.

    Token t of row i is the inverse CDF, in vocabulary order and float64, at `uniforms[i, t]`, so it
    depends on the row's seed and logits only. Filters act on the tempered distribution by its
    unfiltered mass: the top_k most likely tokens, and of them those before which less than top_p
    has accumulated.

    Fills `tokens` [B, max_tokens] long and `logprobs` [B, max_tokens] float32: log_softmax(logits /
    temperature) of the chosen token over the unfiltered vocabulary, nats.
    """

    def __init__(
        self,
        uniforms: torch.Tensor,
        temperature: torch.Tensor,
        top_p: torch.Tensor,
        top_k: torch.Tensor,
        vocab: int,
    ):
        """Prepare for B rows of at most max_tokens tokens.

        uniforms: [B, max_tokens] float64 in [0, 1).
        temperature, top_p: [B] float64.
        top_k: [B] long; `vocab` or more keeps all.
        vocab: V, the number of logits of a row.
        """
        self.uniforms, self.temperature = uniforms, temperature
        self.top_p, self.top_k = top_p, top_k
        self.tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=uniforms.device)
        self.logprobs = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)
        self.step = 0
        height = max(1, BLOCK_ELEMENTS // vocab)
        self.blocks = [slice(first, first + height) for first in range(0, len(uniforms), height)]
        # Computed once, not at every step: which rows of each block have a filter.
        has_filter = (top_p < 1) | (top_k < vocab)
        self.filtered_rows = [has_filter[rows].nonzero()[:, 0] for rows in self.blocks]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take the logits [B, V] of the next token and return them with one finite entry a row."""
        for rows, filtered in zip(self.blocks, self.filtered_rows, strict=True):
            self._sample(scores[rows], rows, filtered)
        tokens = self.tokens[:, self.step, None]
        self.step += 1
        return scores.fill_(-torch.inf).scatter_(1, tokens, 0.0)

    def _sample(self, scores: torch.Tensor, rows: slice, filtered: torch.Tensor) -> None:
        """Sample one block. filtered: the numbers, within the block, of its rows with a filter."""
        temperature = self.temperature[rows, None]
        weights = scores.double().div_(temperature)
        peak = weights.amax(dim=1, keepdim=True)
        weights.sub_(peak).exp_()
        # Before the filters: log-probs are those of the unfiltered distribution.
        log_total = weights.sum(dim=1, keepdim=True).log_()
        if len(filtered):
            weights[filtered] = self._filter(
                weights[filtered], self.top_p[rows][filtered], self.top_k[rows][filtered]
            )
        cdf = weights.cumsum_(dim=1)
        # The uniform is scaled by the mass that is left, instead of the CDF divided by it.
        total = cdf[:, -1:].contiguous()
        token = torch.searchsorted(cdf, self.uniforms[rows, self.step, None] * total, right=True)
        # Where rounding puts the target on the total itself, the last token with mass is meant.
        token = torch.minimum(token, torch.searchsorted(cdf, total))
        # NaN logits compare with nothing, and the index would be V; the caller finds them.
        token.clamp_(max=scores.shape[1] - 1)
        logprob = scores.gather(1, token) / temperature - peak - log_total
        self.tokens[rows, self.step] = token[:, 0]
        self.logprobs[rows, self.step] = logprob[:, 0].float()

    @staticmethod
    def _filter(weights: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        """The weights with 0 for tokens outside top_k or top_p; ties go to the lower id."""
        descending, order = weights.sort(dim=1, descending=True, stable=True)
        mass_before = descending.cumsum(dim=1) - descending
        rank = torch.arange(weights.shape[1], device=weights.device)
        mass_limit = top_p[:, None] * weights.sum(dim=1, keepdim=True)
        is_retained = (rank < top_k[:, None]) & (mass_before < mass_limit)
        return torch.zeros_like(weights).scatter_(1, order, descending * is_retained)


class Finish(StoppingCriteria):
    """Ends a row at a stop token or its own max_tokens, and every row when it is interrupted."""

    def __init__(
        self,
        sampler: SeededSampler,
        is_stop: torch.Tensor,
        limits: torch.Tensor,
        is_interrupted: Callable[[], bool],
    ):
        """Watch the rows of `sampler`.

        is_stop: [V] bool, by token id.
        limits: [B] long, max_tokens of each row.
        is_interrupted: asked after every token.
        """
        self.sampler, self.is_stop = sampler, is_stop
        self.limits, self.is_interrupted = limits, is_interrupted
        self.lengths = torch.zeros_like(limits)  # 0 while the row is unfinished

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Whether each row has ended, [B] bool; notes in `lengths` at how many tokens."""
        step = self.sampler.step
        ends = self.is_stop[self.sampler.tokens[:, step - 1]] | (self.limits <= step)
        self.lengths = torch.where((self.lengths == 0) & ends, step, self.lengths)
        return torch.ones_like(ends) if self.is_interrupted() else self.lengths > 0
