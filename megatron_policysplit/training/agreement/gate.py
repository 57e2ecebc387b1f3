"""The agreement gate: do engine and actor give the same log-probs?

They are compared after the first sync and every `agreement.every` steps. A token's log-prob from
the engine and from the actor, behind the same prompt and at the same temperature, come from the
same weights, so they differ by arithmetic alone (`bounds.py` says how far they may). Where no
sample comes from exactly the actor's weights (rollout.overlap), the engine scores a few of the
batch's responses instead. A comparison past a bound warns and is repeated with the next batch;
after `agreement.breaches` in a row the run ends with the likely cause (`diagnosis.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.config import Config
from megatron_policysplit.errors import TrainingError, UserError
from megatron_policysplit.rows import Mode, Row, modes_in
from megatron_policysplit.training.agreement.bounds import (
    AgreementSettings,
    Bounds,
    Difference,
    choose_bounds,
)
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
    """The difference of each sampling mode, on the log-probs that came with the samples.

    Only rows count that were sampled by weights of `version` alone, and only behind the prompt
    they were sampled with. {} if there are none.

    old: the actor's statistics of the rows with those weights, at the sampling temperatures.
    """
    result = {}
    for mode in modes_in(rows):
        pairs = [
            (row, s)
            for row, s in zip(rows, old, strict=True)
            if row.mode == mode and _was_sampled_by(row, version)
        ]
        if pairs:
            result[mode] = Difference.of(
                [s.logprobs for _, s in pairs], sampled_logprobs([row for row, _ in pairs])
            )
    return result


def compare_by_scoring(rows: Sequence[Row], probe: Probe) -> dict[Mode, Difference]:
    """The difference of each sampling mode, on a few rows that the engine scores at temperature 1.

    For batches whose samples come from older weights: the engine scores with those it holds now.
    Collective over all ranks; {} on ranks that do not lead.
    """
    modes = modes_in(rows)
    rows = [
        row
        for mode in modes
        for row in excerpt([r for r in rows if r.mode == mode and r.on_policy])
    ]
    actor = probe.by_actor(rows, temperature=1.0)
    engine = probe.by_engine(rows, actor)
    result = {}
    for mode in modes:
        pairs = [(a, e) for row, a, e in zip(rows, actor, engine, strict=True) if row.mode == mode]
        if pairs:
            result[mode] = Difference.of(*zip(*pairs, strict=True))
    return result


def agreement_metrics(differences: Differences) -> dict[str, float]:
    """`agreement/<name>` over all modes and `agreement/<mode>/<name>` for each sampling mode.

    Names: difference and k3 (nats), and tokens, the number compared.
    """
    named = {f"{mode.value}/": difference for mode, difference in differences.items()}
    named[""] = Difference.merge(list(differences.values()))
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
    """Compares engine and actor when it is due, warns, and ends the run.

    Every rank makes one (`of`) and calls `check` for every batch. Its only state is whether it has
    compared yet and how many comparisons in a row failed. That need not outlive the process: the
    first batch of a resumed run is compared again.

    Args:
        settings: bounds, rhythm and what the diagnosis names.
        probe: asks engine and actor.
        log: where warnings go, by its `message(text)`.
    """

    def __init__(self, settings: AgreementSettings, probe: Probe, log: Any):
        self.settings, self.probe, self.log = settings, probe, log
        self.has_compared = False
        self.breaches = 0  # comparisons in a row that were past their bounds

    @classmethod
    def of(cls, config: Config, probe: Probe, log: Any) -> AgreementGate:
        """The gate of a run."""
        return cls(AgreementSettings.of(config), probe, log)

    def due(self, step: int) -> bool:
        """Whether the batch after `step` trained ones is compared."""
        every = self.settings.agreement.every
        # A replayed batch has no engine to compare with.
        if every == 0 or self.settings.engine == "replay":
            return False
        return not self.has_compared or self.breaches > 0 or step % every == 0

    def check(
        self,
        step: int,
        rows: Sequence[Row],
        old: Sequence[TokenStatistics],
        version: int,
        served: int,
    ) -> dict[str, float]:
        """Compare if it is due; return the comparison's metrics, or {} without one.

        To be called between scoring a batch and its update. Collective over all ranks. Raises
        TrainingError on every rank when the run must not go on.

        Args:
            step: number of trained batches before this one.
            rows: the batch; read on leaders.
            old: the actor's statistics of the rows at the sampling temperatures; read on leaders.
            version: weight version of the actor.
            served: weight version of the engines.
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
        self.has_compared = True
        # Scores are taken at temperature 1, whatever the samples' temperature.
        temperatures = self.settings.temperatures if sampled else dict.fromkeys(differences, 1.0)
        bounds = {mode: choose_bounds(self.settings, temperatures[mode]) for mode in differences}
        past = [mode for mode, gap in differences.items() if not bounds[mode].hold(gap)]
        self.breaches = self.breaches + 1 if past else 0
        if past:
            mode = max(past, key=lambda mode: differences[mode].rank)
            pairs = [
                (row, s)
                for row, s in zip(rows, old, strict=True)
                if row.mode == mode
                and (_was_sampled_by(row, version) if sampled else row.on_policy)
            ]
            suspects = _rows_past(bounds[mode], pairs) if sampled else [row for row, _ in pairs]
            counts = layout.broadcast_from_chief((len(suspects), len(pairs)))
            breach = Breach(mode, differences[mode], bounds[mode], sampled, suspects, *counts)
            self._warn_or_end(breach, step, rows)
        return agreement_metrics(differences) | {"agreement/breaches": float(self.breaches)}

    def _warn_or_end(self, breach: Breach, step: int, batch: Sequence[Row]) -> None:
        """Log the breach, or raise TrainingError with the likely cause if it is one too many."""
        limit = self.settings.agreement.breaches
        if self.breaches < limit:
            ends = f"the run ends after {limit} such comparisons in a row (agreement.breaches)"
            self.log.message(f"{breach.figures} before step {step + 1}; {ends}")
            return
        try:
            cause = diagnose(breach, batch, self.settings, self.probe)
        except UserError as error:
            cause = f"unknown, because the engine could not be asked ({error})"
        raise TrainingError(
            f"{breach.figures} before step {step + 1}, in comparison {self.breaches} in a row "
            f"(agreement.breaches); likely cause: {cause}"
        )


def _rows_past(bounds: Bounds, pairs: Sequence[tuple[Row, TokenStatistics]]) -> list[Row]:
    """The rows whose own figures, on the log-probs that came with the samples, are past bounds."""
    return [
        row
        for row, s in pairs
        if not bounds.hold(Difference.of([s.logprobs], sampled_logprobs([row])))
    ]


def _was_sampled_by(row: Row, version: int) -> bool:
    """Whether weights of `version` sampled every token of the row, behind this very prompt."""
    versions = (sampling_version for _, sampling_version in row.rollout.weight_versions)
    return row.on_policy and all(sampling_version == version for sampling_version in versions)
