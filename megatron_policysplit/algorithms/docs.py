"""Renders docs/methods.md: the methods' defaults, then each module's docstring and option keys.

`python -m megatron_policysplit.algorithms.docs` prints the page.
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

<!-- Written by `python -m megatron_policysplit.algorithms.docs`; a test compares it. -->

`algorithm.name` selects the method. Each is one file in `megatron_policysplit/algorithms/methods/`:
pure functions that turn the rewards, log-probs and entropies of a batch into the advantage of every
response token, and into the weights of further loss terms if the method has any. A notebook can
call them. [new_method.md](new_method.md) shows how to add one. A method's own keys are under
`algorithm.options.NAME`, with the defaults of its paper where nothing else is said:

    policysplit train run.yaml algorithm.name=asym_grpo algorithm.options.asym_grpo.beta_pos=0.8

The keys directly under `algorithm` are those that all methods share: PPO's clip, dual clip, loss
aggregation, KL and entropy terms, importance weights ([configuration.md](configuration.md)). Where
one of them is null, the method's own default holds, which is in the table below.

Two of these keys say what a method's statistics are computed from:

- `algorithm.statistics` selects the weights. `batch`: those before the batch. They are the current
  weights at the batch's first optimizer step, and cost nothing beyond the pass that the ratio
  needs. `step`: the current weights at every step; each step after the first then begins with one
  more forward pass over its rows.
- `algorithm.scope` selects the tokens that quantiles, covariances, maxima and means are over.
  `global`: all trained tokens. `micro`: those of a micro-batch, as in some of the authors'
  programs; results then depend on its size.

## Symbols

- *group*: the responses to one question under one training mode; `mean r` and `std r` are over the
  rewards of a group. A training mode is the prompt that a response is trained under. All methods
  except `policy_split` have the normal mode alone.
- `r_i`, `A_i`: reward and advantage of response i. A right answer has a reward above 0.5. GRPO's
  advantage is `A_i = (r_i - mean r) / (std r + 1e-6)`, with the unbiased std. `A_t` is the
  advantage of the response at its token t, and `A~` one that a method has changed.
- `pi(t)`, `pi_old(t)`: probability of token t under the current policy, and under the policy before
  the batch. `r_t = pi(t) / pi_old(t)` is the ratio that PPO clips.
- `H_t`: exact entropy of the next-token distribution over the whole vocabulary. Entropies and
  log-probs are in nats, at the sampling temperature.
- *trained token*: a response token in the loss mask.
- *score pass*: the forward pass without a gradient that computes log-probs and entropies before an
  update. What a method makes of them is a constant in the loss.
- `L_GRPO`: GRPO's loss, that is PPO's clipped loss with GRPO's advantages.
- *state*: numbers that a method carries from one optimizer step to the next. They are logged as
  `method/NAME` and saved in checkpoints.

## Defaults of the shared keys

| method | source | clip low, high | dual clip | aggregation |
|---|---|---|---|---|
"""


def render() -> str:
    """The whole page as Markdown."""
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
        # The docstring is the module's, so that formulas stand in the method's own file.
        method, module = method_named(name), sys.modules[f"{methods.__name__}.{name}"]
        parts.append(f"\n## {name}\n\n{module.__doc__.strip()}\n")
        keys = list_keys(method.options, f"algorithm.options.{name}.")
        if keys:
            parts.append("\n| key | default | allowed | meaning |\n|---|---|---|---|\n")
            parts += [row(key) for key in keys]
    return "".join(parts)


def _bound(value: float | None) -> str:
    """A clip in a cell of the table; None and infinity both mean that there is none."""
    return "none" if value is None or math.isinf(value) else show(value)


if __name__ == "__main__":
    print(render(), end="")
