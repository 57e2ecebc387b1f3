"""Which of weights, temperature, template or precision makes engine and actor disagree.

Some responses that disagree are scored again by both, token for token, at temperature 1. Nothing is
sampled, so temperature plays no part:

1. Both agree now: weights and precision are right, the sampling was not. The actor's log-probs at
   other temperatures,
   and behind other prompts, are compared with those that came with the samples; what restores
   agreement is the cause. If nothing does, it is the template where all responses disagree, and an
   engine's weights where only a part does.
2. They disagree, and agree after the weights have been sent once more: the sync had failed
   (weights).
3. They still disagree, and the actor agrees behind a prompt that was changed in a way servers
   change them: template.
4. Else the size decides. Every weight of the actor is moved at random by bfloat16's unit roundoff
   (2^-8 of itself); how
   far its log-probs go on these very tokens measures what rounding does to this model. Up to
   ROUNDING times that it is precision, beyond it weights. (With bfloat16 on either side or both it
   was 0.7 to 1.6 times that on seven models of three architectures, SmolLM2-135M-Instruct among
   them.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import temperature_key
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.rows import Mode, Row, modes_in
from megatron_policysplit.training.agreement.bounds import Bounds, Difference, choose_bounds

EXCERPT_ROWS, EXCERPT_TOKENS = 32, 512  # responses scored again, and of each its first tokens
# A guess explains a difference if it brings it below the bound and to this share of what it was.
RESTORED = 0.5
# Of the responses past the bound: fewer are a part, and the fault lies with an engine and not with
# the run.
PART = 0.75
ROUNDOFF, ROUNDING = 2.0**-8, 4.0
COMPARE_PROMPTS = (
    "compare the prompts that `policysplit config` prints with the ids that reach the engine"
)
LOWEST, HIGHEST, GRID, HALVINGS = (
    0.2,
    5.0,
    13,
    10,
)  # temperatures tried: a geometric grid, then around its best


@dataclass(frozen=True)
class Breach:
    """A comparison past its bounds: the mode that is farthest off and its figures.

    sampled: whether the log-probs that came with samples were compared, or scores of the engine.
    rows: those whose own figures are past the bounds (on leaders), `past` of `compared` (on every
    rank).
    """

    mode: Mode
    difference: Difference
    bounds: Bounds
    sampled: bool
    rows: Sequence[Row]
    past: int
    compared: int

    @property
    def figures(self) -> str:
        found, bounds = self.difference, self.bounds
        return (
            f"engine and actor disagree on {found.tokens} tokens of the {self.mode.value} mode: "
            "mean |log-prob "
            f"difference| {found.mean:.3g} nats (bound {bounds.mean:.3g}), "
            f"k3 {found.k3:.3g} nats (bound {bounds.k3:.3g})"
        )


@dataclass(frozen=True)
class Probe:
    """Asks engine and actor about rows. Every method is collective over all ranks; rows are read on
    leaders, which get one tensor [T] of log-probs (nats) a row; other ranks get [].

    engine_log_probs: `score` of every leader's engine; [] on other ranks. resync: gives the engines
    the actor's weights whatever they hold. Both are collective and raise on every rank alike.
    """

    layout: Layout
    actor: megatron_policysplit.actor.actor.Actor  # noqa: F821
    engine_log_probs: Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[list[float]]]
    resync: Callable[[], None]

    def by_engine(self, rows: Sequence[Row], actor: Sequence[Tensor]) -> list[Tensor]:
        """Teacher-forced at temperature 1; of several leaders' own engines, the scores farthest
        from `actor`'s.
        """
        mine = self.engine_log_probs([(row.prompt, row.rollout.tokens) for row in rows])
        everyone = self.layout.all_gather_leaders(
            [torch.tensor(scores, dtype=torch.float64) for scores in mine]
        )
        return max(everyone, key=lambda scores: Difference.of(actor, scores).rank, default=[])

    def by_actor(self, rows: Sequence[Row], temperature: float) -> list[Tensor]:
        return [row.logprobs for row in self.actor.log_probs(self._place(rows, temperature))]

    def by_perturbed_actor(self, rows: Sequence[Row]) -> list[Tensor]:
        """At temperature 1, each weight moved at random by up to bfloat16's unit roundoff."""
        return self.actor.perturbed_log_probs(self._place(rows, 1.0), ROUNDOFF)

    def gap(self, actor: Sequence[Tensor], engine: Sequence[Tensor]) -> Difference:
        """The chief's, on every rank."""
        return self.layout.broadcast_from_chief(
            Difference.of(actor, engine) if self.layout.is_chief else None
        )

    def _place(self, rows: Sequence[Row], temperature: float):
        return self.actor.place(rows, [False] * len(rows), seed=0, temperature=temperature)


