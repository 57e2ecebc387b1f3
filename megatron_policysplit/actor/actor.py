"""The actor: scores rows and trains on them, with Megatron-Core's schedules, DDP and optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_policysplit.actor.megatron_weights import load_megatron_weights
from megatron_policysplit.actor.microbatch import MicroBatch, make_microbatch
from megatron_policysplit.actor.model import build_model
from megatron_policysplit.actor.optimizer import PolicyOptimizer
from megatron_policysplit.actor.scoring import Scorer
from megatron_policysplit.actor.weights import load_weights
from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.algorithms.loss import LossInputs, LossOutputs, policy_loss
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.algorithms.signals import SignalBuilder, TrainSignal, token_weights
from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import temperatures_by_mode
from megatron_policysplit.distributed.device import (
    head_chunk_tokens,
    training_device,
    use_transformer_engine,
    use_triton,
)
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.rows import Row
from megatron_policysplit.rows.kl_pairs import pairings
from megatron_policysplit.rows.plan import Plan, make_plan
from megatron_policysplit.vocab_parallel import fused_loss

# Fields of TrainSignal that are constants of the loss; all but nucleus_threshold are LossInputs'.
CONSTANTS = (
    "old_logprobs",
    "advantages",
    "importance",
    "reference_logprobs",
    "scale",
    "entropy_coef",
    "drift_coef",
    "nucleus_coef",
    "nucleus_threshold",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class PlacedBatch:
    """A rollout batch in place: the plan (leaders only) and this replica's micro-batches per
    optimizer step.

    train, train_only, score_only, compared: as in `ReplicaMicroBatches`. unscored: response lengths
    of the rows that are not scored, by row index (leaders only).
    """

    plan: Plan | None
    train: list[list[MicroBatch]]
    train_only: list[list[MicroBatch]]
    score_only: list[list[MicroBatch]]
    compared: list[list[MicroBatch]]
    unscored: dict[int, int] = field(default_factory=dict)

    @property
    def trained(self) -> list[list[MicroBatch]]:
        """Micro-batches of each optimizer step."""
        return [scored + others for scored, others in zip(self.train, self.train_only, strict=True)]


@dataclass
class UpdateMetrics:
    """Of one rollout batch: means over its optimizer steps; ratio_off_one is max |ratio - 1| at the
    first.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    clip_fraction: float
    ratio_mean: float
    first_ratio_off_one: float
    bad_steps: int

    def named(self) -> dict[str, float]:
        """For the logs."""
        return {f"actor/{name}": float(value) for name, value in asdict(self).items()}


