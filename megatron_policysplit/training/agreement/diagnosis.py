"""Which of weights, temperature, template or precision makes engine and actor disagree.

Engine and actor score some of the responses that disagree once more, token for token, at
temperature 1. Nothing is sampled, so temperature plays no part. Then:

1. They agree now: weights and precision are right, the sampling was not. The actor's log-probs at
   other temperatures and behind other prompts are compared with those that came with the samples.
   What restores agreement is the cause. If nothing does, the template is to blame where all
   responses disagree, and the weights of one engine where only a part of them does.
2. They disagree, and agree after the weights have been sent once more: the sync had failed
   (weights).
3. They still disagree, and the actor agrees behind a prompt that is changed as some servers change
   prompts: template.
4. Else the size of the difference decides. Every weight of the actor is moved at random by
   bfloat16's unit roundoff (2^-8 of itself). How far that moves its log-probs of these very tokens
   shows what rounding does to this model. Up to ROUNDING times that the cause is precision, beyond
   it weights. (With bfloat16 on either side or both it was 0.7 to 1.6 times that on seven models of
   three architectures, SmolLM2-135M-Instruct among them.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_policysplit.config.modes import temperature_key
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.rows import Mode, Row, modes_in
from megatron_policysplit.training.agreement.bounds import (
    AgreementSettings,
    Bounds,
    Difference,
    choose_bounds,
)

# Responses that are scored again at most, and how many first tokens of each.
EXCERPT_ROWS, EXCERPT_TOKENS = 32, 512
# A change explains a difference if it brings it below the bound and to this share of what it was.
RESTORED = 0.5
# Where a smaller share of the responses is past the bound, one engine is at fault, not the run.
PART = 0.75
ROUNDOFF = 2.0**-8  # bfloat16's unit roundoff
ROUNDING = 4.0  # how many times the effect of rounding still counts as precision
COMPARE_PROMPTS = (
    "compare the prompts that `policysplit config` prints with the ids that reach the engine"
)
# Temperatures tried: a geometric grid of GRID points, then closer and closer around the best one.
LOWEST, HIGHEST, GRID, HALVINGS = 0.2, 5.0, 13, 10


@dataclass(frozen=True)
class Breach:
    """A comparison past its bounds, for the mode that is farthest off. Made by the gate."""

    mode: Mode
    difference: Difference
    bounds: Bounds
    sampled: bool  # whether log-probs that came with samples were compared, not engine scores
    # On leaders: with `sampled` those whose own figures are past the bounds, else all compared.
    rows: Sequence[Row]
    past: int  # number of those rows, on every rank
    compared: int  # number of rows of the mode that were compared, on every rank

    @property
    def figures(self) -> str:
        """The difference and its bounds, as the beginning of a sentence."""
        difference, bounds = self.difference, self.bounds
        return (
            f"engine and actor disagree on {difference.tokens} tokens of the {self.mode.value} "
            f"mode: mean |log-prob difference| {difference.mean:.3g} nats (bound "
            f"{bounds.mean:.3g}), k3 {difference.k3:.3g} nats (bound {bounds.k3:.3g})"
        )


@dataclass(frozen=True)
class Probe:
    """Asks engine and actor for the log-probs of rows. The trainer makes it.

    Every method is collective over all ranks. Rows are read on leaders, which get one tensor [T] of
    log-probs (nats) a row; other ranks get []. Both functions below are collective and raise the
    same error on every rank.
    """

    layout: Layout
    actor: megatron_policysplit.actor.actor.Actor  # noqa: F821
    # Log-probs of pairs (prompt, response) by each leader's engine; [] on other ranks.
    engine_log_probs: Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[list[float]]]
    resync: Callable[[], None]  # gives the engines the actor's weights whatever they hold

    def by_engine(self, rows: Sequence[Row], actor: Sequence[Tensor]) -> list[Tensor]:
        """The engine's log-probs, teacher-forced at temperature 1.

        Where every leader has its own engine, the one counts whose scores are farthest from
        `actor`, the actor's log-probs of the rows.
        """
        local = self.engine_log_probs([(row.prompt, row.rollout.tokens) for row in rows])
        by_leader = self.layout.all_gather_leaders(
            [torch.tensor(scores, dtype=torch.float64) for scores in local]
        )
        return max(by_leader, key=lambda scores: Difference.of(actor, scores).rank, default=[])

    def by_actor(self, rows: Sequence[Row], temperature: float) -> list[Tensor]:
        """The actor's log-probs at a temperature."""
        return [row.logprobs for row in self.actor.log_probs(self._place(rows, temperature))]

    def by_perturbed_actor(self, rows: Sequence[Row]) -> list[Tensor]:
        """The actor's log-probs at temperature 1 with every weight moved at random.

        Each is moved by up to bfloat16's unit roundoff; afterwards the weights are as before.
        """
        return self.actor.perturbed_log_probs(self._place(rows, 1.0), ROUNDOFF)

    def gap(self, actor: Sequence[Tensor], engine: Sequence[Tensor]) -> Difference:
        """The difference on the chief, handed to every rank."""
        return self.layout.broadcast_from_chief(
            Difference.of(actor, engine) if self.layout.is_chief else None
        )

    def _place(self, rows: Sequence[Row], temperature: float):
        return self.actor.place(rows, [False] * len(rows), seed=0, temperature=temperature)


