"""Renders docs/methods.md from the methods' files: `python -m
megatron_policysplit.algorithms.docs`.
"""

from __future__ import annotations

import math
import sys

from megatron_policysplit.algorithms import methods
from megatron_policysplit.algorithms.methods import DEFAULTS, METHOD_NAMES, method_named
from megatron_policysplit.config.docs import row
from megatron_policysplit.config.keys import list_keys, show

_HEAD = """\
# Methods

<!-- Written by `python -m megatron_policysplit.algorithms.docs`; a test compares it with the code. -->

`algorithm.name` chooses the method. Each is one file in `megatron_policysplit/algorithms/methods/`
and a pure function of rewards, log-probs and entropies, which a notebook can call;
[new_method.md](new_method.md) adds one. Its own keys stand under `algorithm.options.NAME`, with
the defaults of its paper:

    policysplit train run.yaml algorithm.name=asym_grpo algorithm.options.asym_grpo.beta_pos=0.8

What methods share are the keys of `algorithm`: PPO's clip, dual clip, loss aggregation, KL and entropy terms,
importance weights ([configuration.md](configuration.md)). A null there is the method's own default, in the table below.

`algorithm.statistics` says of which weights a method's statistics are. `batch`: those before the batch, which are the
current ones at its first optimizer step, and cost nothing beyond the pass that the ratio needs. `step`: the current
ones at every step; each step but the first then begins with one more forward pass over its rows. `algorithm.scope` says
over which tokens quantiles, covariances, maxima and means are: all trained ones (`global`), or those of a micro-batch
(`micro`), as some of the authors' programs have it, with results that depend on its size.

| method | from | clip low, high | dual clip | aggregation |
|---|---|---|---|---|
"""


def render() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name in METHOD_NAMES:
        method = method_named(name)
        loss = {"dual_clip": None, **DEFAULTS, **method.loss}
        clip = f"{_bound(loss['clip_low'])}, {_bound(loss['clip_high'])}"
        cells = (
            f"[`{name}`](#{name})",
            method.source,
            clip,
            _bound(loss["dual_clip"]),
            loss["loss_aggregation"],
        )
        parts.append("| " + " | ".join(cells) + " |\n")
    for name in METHOD_NAMES:
        method = method_named(name)
        parts.append(
            f"\n## {name}\n\n{sys.modules[f'{methods.__name__}.{name}'].__doc__.strip()}\n"
        )
        keys = list_keys(method.options, f"algorithm.options.{name}.")
        if keys:
            parts.append("\n| key | default | allowed | meaning |\n|---|---|---|---|\n")
            parts += [row(key) for key in keys]
    return "".join(parts)


def _bound(value: float | None) -> str:
    return "none" if value is None or math.isinf(value) else show(value)


if __name__ == "__main__":
    print(render(), end="")
