"""SIGTERM and SIGINT, remembered. Light, so that a rank can install it before its slow imports."""

from __future__ import annotations

import signal


class StopRequested(Exception):
    """SIGTERM or SIGINT reached some rank: every rank raises this at the same point."""


class StopSignal:
    """Remembers SIGTERM and SIGINT instead of dying of them."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def install(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        self.received = signal.Signals(number)