def excerpt(rows: Sequence[Row]) -> list[Row]:
    """At most EXCERPT_ROWS of the rows, evenly spaced, cut to their first EXCERPT_TOKENS tokens."""
    count = min(len(rows), EXCERPT_ROWS)
    return [_beginning(rows[i * len(rows) // count]) for i in range(count)]


def _beginning(row: Row) -> Row:
    rollout, end = row.rollout, EXCERPT_TOKENS
    beginning = replace(
        rollout,
        tokens=rollout.tokens[:end],
        engine_logprobs=rollout.engine_logprobs[:end],
        loss_mask=rollout.loss_mask[:end],
    )
    return replace(row, rollout=beginning)


def diagnose(
    breach: Breach, batch: Sequence[Row], settings: AgreementSettings, probe: Probe
) -> str:
    """The likely cause, its figures and the remedy: the end of a sentence after "likely cause: ".

    Collective over all ranks. The engines may get the weights once more on the way.

    batch: all rows, which the other modes' prompts are taken from; read on leaders.
    """
    rows, temperature = excerpt(breach.rows), settings.temperatures[breach.mode]
    actor = probe.by_actor(rows, 1.0)
    engine = probe.by_engine(rows, actor)
    gap = probe.gap(actor, engine)
    if breach.sampled:
        samples = sampled_logprobs(rows)
        hypotheses = _Hypotheses(probe, breach.bounds, rows, batch, temperature, samples)
        # At a temperature below 1 the same rounding makes a larger difference.
        if hypotheses.explained_by(gap, RESTORED * min(1.0, temperature)):
            return _sampling_cause(hypotheses, breach, settings)
    elif breach.bounds.hold(gap):
        return "weights: asked again the engine agrees, so it held other weights a moment ago"
    hypotheses = _Hypotheses(probe, choose_bounds(settings), rows, batch, 1.0, engine)
    return _scoring_cause(hypotheses, actor, settings)


class _Hypotheses:
    """Tries which change to the actor's side brings its log-probs to the engine's.

    Every method is collective over all ranks.

    Args:
        probe: asks the actor.
        bounds: below which the two agree.
        rows: the responses looked at.
        batch: all rows, which the other modes' prompts are taken from.
        temperature: at which the actor is asked unless a method says otherwise.
        engine: the log-probs [T] of the rows to explain.
    """

    def __init__(self, probe, bounds, rows, batch, temperature: float, engine: Sequence[Tensor]):
        self.probe, self.bounds, self.rows, self.batch = probe, bounds, rows, batch
        self.temperature, self.engine = temperature, engine
        self.before = self.gap_at(temperature)

    def explained_by(self, after: Difference, share: float = RESTORED) -> bool:
        """Whether the difference after a change is small, and at most `share` of that before it."""
        return self.bounds.hold(after) and after.mean <= share * self.before.mean

    def gap_at(self, temperature: float) -> Difference:
        """The difference with the actor at a temperature."""
        return self.probe.gap(self.probe.by_actor(self.rows, temperature), self.engine)

    def prompt_change(self) -> str | None:
        """The change to the prompts after which the actor agrees, in words; None without one."""
        changes = _changed_prompts(
            self.rows, self.batch, self.probe.actor.hf_config.get("bos_token_id")
        )
        # Other ranks than the chief may have no rows, but must take part in every call.
        for change in self.probe.layout.broadcast_from_chief(list(changes)):
            scores = self.probe.by_actor(changes.get(change, []), self.temperature)
            if self.explained_by(self.probe.gap(scores, self.engine)):
                return change
        return None

    def other_temperature(self, likely: Sequence[float]) -> float | None:
        """The temperature at which the actor agrees, if there is one; the likely ones first."""
        for temperature in likely:
            if self.explained_by(self.gap_at(temperature)):
                return temperature
        step = math.log(HIGHEST / LOWEST) / (GRID - 1)
        grid = [LOWEST * math.exp(step * i) for i in range(GRID)]
        gaps = {temperature: self.gap_at(temperature) for temperature in grid}
        for _ in range(HALVINGS):
            best, step = min(gaps, key=lambda t: gaps[t].rank), step / 2
            gaps |= {t: self.gap_at(t) for t in (best * math.exp(-step), best * math.exp(step))}
        best = min(gaps, key=lambda t: gaps[t].rank)
        return best if self.explained_by(gaps[best]) else None


def _changed_prompts(
    rows: Sequence[Row], batch: Sequence[Row], bos: int | None
) -> dict[str, list[Row]]:
    """The rows behind prompts as an engine might have got them, by what changed, in words.

    bos: the model's beginning-of-sequence token, if it has one.
    """
    prompts = {row.key: row.prompt for row in batch}
    changes: dict[str, list[Row]] = {}
    for mode in modes_in(batch):
        if rows and all(row.mode != mode and row.key.under(mode) in prompts for row in rows):
            changes[f"the engine sampled it behind the prompt of the {mode.value} mode"] = [
                replace(row, prompt=prompts[row.key.under(mode)]) for row in rows
            ]
    if isinstance(bos, int):
        changes[f"the engine puts the beginning-of-sequence token {bos} before the prompt"] = [
            replace(row, prompt=[bos, *row.prompt]) for row in rows
        ]
    changes["the engine leaves out the first token of the prompt"] = [
        replace(row, prompt=row.prompt[1:] if len(row.prompt) > 1 else row.prompt) for row in rows
    ]
    return changes


def _sampling_cause(hypotheses: _Hypotheses, breach: Breach, settings: AgreementSettings) -> str:
    """The cause where the engine scores the tokens rightly, but gave other log-probs with them."""
    same = (
        "the engine's own scores of these tokens agree with the actor, so weights and precision "
        "are right"
    )
    change = hypotheses.prompt_change()
    if change is not None:
        return f"template: {change} ({same}); {COMPARE_PROMPTS}"
    mode, temperatures = breach.mode, settings.temperatures
    configured = temperatures[mode]
    likely = [t for t in (1.0, *temperatures.values()) if t != configured]
    actual = hypotheses.other_temperature(likely)
    if actual is not None:
        others = [
            other.value for other, temperature in temperatures.items() if temperature == actual
        ]
        from_other = f", that of the {others[0]} mode" if others else ""
        return (
            "temperature: the log-probs that came with the samples are those of temperature "
            f"{actual:.3g}{from_other}, not of {temperature_key(mode)}={configured:g} ({same}); "
            "remove what overrides the temperature of requests on the way to the engine, or "
            "configure that one"
        )
    if breach.past < PART * breach.compared:
        return (
            f"weights: {breach.past} of {breach.compared} responses disagree and the others do not "
            f"({same}), as if one of several engines held other weights; look for the weight "
            "version and the address in their logs"
        )
    return (
        f"template: the samples were drawn behind another prompt ({same}, and no temperature "
        f"explains the samples); {COMPARE_PROMPTS}"
    )


def _scoring_cause(
    hypotheses: _Hypotheses, actor: Sequence[Tensor], settings: AgreementSettings
) -> str:
    """The cause where the engine's own scores of these tokens differ from `actor`, the actor's."""
    probe = hypotheses.probe
    transport = (
        f"weight_sync.transport={settings.transport}"
        if settings.engine == "sglang"
        else "the transfer in process"
    )
    probe.resync()
    after = probe.gap(actor, probe.by_engine(hypotheses.rows, actor))
    if hypotheses.explained_by(after):
        return (
            "weights: the engine's scores agree once the weights have been sent again, so "
            f"{transport} had left stale or damaged ones; resume from the newest checkpoint, with "
            "another transport if it happens again"
        )
    change = hypotheses.prompt_change()
    if change is not None:
        return f"template: {change}, also when it only scores; {COMPARE_PROMPTS}"
    rounding = probe.gap(probe.by_perturbed_actor(hypotheses.rows), actor).mean
    size = (
        f"at temperature 1 its scores are {after.mean:.3g} nats from the actor's, where rounding "
        f"the weights to bfloat16 makes {rounding:.2g}"
    )
    if after.mean <= ROUNDING * rounding:
        return (
            f"precision: {size}; serve in model.dtype={settings.actor_dtype} without quantisation "
            "of weights or KV cache (rollout.server.dtype and the server's log), or raise "
            "agreement.max_difference"
        )
    return (
        f"weights: {size}, also after they have been sent again by {transport}; check that the "
        "engine serves the model of model.path, and that its log names no tensor it did not take"
    )


def sampled_logprobs(rows: Sequence[Row]) -> list[Tensor]:
    """The log-probs that came with the samples, float64: one tensor [T] a row."""
    return [torch.tensor(row.rollout.engine_logprobs, dtype=torch.float64) for row in rows]