class Actor:
    """One replica's part of the policy on this rank. Every method is collective over all ranks."""

    def __init__(self, config: Config, hf_config: dict[str, Any], layout: Layout):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        self.config, self.hf_config, self.layout = config, hf_config, layout
        chosen = build_algorithm(config.algorithm)
        self.algorithm = chosen.config
        self.asked = {
            "prompts": chosen.method.prompt_logprobs,
            "nucleus": chosen.method.nucleus(chosen.options),
        }
        self.model = build_model(
            hf_config,
            dtype=DTYPES[config.model.dtype],
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            transformer_engine=use_transformer_engine(),
            sequence=layout.sequence,
        ).to(training_device(), DTYPES[config.model.dtype])
        if config.model.megatron is None:
            load_weights(self.model, config.model.path)
        else:
            load_megatron_weights(self.model, config.model.megatron)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=config.train.distributed_optimizer,
        )
        self.ddp = DistributedDataParallel(self.model.config, ddp, self.model)
        self.optimizer = PolicyOptimizer(self.ddp, config)
        self.model.config.finalize_model_grads_func = _sum_gradients
        chunk = config.train.head_chunk_tokens or head_chunk_tokens()
        triton = use_triton() and self.asked["nucleus"] is None
        self.head = self.model.head(chunk, triton) if layout.is_last_stage else None
        self.scorer = Scorer(self.ddp, self.model, self.head, layout)
        self.reference = None
        if config.algorithm.kl_coef > 0:
            self.reference = [parameter.detach().clone() for parameter in self.model.parameters()]

    def place(
        self,
        rows: Sequence[Row],
        live: Sequence[bool],
        seed: int,
        *,
        scored: Sequence[bool] | None = None,
        compared: Sequence[bool] | None = None,
        temperature: float | None = None,
    ) -> PlacedBatch:
        """Send every replica its rows. These and what is said of them are read on leaders, which
        hold the whole batch.

        scored: rows that are scored; None: all. compared: others that are scored for the comparison
        with the engine alone; None: none. temperature: of every row; None takes each row's from its
        mode.
        """
        plan, mine, unscored = None, None, {}
        if self.layout.is_leader:
            train = self.config.train
            plan = make_plan(
                rows,
                live,
                scored=scored,
                compared=compared,
                replicas=self.layout.data,
                expert=self.layout.expert,
                optimizer_steps=train.optimizer_steps_per_batch,
                max_tokens=train.max_tokens_per_micro_batch,
                seed=seed,
            )
            mine = self._microbatches(rows, plan, temperature)
            if scored is not None:
                unscored = {i: row.response_length for i, row in enumerate(rows) if not scored[i]}
        return PlacedBatch(plan, *self.layout.broadcast_from_leader(mine), unscored)

    def log_probs(self, placed: PlacedBatch) -> list[TokenStatistics]:
        """Statistics of every row of the batch before the update, on leaders in row order; []
        elsewhere.

        Those of rows that are not scored, and not compared either, are 0.
        """
        batches = [
            batch
            for step in (*placed.train, *placed.score_only, *placed.compared)
            for batch in step
        ]
        found = self._gather(self.scorer.log_probs(batches, **self.asked))
        for index, length in placed.unscored.items():
            there = found.get(index) or TokenStatistics(torch.zeros(length), torch.zeros(length))
            found[index] = replace(there, scored=False)
        return [found[index] for index in sorted(found)]

    def perturbed_log_probs(self, placed: PlacedBatch, relative: float) -> list[Tensor]:
        """Log-probs [T] of every row, on leaders, with each weight moved by up to `relative` times
        itself, at random.

        Rounding at a unit roundoff of `relative` moves them about as far. The weights are put back
        from host memory.
        """
        kept = [parameter.detach().to("cpu", copy=True) for parameter in self.model.parameters()]
        try:
            self._perturb(relative)
            return [row.logprobs for row in self.log_probs(placed)]
        finally:
            self._set_weights(kept)

    def reference_log_probs(self, placed: PlacedBatch) -> list[Tensor]:
        """Log-probs [T] of every row under the initial policy, on leaders; needs algorithm.kl_coef
        > 0.

        Those of rows that are neither trained nor scored are 0.
        """
        batches = [batch for step in (*placed.trained, *placed.score_only) for batch in step]
        current = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._set_weights(self.reference)
        try:
            found = {
                index: row.logprobs
                for index, row in self._gather(self.scorer.log_probs(batches)).items()
            }
        finally:
            self._set_weights(current)
        found = {index: torch.zeros(length) for index, length in placed.unscored.items()} | found
        return [found[index] for index in sorted(found)]

    def update(self, placed: PlacedBatch, signals: SignalBuilder | None) -> UpdateMetrics:
        """Train on the batch: `optimizer_steps_per_batch` steps. `signals` is read on leaders, None
        elsewhere.

        With algorithm.statistics=step each step but the first begins with scoring its rows again.
        """
        fresh = self.config.algorithm.statistics == "step"
        results, totals, first_off_one = [], [], 0.0
        for number, batches in enumerate(placed.trained):
            now = self._score_step(placed, number) if fresh and number > 0 else None
            inputs = (
                self._loss_inputs(placed, number, signals.at(number, now))
                if self.layout.is_leader
                else None
            )
            inputs = self.layout.broadcast_from_leader(inputs)
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            sums, off_one = self._sum_over_world(self._forward_backward(batches, inputs))
            results.append(self.optimizer.step(loss_is_finite=math.isfinite(sums[0])))
            totals.append(sums)
            if number == 0:
                first_off_one = off_one
        loss, ratio, clipped, tokens = torch.tensor(totals, dtype=torch.float64).sum(0).tolist()
        return UpdateMetrics(
            loss=loss / len(results),
            grad_norm=sum(result.grad_norm for result in results) / len(results),
            learning_rate=results[-1].learning_rate,
            clip_fraction=clipped / max(tokens, 1),
            ratio_mean=ratio / max(tokens, 1) if tokens else 1.0,
            first_ratio_off_one=first_off_one,
            bad_steps=sum(not result.stepped for result in results),
        )

    def _score_step(self, placed: PlacedBatch, number: int) -> dict[int, TokenStatistics]:
        """Statistics of the rows of one optimizer step by the weights as they are, on leaders; {}
        elsewhere.
        """
        batches = [*placed.train[number], *placed.score_only[number]]
        return self._gather(self.scorer.log_probs(batches, **self.asked))

    def _microbatches(self, rows: Sequence[Row], plan: Plan, temperature: float | None) -> tuple:
        temperatures = temperatures_by_mode(self.config)
        if temperature is not None:
            temperatures = dict.fromkeys(temperatures, temperature)
        own_steps = [step[self.layout.data_rank] for step in plan.micro_batches]
        multiple = self.layout.tensor if self.layout.sequence else 1
        wanted = pairings(rows, self.config.log.kl_tokens)
        make = partial(
            make_microbatch, rows, temperatures=temperatures, pairings=wanted, multiple=multiple
        )
        return tuple(
            [[make(indices) for indices in getattr(step, name)] for step in own_steps]
            for name in ("train", "train_only", "score_only", "compared")
        )

    def _gather(self, mine: dict[int, TokenStatistics]) -> dict[int, TokenStatistics]:
        """Row index -> statistics of all replicas' rows, in row order, on leaders; {} elsewhere."""
        everywhere: dict[int, TokenStatistics] = {}
        for part in self.layout.all_gather_leaders(mine):
            everywhere.update(part)
        return {index: everywhere[index] for index in sorted(everywhere)}

    def _loss_inputs(
        self, placed: PlacedBatch, number: int, signals: Sequence[TrainSignal]
    ) -> list[dict[str, Tensor]]:
        """Per micro-batch of an optimizer step, the constant fields of LossInputs, weights
        included.
        """
        aggregation, longest = (
            self.algorithm.loss_aggregation,
            self.config.rollout.max_response_tokens,
        )
        step = placed.plan.steps[number]
        weights = token_weights(signals, step, aggregation, longest)
        rows = sum(bool(signals[i].mask.any()) for i in step)
        names = [
            name
            for name in CONSTANTS
            if any(getattr(signal, name) is not None for signal in signals)
        ]
        inputs = []
        for batch in placed.trained[number]:
            fields = {
                name: _joined([getattr(signals[i], name) for i in batch.rows]) for name in names
            }
            if "nucleus_coef" in fields:
                fields["nucleus_coef"] = fields["nucleus_coef"] / max(rows, 1)
            inputs.append({**fields, "weights": _joined([weights[i] for i in batch.rows])})
        return inputs

    def _forward_backward(
        self, batches: list[MicroBatch], inputs: list[dict[str, Tensor]]
    ) -> Tensor:
        """Gradients of one optimizer step. Returns [loss, ratio sum, clipped, tokens, max |ratio -
        1|] (this rank).
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.train()
        if not batches:
            _sum_gradients([self.ddp])
            return torch.zeros(5, dtype=torch.float64)
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(zip(batches, inputs, strict=True)),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        if not self.layout.is_last_stage:
            return torch.zeros(5, dtype=torch.float64)
        stacked = torch.stack(outputs).cpu()
        return torch.cat([stacked[:, :4].sum(0), stacked[:, 4:].max(0).values])

    def _forward_step(self, iterator, model):
        batch, constants = next(iterator)
        return self.scorer.forward(model, batch), partial(self._loss, batch, constants)

    def _loss(self, batch: MicroBatch, constants: dict[str, Tensor], hidden: Tensor):
        device = hidden.device
        constants = {name: value.to(device) for name, value in constants.items()}
        thresholds = constants.pop("nucleus_threshold", None)
        chunks: list[LossOutputs] = []

        def token_loss(
            span: slice, logprobs: Tensor, entropy: Tensor, nucleus: Tensor | None = None
        ) -> Tensor:
            fields = {name: value[span] for name, value in constants.items()} | {
                "nucleus_entropy": nucleus
            }
            chunks.append(
                policy_loss(
                    LossInputs(logprobs=logprobs, entropy=entropy, **fields), self.algorithm
                )
            )
            return chunks[-1].loss

        targets, temperature = batch.targets.to(device), batch.temperature.to(device)
        selected = batch.select(self.model.whole(hidden))
        loss = fused_loss(self.head, selected, targets, temperature, token_loss, thresholds).loss
        if not batch.rows:
            token_loss(slice(0), temperature, temperature, temperature)
        out = LossOutputs.over(chunks)
        metrics = [loss.detach(), out.ratio_sum, out.clipped_tokens, out.tokens, out.ratio_off_one]
        return loss, out.tokens.int(), torch.stack([value.double() for value in metrics])

    def _sum_over_world(self, values: Tensor) -> tuple[list[float], float]:
        """Sum of the first four over replicas, max of the last, alike on every rank (one all-reduce
        each).
        """
        mine = values if self.layout.tensor_rank == 0 else torch.zeros_like(values)
        sums, largest = mine[:4].clone(), mine[4:].clone()
        torch.distributed.all_reduce(sums, group=self.layout.world)
        torch.distributed.all_reduce(
            largest, op=torch.distributed.ReduceOp.MAX, group=self.layout.world
        )
        return sums.tolist(), float(largest)

    @torch.no_grad()
    def _perturb(self, relative: float) -> None:
        for number, parameter in enumerate(self.model.parameters()):
            draw = torch.Generator(parameter.device).manual_seed(number)
            noise = torch.rand(parameter.shape, generator=draw, device=parameter.device)
            parameter.mul_(1 + relative * (2 * noise - 1))

    @torch.no_grad()
    def _set_weights(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(value)


def _sum_gradients(model, num_tokens=None, **kwargs):
    """Megatron's gradient reduction without its division by tokens: our losses are sums over global
    denominators.
    """
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model, None, **kwargs)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Values of the tokens of all rows, of which there may be none."""
    return torch.cat(rows) if rows else torch.empty(0)
