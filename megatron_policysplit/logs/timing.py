"""Seconds per phase of a step."""

from __future__ import annotations

import time
from contextlib import contextmanager


class Phases:
    """Seconds by phase: `with phases.measure("score"): ...` adds to `seconds["score"]`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str):
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def named(self) -> dict[str, float]:
        """The seconds by the names that logs have them under."""
        return {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}

    def add(self, other: Phases) -> None:
        """Add seconds that were measured elsewhere, such as by another thread."""
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