def excerpt(rows: Sequence[Row]) -> list[Row]:
    """At most EXCERPT_ROWS of the rows, evenly spaced from the first on, with the beginnings of
    their responses.
    """
    count = min(len(rows), EXCERPT_ROWS)
    return [_beginning(rows[i * len(rows) // count]) for i in range(count)]


def _beginning(row: Row) -> Row:
    rollout, end = row.rollout, EXCERPT_TOKENS
    kept = {"tokens": rollout.tokens[:end], "engine_logprobs": rollout.engine_logprobs[:end]}
    return replace(row, rollout=replace(rollout, **kept, loss_mask=rollout.loss_mask[:end]))


def diagnose(
    breach: Breach,
    batch: Sequence[Row],
    temperatures: Mapping[Mode, float],
    config: Config,
    probe: Probe,
) -> str:
    """The likely cause, its figures and the remedy, as the end of a sentence that begins "likely
    cause: ".

    batch: all rows, where the other modes' prompts are found (read on leaders). temperatures: as
    configured. Collective over all ranks. The engines get the weights once more on the way.
    """
    rows, temperature = excerpt(breach.rows), temperatures[breach.mode]
    actor = probe.by_actor(rows, 1.0)
    engine = probe.by_engine(rows, actor)
    now = probe.gap(actor, engine)
    if breach.sampled:
        guesses = _Guesses(probe, breach.bounds, rows, batch, temperature, sampled_logprobs(rows))
        # At a temperature below 1 the same rounding makes a larger difference.
        if guesses.restored(now, RESTORED * min(1.0, temperature)):
            return _of_sampling(guesses, breach, temperatures)
    elif breach.bounds.hold(now):
        return "weights: asked again the engine agrees, so it held other weights a moment ago"
    return _of_scores(
        _Guesses(probe, choose_bounds(config), rows, batch, 1.0, engine), actor, config
    )


class _Guesses:
    """The actor's log-probs under other assumptions, against `engine`'s on the same rows."""

    def __init__(self, probe, bounds, rows, batch, temperature: float, engine: Sequence[Tensor]):
        self.probe, self.bounds, self.rows, self.batch = probe, bounds, rows, batch
        self.temperature, self.engine = temperature, engine
        self.before = self.at(temperature)

    def restored(self, after: Difference, share: float = RESTORED) -> bool:
        return self.bounds.hold(after) and after.mean <= share * self.before.mean

    def at(self, temperature: float) -> Difference:
        return self.probe.gap(self.probe.by_actor(self.rows, temperature), self.engine)

    def prompt(self) -> str | None:
        """What was done to the prompts, if the actor agrees once it is done to its own."""
        changed = _changed_prompts(
            self.rows, self.batch, self.probe.actor.hf_config.get("bos_token_id")
        )
        for change in self.probe.layout.broadcast_from_chief(list(changed)):
            scores = self.probe.by_actor(changed.get(change, []), self.temperature)
            if self.restored(self.probe.gap(scores, self.engine)):
                return change
        return None

    def other_temperature(self, likely: Sequence[float]) -> float | None:
        """The temperature at which the actor agrees, if there is one."""
        for temperature in likely:
            if self.restored(self.at(temperature)):
                return temperature
        step = math.log(HIGHEST / LOWEST) / (GRID - 1)
        tried = {t: self.at(t) for t in (LOWEST * math.exp(step * i) for i in range(GRID))}
        for _ in range(HALVINGS):
            best, step = min(tried, key=lambda t: tried[t].rank), step / 2
            tried |= {t: self.at(t) for t in (best * math.exp(-step), best * math.exp(step))}
        best = min(tried, key=lambda t: tried[t].rank)
        return best if self.restored(tried[best]) else None


def _changed_prompts(
    rows: Sequence[Row], batch: Sequence[Row], bos: int | None
) -> dict[str, list[Row]]:
    """The rows behind prompts as an engine might have got them, by what was done to them."""
    prompts = {row.key: row.prompt for row in batch}
    changed: dict[str, list[Row]] = {}
    for mode in modes_in(batch):
        if rows and all(row.mode != mode and row.key.under(mode) in prompts for row in rows):
            changed[f"the engine sampled it behind the prompt of the {mode.value} mode"] = [
                replace(row, prompt=prompts[row.key.under(mode)]) for row in rows
            ]
    if isinstance(bos, int):
        changed[f"the engine puts the beginning-of-sequence token {bos} before the prompt"] = [
            replace(row, prompt=[bos, *row.prompt]) for row in rows
        ]
    changed["the engine leaves out the first token of the prompt"] = [
        replace(row, prompt=row.prompt[1:] if len(row.prompt) > 1 else row.prompt) for row in rows
    ]
    return changed


def _of_sampling(guesses: _Guesses, breach: Breach, temperatures: Mapping[Mode, float]) -> str:
    """The engine knows the right log-probs of these tokens, and gave others when it sampled them."""
    same = "the engine's own scores of these tokens agree with the actor, so weights and precision are right"
    change = guesses.prompt()
    if change is not None:
        return f"template: {change} ({same}); {COMPARE_PROMPTS}"
    mode = breach.mode
    configured = temperatures[mode]
    found = guesses.other_temperature([t for t in (1.0, *temperatures.values()) if t != configured])
    if found is not None:
        others = [
            other.value for other, temperature in temperatures.items() if temperature == found
        ]
        from_other = f", that of the {others[0]} mode" if others else ""
        return (
            "temperature: the log-probs that came with the samples are those of temperature "
            f"{found:.3g}{from_other}, "
            f"not of {temperature_key(mode)}={configured:g} ({same}); remove what overrides the "
            "temperature "
            "of requests on the way to the engine, or configure that one"
        )
    if breach.past < PART * breach.compared:
        return (
            f"weights: {breach.past} of {breach.compared} responses disagree and the others do not "
            f"({same}), as if one "
            "of several engines held other weights; look for the weight version and the address in "
            "their logs"
        )
    return (
        f"template: the samples were drawn behind another prompt ({same}, and no temperature "
        "explains the samples); "
        f"{COMPARE_PROMPTS}"
    )


def _of_scores(guesses: _Guesses, actor: Sequence[Tensor], config: Config) -> str:
    """The engine's own scores of these tokens differ from the actor's."""
    probe, is_sglang = guesses.probe, config.rollout.engine == "sglang"
    transport = (
        f"weight_sync.transport={config.weight_sync.transport}"
        if is_sglang
        else "the transfer in process"
    )
    probe.resync()
    after = probe.gap(actor, probe.by_engine(guesses.rows, actor))
    if guesses.restored(after):
        return (
            "weights: the engine's scores agree once the weights have been sent again, so "
            f"{transport} had left stale "
            "or damaged ones; resume from the newest checkpoint, with another transport if it "
            "happens again"
        )
    change = guesses.prompt()
    if change is not None:
        return f"template: {change}, also when it only scores; {COMPARE_PROMPTS}"
    rounding = probe.gap(probe.by_perturbed_actor(guesses.rows), actor).mean
    size = (
        f"at temperature 1 its scores are {after.mean:.3g} nats from the actor's, where rounding "
        "the weights to "
        f"bfloat16 makes {rounding:.2g}"
    )
    if after.mean <= ROUNDING * rounding:
        return (
            f"precision: {size}; serve in model.dtype={config.model.dtype} without quantisation of "
            "weights or KV cache "
            "(rollout.server.dtype and the server's log), or raise agreement.max_difference"
        )
    return (
        f"weights: {size}, also after they have been sent again by {transport}; check that the "
        "engine serves the model "
        "of model.path, and that its log names no tensor it did not take"
    )


def sampled_logprobs(rows: Sequence[Row]) -> list[Tensor]:
    """The log-probs [T] that came with the samples."""
    return [torch.tensor(row.rollout.engine_logprobs, dtype=torch.float64) for row in rows]
