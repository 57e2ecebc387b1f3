"""The actor: scores rows and trains on them, with Megatron-Core's schedules, DDP and optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_policysplit.actor.layers import agree_on_layers
from megatron_policysplit.actor.megatron_weights import load_megatron_weights
from megatron_policysplit.actor.microbatch import MicroBatch
from megatron_policysplit.actor.model import build_model
from megatron_policysplit.actor.optimizer import PolicyOptimizer, StepResult
from megatron_policysplit.actor.placed_batch import PlacedBatch, place_batch
from megatron_policysplit.actor.reference import ReferenceWeights
from megatron_policysplit.actor.scoring import Scorer
from megatron_policysplit.actor.weights import load_weights
from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.algorithms.loss import LossMetrics, PolicyTokens, policy_loss
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.algorithms.token_signals import TokenSignals
from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import temperatures_by_mode
from megatron_policysplit.distributed.device import (
    deterministic_only,
    head_chunk_tokens,
    mixed_products,
    tile_elements,
    training_device,
    use_triton,
)
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.rows import Row
from megatron_policysplit.vocab_parallel import fused_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StepUpdate:
    """What became of one optimizer step, alike on every rank."""

    metrics: LossMetrics  # over the tokens of all replicas
    result: StepResult


@dataclass
class UpdateMetrics:
    """What is logged of the optimizer steps of a rollout batch: means over them, unless said."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float  # of the last step
    clip_fraction: float  # of the trained tokens
    ratio_mean: float  # over the trained tokens
    first_ratio_off_one: float  # the largest |ratio - 1| at the first step
    bad_steps: int  # steps that were skipped because something was not finite

    @classmethod
    def over(cls, steps: Sequence[StepUpdate]) -> UpdateMetrics:
        """The metrics of a batch from those of its optimizer steps, in order."""
        total = LossMetrics.of_vectors([step.metrics.vector() for step in steps])
        tokens = float(total.tokens)
        return cls(
            loss=float(total.loss) / len(steps),
            grad_norm=sum(step.result.grad_norm for step in steps) / len(steps),
            learning_rate=steps[-1].result.learning_rate,
            clip_fraction=float(total.clipped_tokens) / max(tokens, 1),
            ratio_mean=float(total.ratio_sum) / max(tokens, 1) if tokens else 1.0,
            first_ratio_off_one=float(steps[0].metrics.ratio_off_one),
            bad_steps=sum(not step.result.stepped for step in steps),
        )

    def named(self) -> dict[str, float]:
        """The metrics by the names that logs have them under."""
        return {f"actor/{name}": float(value) for name, value in asdict(self).items()}


