"""What the `sglang` engine asked for and got, counted for the logs."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from megatron_policysplit.rollout.answers import Cause
from megatron_policysplit.rows import Mode


@dataclass
class ModeStats:
    """Counts over the accepted answers of one mode."""

    prompt_tokens: int = 0  # every prompt counted once a sample
    # Prompt tokens that the servers computed, by their own figures; others came from their caches.
    prefill_tokens: int = 0
    retries: Counter[Cause] = field(default_factory=Counter)  # samples and prefixes asked for again

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens from a cache; a prompt computed again makes it smaller."""
        return 1.0 - self.prefill_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def __add__(self, other: ModeStats) -> ModeStats:
        return ModeStats(
            self.prompt_tokens + other.prompt_tokens,
            self.prefill_tokens + other.prefill_tokens,
            self.retries + other.retries,
        )


@dataclass
class EngineStats:
    """Counts of one leader's engine between two `SglangEngine.metrics`."""

    requests: int = 0  # sent for rollouts over HTTP: repeated ones and those for prefixes included
    modes: dict[Mode, ModeStats] = field(default_factory=lambda: defaultdict(ModeStats))

    def __add__(self, other: EngineStats) -> EngineStats:
        modes = defaultdict(ModeStats, self.modes)
        for mode, stats in other.modes.items():
            modes[mode] = modes[mode] + stats
        return EngineStats(self.requests + other.requests, modes)

    def named(self) -> dict[str, float]:
        """Return the counts by the names of the logs; a mode that was not sampled is left out."""
        total = sum(self.modes.values(), ModeStats())
        result = {
            "rollout/engine_requests": self.requests,
            "rollout/engine_retries": total.retries.total(),
            **{f"rollout/engine_retries/{cause.value}": total.retries[cause] for cause in Cause},
            "rollout/prompt_tokens": total.prompt_tokens,
            "rollout/prefill_tokens": total.prefill_tokens,
            "rollout/cached_prompt_share": total.cached_share,
        }
        for mode, stats in self.modes.items():
            if stats.prompt_tokens or stats.retries:
                result |= {
                    f"rollout/{mode.value}/engine_retries": stats.retries.total(),
                    f"rollout/{mode.value}/prompt_tokens": stats.prompt_tokens,
                    f"rollout/{mode.value}/prefill_tokens": stats.prefill_tokens,
                    f"rollout/{mode.value}/cached_prompt_share": stats.cached_share,
                }
        return {name: float(value) for name, value in result.items()}
