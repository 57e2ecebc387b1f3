"""Forward-only statistics of rows: log-prob, exact entropy, and KL between a response's prompts."""

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
class _PairedRow:
    """A row whose KL to other rows of its rollout is computed.

    One row of a rollout is the hub: each of the others is compared with it, and with no other.
    """

    index: int  # of the row in the batch
    mode: str
    is_hub: bool
    missing: int  # partners whose forward pass has not run yet
    start: int  # position of its first token in the present call of the head
    length: int  # response tokens
    # Response tokens' hidden states [T, H] and temperature [T], only while it waits for partners in
    # later micro-batches.
    hidden: Tensor | None = None
    temperature: Tensor | None = None


class Scorer:
    """Runs the pipeline forward over micro-batches. Moves no RNG, keeps no graph.

    The KL of two rows of a rollout compares them at the same response tokens, so it needs the
    hidden states of both. Where a row's partners are in later micro-batches, its response's hidden
    states [T, H] wait on the last stage until the forward passes of all partners have run: hidden
    states are small, logits [T, V] would be far too large to hold. The plan puts the rows of a
    rollout next to each other, so few wait at a time.
    """

    def __init__(
        self, ddp: torch.nn.Module, model: torch.nn.Module, head: Head | None, layout: Layout
    ):
        self.ddp, self.model, self.head, self.layout = ddp, model, head, layout

    @torch.no_grad()
    def log_probs(
        self, batches: Sequence[MicroBatch], *, prompts: bool = False, nucleus: float | None = None
    ) -> dict[int, TokenStatistics]:
        """Compute statistics of rows: row index -> statistics (CPU) on the last pipeline stage.

        Returns {} on other stages. Collective over the replica's ranks, which all pass the same
        micro-batches, and over the replicas that share experts with it, which pass as many. Raises
        RuntimeError if a row's partners are not among the rows.

        prompts: compute the prompts' mean log-probs too, by one more pass of the head over their
            tokens.
        nucleus: compute the thresholds and entropies of nuclei of this probability mass too.
        """
        if not batches:
            return {}
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # The mode of training: kernels that are chosen by the mode are then the same, and with them
        # the bits of old and new log-probs. There is no dropout, and nothing else depends on it.
        self.ddp.train()
        results: dict[int, TokenStatistics] = {}
        waiting: dict[int, list[_PairedRow]] = {}  # rows with partners to come, by rollout

        def step(iterator, model):
            batch = next(iterator)

            def collect(hidden: Tensor, non_loss_data: bool):
                # An empty micro-batch runs only because other replicas wait for its forward pass.
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
            unpaired = sorted(paired.index for rows in waiting.values() for paired in rows)
            raise RuntimeError(f"rows {unpaired} were scored without their partners")
        return results

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> Tensor:
        """Run the model on a micro-batch: hidden states [S, B, H] of this pipeline stage."""
        device = next(self.model.parameters()).device
        return model(
            input_ids=batch.tokens.to(device),
            position_ids=batch.position_ids.to(device),
            attention_mask=None,  # padding is on the right, where causal attention does not look
        )

    def _collect(
        self, batch: MicroBatch, hidden: Tensor, results: dict, waiting: dict, nucleus: float | None
    ) -> None:
        """Put the statistics of a micro-batch into `results`.

        hidden: [S, B, H] of the last stage. waiting: rows whose partners are yet to come; updated.
        """
        device = hidden.device
        selected, temperature = batch.select(hidden), batch.temperature.to(device)
        completed = _complete_pairs(batch, waiting)
        pairs = _token_pairs(completed, len(selected)) if completed else None
        # The head sees the tokens that it sees in training and in the same order, so its chunks are
        # the same too. Old and new log-probs then have equal bits as long as the weights are equal:
        # the first ratio is exactly 1. Pairs change no bit of the log-probs.
        scores = score(self.head, selected, batch.targets.to(device), temperature, pairs, nucleus)
        per_token = [scores.logprobs, scores.entropy]
        if scores.nucleus is not None:
            per_token += [scores.nucleus.entropy, scores.nucleus.threshold]
        per_token, kl = _to_host(per_token, scores.kl or ())
        logprobs, entropy, *nucleus_parts = (values.split(batch.lengths) for values in per_token)
        # Clones everywhere: a view would keep the tensor of the whole micro-batch alive.
        for b, index in enumerate(batch.rows):
            statistics = TokenStatistics(logprobs[b].clone(), entropy[b].clone())
            if nucleus_parts:
                statistics.nucleus_entropy, statistics.nucleus_threshold = (
                    part[b].clone() for part in nucleus_parts
                )
            results[index] = statistics
        if completed:
            lengths = [row.length for row, _ in completed]
            kl_to_partner, kl_from_partner = (values.split(lengths) for values in kl)
            for number, (row, partner) in enumerate(completed):
                results[row.index].kl[partner.mode] = kl_to_partner[number].clone()
                results[partner.index].kl[row.mode] = kl_from_partner[number].clone()
        # What still waits and has no copy of its hidden states yet is of this micro-batch.
        for row in (row for rows in waiting.values() for row in rows if row.hidden is None):
            span = slice(row.start, row.start + row.length)
            row.hidden, row.temperature = selected[span].clone(), temperature[span].clone()

    def _collect_prompts(self, batch: MicroBatch, hidden: Tensor, results: dict) -> None:
        """Put the mean log-probs of the prompts of a micro-batch into `results`.

        Prompts get a call of the head of their own. Among the responses' tokens they would change
        the responses' chunks, and with them the bits that must be those of training.
        """
        counts = [length - 1 for length in batch.prompt_lengths]
        # A row's temperature is that of its first response token.
        first = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
        temperature = batch.temperature[first].repeat_interleave(torch.tensor(counts))
        selected, targets = batch.select_prompts(hidden), batch.prompt_targets
        scores = score(
            self.head, selected, targets.to(hidden.device), temperature.to(hidden.device)
        )
        logprobs = scores.logprobs.cpu()
        for row, part in zip(batch.rows, logprobs.split(counts), strict=True):
            results[row].prompt_logprob = float(part.mean()) if len(part) else 0.0