class Actor:
    """One replica's part of the policy on this rank. Every method is collective over all ranks."""

    def __init__(self, config: Config, hf_config: dict[str, Any], layout: Layout):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        self.config, self.hf_config, self.layout = config, hf_config, layout
        algorithm = build_algorithm(config.algorithm)
        self.loss_config = algorithm.config
        self.nucleus_mass = algorithm.method.nucleus(algorithm.options)
        self._statistics = {
            "prompts": algorithm.method.prompt_logprobs,
            "nucleus": self.nucleus_mass,
        }
        self.layers = agree_on_layers(config.model.layers, layout)
        self.model = build_model(
            hf_config,
            dtype=DTYPES[config.model.dtype],
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            transformer_engine=self.layers.transformer_engine,
            sequence=layout.sequence,
            deterministic=config.train.deterministic,
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
        self.optimizer = PolicyOptimizer(self.ddp, config.train, DTYPES[config.model.dtype])
        self.model.config.finalize_model_grads_func = _sum_gradients
        chunk = config.train.head_chunk_tokens or head_chunk_tokens()
        self.head = None
        if layout.is_last_stage:
            self.head = self.model.head(
                chunk,
                triton=use_triton(),
                mixed_products=mixed_products(),
                tile_elements=tile_elements(),
            )
        self.scorer = Scorer(self.ddp, self.model, self.head, layout)
        # Before a checkpoint is loaded: a resumed run has the same reference as it had at first.
        self.reference = ReferenceWeights(self.model) if config.algorithm.kl_coef > 0 else None

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
        """Send every replica its rows (one broadcast over the replica).

        rows: the whole batch, and what is said of its rows; read on leaders.
        scored: rows that are scored; None: all.
        compared: others that are scored for the comparison with the engine alone; None: none.
        temperature: at which the log-probs of all rows are taken; None: that of each row's mode.
        """
        temperatures = temperatures_by_mode(self.config.rollout, self.config.modes)
        if temperature is not None:
            temperatures = dict.fromkeys(temperatures, temperature)
        return place_batch(
            rows,
            live,
            seed,
            layout=self.layout,
            train=self.config.train,
            temperatures=temperatures,
            kl_tokens=self.config.log.kl_tokens,
            scored=scored,
            compared=compared,
        )

    def log_probs(self, placed: PlacedBatch) -> list[TokenStatistics]:
        """Log-probs, entropies and KL of every row by the current weights, in row order on leaders.

        [] on other ranks. Statistics of rows that are neither scored nor compared are 0. A forward
        pass over the micro-batches of training, and one all-gather of objects over the leaders.
        """
        rows = self._gather(self.scorer.log_probs(list(placed.scored()), **self._statistics))
        for index, length in placed.unscored.items():
            blank = TokenStatistics(torch.zeros(length), torch.zeros(length))
            rows[index] = replace(rows.get(index) or blank, scored=False)
        return [rows[index] for index in sorted(rows)]

    def step_log_probs(self, placed: PlacedBatch, step: int) -> dict[int, TokenStatistics]:
        """Row index -> statistics of the rows of one optimizer step by the current weights.

        On leaders; {} elsewhere. Costs what `log_probs` costs, for this step's rows.
        """
        return self._gather(self.scorer.log_probs(placed.scored_in(step), **self._statistics))

    def perturbed_log_probs(self, placed: PlacedBatch, relative: float) -> list[Tensor]:
        """Log-probs [T] of every row, on leaders, by weights that were moved a little, at random.

        Each weight moves by up to `relative` times itself. Rounding at a unit roundoff of
        `relative` moves them about as far. The weights are put back from host memory.
        """
        saved = [parameter.detach().to("cpu", copy=True) for parameter in self.model.parameters()]
        try:
            self._perturb(relative)
            return [row.logprobs for row in self.log_probs(placed)]
        finally:
            self._set_weights(saved)

    def reference_log_probs(self, placed: PlacedBatch) -> list[Tensor]:
        """Log-probs [T] of every row under the initial policy, on leaders.

        Needs algorithm.kl_coef > 0. Those of rows that are neither trained nor scored are 0. The
        initial weights come from host memory and the current ones wait there meanwhile.
        """
        batches = [
            batch for step in range(placed.optimizer_steps) for batch in placed.trained(step)
        ]
        batches += [batch for step in placed.score_only for batch in step]
        with self.reference.in_place():
            scored = self._gather(self.scorer.log_probs(batches))
        rows = {index: torch.zeros(length) for index, length in placed.unscored.items()}
        rows |= {index: row.logprobs for index, row in scored.items()}
        return [rows[index] for index in sorted(rows)]

    def update(
        self, placed: PlacedBatch, step: int, signals: Mapping[int, TokenSignals]
    ) -> StepUpdate:
        """Train optimizer step `step` of the batch.

        signals: by row index, what the step's rows are trained with; read on leaders. They travel
        to the other ranks of the replica (one broadcast); the metrics are summed over all ranks
        (two all-reduces); Megatron reduces the gradients over the replicas.
        """
        batches = placed.trained(step)
        by_batch = None
        if self.layout.is_leader:
            by_batch = [_batch_signals(batch, signals) for batch in batches]
        by_batch = self.layout.broadcast_from_leader(by_batch)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = self._sum_over_world(self._forward_backward(batches, by_batch))
        is_finite = math.isfinite(float(metrics.loss))
        return StepUpdate(metrics, self.optimizer.step(loss_is_finite=is_finite))

    def _gather(self, rows: dict[int, TokenStatistics]) -> dict[int, TokenStatistics]:
        """Row index -> statistics of all replicas' rows, in row order, on leaders; {} elsewhere."""
        gathered: dict[int, TokenStatistics] = {}
        for part in self.layout.all_gather_leaders(rows):
            gathered.update(part)
        return {index: gathered[index] for index in sorted(gathered)}

    def _forward_backward(
        self, batches: list[MicroBatch], by_batch: list[TokenSignals]
    ) -> LossMetrics:
        """Accumulate the gradients of one optimizer step; the metrics of this rank's tokens."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.train()
        if not batches:
            _sum_gradients([self.ddp])
            return LossMetrics.of_vectors([])
        with deterministic_only(self.config.train.deterministic):
            outputs = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter(zip(batches, by_batch, strict=True)),
                model=[self.ddp],
                num_microbatches=len(batches),
                seq_length=batches[0].tokens.shape[1],
                micro_batch_size=1,
                forward_only=False,
            )
        return LossMetrics.of_vectors(outputs if self.layout.is_last_stage else [])

    def _forward_step(self, iterator, model):
        batch, signals = next(iterator)
        return self.scorer.forward(model, batch), partial(self._loss, batch, signals)

    def _loss(self, batch: MicroBatch, signals: TokenSignals, hidden: Tensor):
        """Loss, trained tokens and `LossMetrics.vector` of a micro-batch, for Megatron's schedule.

        Three values, for which the schedule divides by nothing: the losses of micro-batches add up.
        """
        device = hidden.device
        signals = signals.map(lambda value: value.to(device))
        parts: list[LossMetrics] = []

        def token_loss(
            span: slice, logprobs: Tensor, entropy: Tensor, nucleus: Tensor | None = None
        ) -> Tensor:
            policy = PolicyTokens(logprobs, entropy, nucleus)
            parts.append(policy_loss(signals.at(span), policy, self.loss_config))
            return parts[-1].loss

        targets, temperature = batch.targets.to(device), batch.temperature.to(device)
        selected = batch.select(self.model.whole(hidden))
        # At once: the schedule calls backward on this loss, times 1. It multiplies losses only by
        # `grad_scale_func` of its configuration, which is for fp16 and not set here.
        loss = fused_loss(
            self.head,
            selected,
            targets,
            temperature,
            token_loss,
            signals.nucleus_threshold,
            at_once=True,
        ).loss
        if not batch.rows:
            # An empty micro-batch, which other ranks wait for, has no chunk that would call it.
            token_loss(slice(0), temperature, temperature, temperature)
        metrics = replace(LossMetrics.over(parts), loss=loss)
        return loss, metrics.tokens.int(), metrics.vector()

    def _sum_over_world(self, metrics: LossMetrics) -> LossMetrics:
        """The metrics over all ranks' tokens, alike on every rank: two all-reduces.

        The ranks of a tensor-parallel group have the same tokens, of which one gives them.
        """
        sums, maxima = metrics.sums_and_maxima()
        if self.layout.tensor_rank > 0:
            sums, maxima = torch.zeros_like(sums), torch.zeros_like(maxima)
        largest = torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(sums, group=self.layout.world)
        torch.distributed.all_reduce(maxima, op=largest, group=self.layout.world)
        return LossMetrics.of_sums_and_maxima(sums, maxima)

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


def _batch_signals(batch: MicroBatch, signals: Mapping[int, TokenSignals]) -> TokenSignals:
    """The signals of a micro-batch's tokens; of an empty one, no tokens of the same fields."""
    if batch.rows:
        return TokenSignals.join([signals[index] for index in batch.rows])
    return next(iter(signals.values())).at(slice(0))
