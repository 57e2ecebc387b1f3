"""Do engine and actor give the same log-probs? A comparison after the first sync and every
`agreement.every` steps.

A sample's engine log-prob and the actor's, under the prompt it was sampled with and at its
temperature, come from the same weights, so they differ by arithmetic alone (`agreement_bounds.py`
says how far they may). Where no sample comes from the actor's very weights (rollout.overlap), the
engine scores a few of the batch's responses instead. A comparison past a bound warns and is
repeated with the next batch; after `agreement.breaches` in a row the run ends with the likely cause
(`agreement_probe.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import temperatures_by_mode
from megatron_policysplit.errors import TrainingError, UserError
from megatron_policysplit.rows import Mode, Row, modes_in
from megatron_policysplit.training.agreement.bounds import Difference, choose_bounds
from megatron_policysplit.training.agreement.diagnosis import (
    Breach,
    Probe,
    diagnose,
    excerpt,
    sampled_logprobs,
)

Differences = Mapping[Mode, Difference]


def compare(
    rows: Sequence[Row], old: Sequence[TokenStatistics], version: int
) -> dict[Mode, Difference]:
    """Per sampling mode, over the rows behind the prompt they were sampled with, by weights of
    `version` alone.

    old: the actor's statistics of the rows with those weights, at the sampling temperatures. {} if
    there are none.
    """
    result = {}
    for mode in modes_in(rows):
        own = [
            (row, s)
            for row, s in zip(rows, old, strict=True)
            if row.mode == mode and _sampled_by(row, version)
        ]
        if own:
            result[mode] = Difference.of(
                [s.logprobs for _, s in own], sampled_logprobs([row for row, _ in own])
            )
    return result


def compare_by_scoring(rows: Sequence[Row], probe: Probe) -> dict[Mode, Difference]:
    """Per sampling mode, over a few rows that the engine scores with the weights it holds now, at
    temperature 1.

    For samples of older weights. Collective over all ranks; {} on ranks that do not lead.
    """
    modes = modes_in(rows)
    chosen = [
        row
        for mode in modes
        for row in excerpt([r for r in rows if r.mode == mode and r.on_policy])
    ]
    actor = probe.by_actor(chosen, temperature=1.0)
    engine = probe.by_engine(chosen, actor)
    result = {}
    for mode in modes:
        own = [(a, e) for row, a, e in zip(chosen, actor, engine, strict=True) if row.mode == mode]
        if own:
            result[mode] = Difference.of(*zip(*own, strict=True))
    return result


def agreement_metrics(differences: Differences) -> dict[str, float]:
    """`agreement/...`, and the same per sampling mode: difference and k3 in nats, tokens compared."""
    named = {f"{mode.value}/": difference for mode, difference in differences.items()}
    named[""] = Difference.together(list(differences.values()))
    return {
        f"agreement/{prefix}{name}": float(value)
        for prefix, difference in named.items()
        for name, value in (
            ("difference", difference.mean),
            ("k3", difference.k3),
            ("tokens", difference.tokens),
        )
    }


class AgreementGate:
    """Compares when it is due, warns, and ends the run. Every rank makes one and calls `check` for
    every batch.

    Its only state is how many comparisons in a row failed. It need not outlive the process: the
    first batch of a resumed run is compared again.
    """

    def __init__(self, config: Config, probe: Probe, log: Any):
        self.config, self.probe, self.log = config, probe, log
        self.temperatures = temperatures_by_mode(config.rollout, config.modes)
        self.compared = False
        self.breaches = 0

    def due(self, step: int) -> bool:
        """Whether the batch after `step` trained ones is compared; a replayed batch has no engine
        to compare with.
        """
        every = self.config.agreement.every
        if every == 0 or self.config.rollout.engine == "replay":
            return False
        return not self.compared or self.breaches > 0 or step % every == 0

    def check(
        self,
        step: int,
        rows: Sequence[Row],
        old: Sequence[TokenStatistics],
        version: int,
        served: int,
    ) -> dict[str, float]:
        """Metrics of the comparison if one is due, else {}. To be called between scoring a batch
        and its update.

        rows, old: of the batch after `step` trained ones, read on leaders. version: of the actor's
        weights; served: of the engines'. Collective over all ranks. Raises TrainingError on every
        rank when the run must not go on.
        """
        if not self.due(step):
            return {}
        layout = self.probe.layout
        differences = layout.broadcast_from_chief(
            compare(rows, old, version) if layout.is_chief else None
        )
        sampled = bool(differences)
        if not sampled:
            if served != version:  # nothing to compare with before the next sync
                return {}
            differences = layout.broadcast_from_chief(compare_by_scoring(rows, self.probe))
        self.compared = True
        bounds = {
            mode: choose_bounds(self.config, self.temperatures[mode] if sampled else 1.0)
            for mode in differences
        }
        past = [
            mode for mode, difference in differences.items() if not bounds[mode].hold(difference)
        ]
        self.breaches = self.breaches + 1 if past else 0
        if past:
            mode = max(past, key=lambda mode: differences[mode].rank)
            own = [
                (row, s)
                for row, s in zip(rows, old, strict=True)
                if row.mode == mode and (_sampled_by(row, version) if sampled else row.on_policy)
            ]
            worst = [
                row
                for row, s in own
                if not sampled
                or not bounds[mode].hold(Difference.of([s.logprobs], sampled_logprobs([row])))
            ]
            counts = layout.broadcast_from_chief((len(worst), len(own)))
            self._warn_or_end(
                Breach(mode, differences[mode], bounds[mode], sampled, worst, *counts), step, rows
            )
        return agreement_metrics(differences) | {"agreement/breaches": float(self.breaches)}

    def _warn_or_end(self, breach: Breach, step: int, batch: Sequence[Row]) -> None:
        limit = self.config.agreement.breaches
        if self.breaches < limit:
            ends = f"the run ends after {limit} such comparisons in a row (agreement.breaches)"
            self.log.message(f"{breach.figures} before step {step + 1}; {ends}")
            return
        try:
            cause = diagnose(breach, batch, self.temperatures, self.config, self.probe)
        except UserError as error:
            cause = f"unknown, because the engine could not be asked ({error})"
        raise TrainingError(
            f"{breach.figures} before step {step + 1}, in comparison {self.breaches} in a row "
            "(agreement.breaches); "
            f"likely cause: {cause}"
        )


def _sampled_by(row: Row, version: int) -> bool:
    return row.on_policy and all(
        sampled_by == version for _, sampled_by in row.rollout.weight_versions
    )
