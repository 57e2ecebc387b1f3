"""SIGTERM and SIGINT, remembered until all ranks can stop at the same point.

Imports nothing slow: a rank installs the handler before its imports, which take seconds.
"""

from __future__ import annotations

import signal


class StopRequested(Exception):
    """SIGTERM or SIGINT reached some rank: every rank raises this at the same point."""


class StopSignal:
    """Remembers SIGTERM and SIGINT instead of ending the process. One per rank.

    `Control` looks at `received` at every heartbeat.
    """

    def __init__(self):
        self.received: signal.Signals | None = None

    def install(self) -> StopSignal:
        """Take both signals from now on (in the main thread); returns itself."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        self.received = signal.Signals(number)
