"""Forward-only statistics of rows: log-prob, exact entropy, and the exact KL between a response's
prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.actor.microbatch import MicroBatch
from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.vocab_parallel import Head, Pairs, score


@dataclass
class _Seen:
    """A row that has to meet others of its rollout. missing: how many of them have not come yet.
    start: its first token in the call of the head. hidden [T, H], temperature [T]: once it waits
    for a later micro-batch.
    """

    row: int
    mode: str
    hub: bool
    missing: int
    start: int
    length: int
    hidden: Tensor | None = None
    temperature: Tensor | None = None


class Scorer:
    """Runs the pipeline forward over micro-batches. Moves no RNG, keeps no graph.

    For a row whose KL is wanted, the response's hidden states [T, H] wait on the last stage until
    the forward passes of those that it is compared with have run; they meet at the same response
    tokens. The plan puts the rows of a rollout next to each other, so few wait at a time.
    """

    def __init__(
        self, ddp: torch.nn.Module, model: torch.nn.Module, head: Head | None, layout: Layout
    ):
        self.ddp, self.model, self.head, self.layout = ddp, model, head, layout

    @torch.no_grad()
    def log_probs(
        self, batches: Sequence[MicroBatch], *, prompts: bool = False, nucleus: float | None = None
    ) -> dict[int, TokenStatistics]:
        """Row index -> statistics (CPU) on the last pipeline stage; {} on other stages.

        prompts: take the prompts' mean log-probs too, by one more pass of the head over their
        tokens. nucleus: take the thresholds and entropies of nuclei of this mass too.

        Collective over the replica's ranks, which all pass the same micro-batches, and over the
        replicas that share experts with it, which pass as many.
        """
        if not batches:
            return {}
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.eval()
        results: dict[int, TokenStatistics] = {}
        waiting: dict[int, list[_Seen]] = {}  # by rollout

        def step(iterator, model):
            batch = next(iterator)

            def collect(hidden: Tensor, non_loss_data: bool):
                if batch.rows:
                    hidden = self.model.whole(hidden)
                    self._collect(batch, hidden, results, waiting, nucleus)
                    if prompts:
                        self._collect_prompts(batch, hidden, results)

            return self.forward(model, batch), collect

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if waiting:
            alone = sorted(seen.row for rows in waiting.values() for seen in rows)
            raise RuntimeError(f"rows {alone} were scored without their partners")
        return results

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> Tensor:
        """Hidden states [S, B, H] of this pipeline stage. Causal attention needs no mask: padding
        is on the right.
        """
        device = next(self.model.parameters()).device
        return model(
            input_ids=batch.tokens.to(device),
            position_ids=batch.position_ids.to(device),
            attention_mask=None,
        )

    def _collect(
        self, batch: MicroBatch, hidden: Tensor, results: dict, waiting: dict, nucleus: float | None
    ) -> None:
        device = hidden.device
        selected, temperature = batch.select(hidden), batch.temperature.to(device)
        met = _meet(batch, waiting)
        pairs = _pairs(met, len(selected)) if met else None
        scores = score(self.head, selected, batch.targets.to(device), temperature, pairs, nucleus)
        per_token = [scores.logprobs, scores.entropy]
        if scores.nucleus is not None:
            per_token += [scores.nucleus.entropy, scores.nucleus.threshold]
        per_token, kl = _to_host(per_token, scores.kl or ())
        logprobs, entropy, *found = (values.split(batch.lengths) for values in per_token)
        for b, row in enumerate(batch.rows):
            results[row] = TokenStatistics(logprobs[b].clone(), entropy[b].clone())
            if found:
                results[row].nucleus_entropy, results[row].nucleus_threshold = (
                    part[b].clone() for part in found
                )
        if met:
            there, back = (values.split([one.length for one, _ in met]) for values in kl)
            for (one, other), ours, theirs in zip(met, there, back, strict=True):
                results[one.row].kl[other.mode] = ours.clone()
                results[other.row].kl[one.mode] = theirs.clone()
        for seen in (seen for rows in waiting.values() for seen in rows if seen.hidden is None):
            span = slice(seen.start, seen.start + seen.length)
            seen.hidden, seen.temperature = selected[span].clone(), temperature[span].clone()

    def _collect_prompts(self, batch: MicroBatch, hidden: Tensor, results: dict) -> None:
        """A call of the head of its own: the chunks of responses, and so their bits, stay those of
        training.
        """
        counts = [length - 1 for length in batch.prompt_lengths]
        first = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
        temperature = (
            batch.temperature[first].repeat_interleave(torch.tensor(counts)).to(hidden.device)
        )
        targets = batch.prompt_targets.to(hidden.device)
        logprobs = score(
            self.head, batch.select_prompts(hidden), targets, temperature
        ).logprobs.cpu()
        for row, part in zip(batch.rows, logprobs.split(counts), strict=True):
            results[row].prompt_logprob = float(part.mean()) if len(part) else 0.0


def _meet(batch: MicroBatch, waiting: dict[int, list[_Seen]]) -> list[tuple[_Seen, _Seen]]:
    """The pairs, hub with other, whose later row is in `batch`, that row first. Brings `waiting` up
    to date.
    """
    met, start = [], 0
    for row, length, mode, pairing in zip(
        batch.rows, batch.lengths, batch.training_modes, batch.pairings, strict=True
    ):
        if pairing is not None:
            this = _Seen(row, mode, pairing.hub, pairing.pairs, start, length)
            before = waiting.pop(pairing.rollout, [])
            for other in before:
                if other.hub != this.hub:
                    met.append((this, other))
                    this.missing -= 1
                    other.missing -= 1
            if missing := [seen for seen in (*before, this) if seen.missing]:
                waiting[pairing.rollout] = missing
        start += length
    return met


def _pairs(met: list[tuple[_Seen, _Seen]], tokens: int) -> Pairs:
    """The tokens of rows that meet, those from earlier micro-batches placed behind the `tokens` of
    this one.
    """
    earlier = list({other.row: other for _, other in met if other.hidden is not None}.values())
    for seen in earlier:
        seen.start, tokens = tokens, tokens + seen.length
    lengths = torch.tensor([one.length for one, _ in met])
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(
        lengths
    )
    first, second = (
        torch.tensor([seen.start for seen in side]).repeat_interleave(lengths) + within
        for side in zip(*met, strict=True)
    )
    if not earlier:
        return Pairs(first, second)
    return Pairs(
        first,
        second,
        *(torch.cat([getattr(s, of) for s in earlier]) for of in ("hidden", "temperature")),
    )


def _to_host(*groups: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Tensors of one dimension and dtype, moved in one transfer, in their groups."""
    flat = torch.cat([values for group in groups for values in group]).cpu()
    pieces = iter(flat.split([len(values) for group in groups for values in group]))
    return [tuple(next(pieces) for _ in group) for group in groups]
