"""The interface of sinks, the places that logs go to."""

from __future__ import annotations

import re

# Keys whose value is left out of logs: api_key, my_password, hf-token ...
SECRET = re.compile(
    r"(^|[_\-.])((api|access|private|secret)_?key|secrets?|passwd|passwords?|token|credentials?"
    r"|authorization)$",
    re.I,
)


class Sink:
    """Receives what the chief rank logs. A sink overrides the calls it has a use for.

    Metric names are flat with slashes (`normal/reward`). A sink shows or stores every metric it
    gets, known or not. Entropies and KL are in nats, `time/*_s` in seconds.
    """

    def start(self, step: int) -> None:
        """Called once before anything else. `step` is the last trained step, 0 for a fresh run."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one training step."""

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of an evaluation with the weights after `step` (names `eval/<mode>/...`)."""

    def rollouts(self, step: int, records: list[dict]) -> None:
        """Every rollout of one step, as JSON-able records."""

    def eval_rollouts(self, step: int, records: list[dict]) -> None:
        """Every rollout of an evaluation with the weights after `step`, likewise."""

    def message(self, text: str) -> None:
        """A sentence for the user."""

    def close(self) -> None:
        """Called once, at the end or on an error."""


def without_secrets(config: dict) -> dict:
    """A copy of a nested config without the entries whose key looks like a secret."""

    def clean(value):
        if isinstance(value, dict):
            return {
                name: clean(item) for name, item in value.items() if not SECRET.search(str(name))
            }
        return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value

    return clean(config)