def _complete_pairs(
    batch: MicroBatch, waiting: dict[int, list[_PairedRow]]
) -> list[tuple[_PairedRow, _PairedRow]]:
    """The pairs of rows that become complete with `batch`, the later row of each first.

    Brings `waiting` up to date: rows without missing partners leave, rows of `batch` that have some
    enter.
    """
    completed, start = [], 0
    for index, length, mode, pairing in zip(
        batch.rows, batch.lengths, batch.training_modes, batch.pairings, strict=True
    ):
        if pairing is not None:
            row = _PairedRow(index, mode, pairing.hub, pairing.pairs, start, length)
            earlier = waiting.pop(pairing.rollout, [])
            for partner in earlier:
                # A pair is the hub and another row; the hub may come first, last or in between.
                if partner.is_hub != row.is_hub:
                    completed.append((row, partner))
                    row.missing -= 1
                    partner.missing -= 1
            if incomplete := [paired for paired in (*earlier, row) if paired.missing]:
                waiting[pairing.rollout] = incomplete
        start += length
    return completed


def _token_pairs(completed: list[tuple[_PairedRow, _PairedRow]], tokens: int) -> Pairs:
    """The pairs of tokens of pairs of rows: the i-th response token of one with that of the other.

    Tokens of earlier micro-batches get positions behind the `tokens` of this one.
    """
    # By row, because a hub from an earlier micro-batch may be in several pairs.
    earlier = {partner.index: partner for _, partner in completed if partner.hidden is not None}
    for partner in earlier.values():
        partner.start, tokens = tokens, tokens + partner.length
    lengths = torch.tensor([row.length for row, _ in completed])
    # 0, 1, 2, ... within each pair of rows.
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    first, second = (
        torch.tensor([paired.start for paired in side]).repeat_interleave(lengths) + within
        for side in zip(*completed, strict=True)
    )
    if not earlier:
        return Pairs(first, second)
    hidden = torch.cat([partner.hidden for partner in earlier.values()])
    temperature = torch.cat([partner.temperature for partner in earlier.values()])
    return Pairs(first, second, hidden, temperature)


def _to_host(*groups: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Move tensors of one dimension and dtype to the CPU in one transfer; grouped as they came."""
    flat = torch.cat([values for group in groups for values in group]).cpu()
    pieces = iter(flat.split([len(values) for group in groups for values in group]))
    return [tuple(next(pieces) for _ in group) for group in groups]
