"""Forward-only statistics of rows: log-prob, exact entropy, and the exact KL between a response's two prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.actor.microbatch import MicroBatch
from megatron_policysplit.actor.parallel import Layout
from megatron_policysplit.advantages import TokenStatistics
from megatron_policysplit.vocab_parallel import Head, Partner, score


@dataclass
class _Waiting:
    """A row whose partner has not been scored yet: its hidden states [T, H] and temperature [T]."""

    row: int
    hidden: Tensor
    temperature: Tensor


class Scorer:
    """Runs the pipeline forward over micro-batches. Moves no RNG, keeps no graph.

    For a row whose KL is wanted, the response's hidden states [T, H] wait on the last stage until its
    partner's forward pass has run; both then meet at the same response tokens. The plan puts partners
    next to each other, so few wait at a time.
    """

    def __init__(self, ddp: torch.nn.Module, model: torch.nn.Module, head: Head | None, layout: Layout):
        self.ddp, self.model, self.head, self.layout = ddp, model, head, layout

    @torch.no_grad()
    def score(
        self, batches: Sequence[MicroBatch], *, prompts: bool = False, nucleus: float | None = None
    ) -> dict[int, TokenStatistics]:
        """Row index -> statistics (CPU) on the last pipeline stage; {} on other stages.

        prompts: take the prompts' mean log-probs too, by one more pass of the head over their tokens. nucleus: take the
        thresholds and entropies of nuclei of this mass too.

        Collective over the replica's ranks, which all pass the same micro-batches, and over the replicas that share
        experts with it, which pass as many.
        """
        if not batches:
            return {}
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.eval()
        results: dict[int, TokenStatistics] = {}
        waiting: dict[int, _Waiting] = {}

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
            alone = sorted(partner.row for partner in waiting.values())
            raise RuntimeError(f"rows {alone} were scored without their partner")
        return results

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> Tensor:
        """Hidden states [S, B, H] of this pipeline stage. Causal attention needs no mask: padding is on the right."""
        device = next(self.model.parameters()).device
        return model(input_ids=batch.tokens.to(device), position_ids=batch.position_ids.to(device), attention_mask=None)

    def _collect(self, batch: MicroBatch, hidden: Tensor, results: dict, waiting: dict, nucleus: float | None) -> None:
        device = hidden.device
        selected, temperature = batch.select(hidden), batch.temperature.to(device)
        met: list[tuple[int, _Waiting]] = []
        partners, spans, start = [], {}, 0
        for row, length, pair in zip(batch.rows, batch.lengths, batch.pair_of, strict=True):
            span = spans[row] = slice(start, start + length)
            start += length
            if pair in waiting:
                partner = waiting.pop(pair)
                met.append((row, partner))
                partners.append(Partner(span.start, partner.hidden, partner.temperature))
            elif pair >= 0:
                waiting[pair] = _Waiting(row, selected[span].clone(), temperature[span])
        scores = score(self.head, selected, batch.targets.to(device), temperature, partners, nucleus)
        for row, span in spans.items():
            results[row] = TokenStatistics(scores.logprobs[span].cpu(), scores.entropy[span].cpu())
            if scores.nucleus is not None:
                results[row].nucleus_entropy = scores.nucleus.entropy[span].cpu()
                results[row].nucleus_threshold = scores.nucleus.threshold[span].cpu()
        for (row, partner), (own, theirs) in zip(met, scores.kl, strict=True):
            results[row].kl, results[partner.row].kl = own.cpu(), theirs.cpu()

    def _collect_prompts(self, batch: MicroBatch, hidden: Tensor, results: dict) -> None:
        """A call of the head of its own: the chunks of responses, and so their bits, stay those of training."""
        counts = [length - 1 for length in batch.prompt_lengths]
        first = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
        temperature = batch.temperature[first].repeat_interleave(torch.tensor(counts)).to(hidden.device)
        targets = batch.prompt_targets.to(hidden.device)
        logprobs = score(self.head, batch.select_prompts(hidden), targets, temperature).logprobs.cpu()
        for row, part in zip(batch.rows, logprobs.split(counts), strict=True):
            results[row].prompt_logprob = float(part.mean()) if len(part) else 0.0
