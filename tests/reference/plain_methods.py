"""The methods beside Policy Split in plain Python: one token at a time, lists and loops, from the papers' formulas.

They share nothing with the product but the row and option dataclasses. Statistics of a token are given as
(log-prob, entropy); which tokens count is given as a set of (row key, position).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_policysplit.rows import Row, RowKey

Token = tuple[RowKey, int]


@dataclass
class Terms:
    """Of one token: advantage, factor of the policy term, weight of its entropy, weight of |log pi - log pi_old|;
    weight of its nucleus entropy in the mean over rows."""

    advantage: float
    scale: float = 1.0
    entropy: float = 0.0
    drift: float = 0.0
    nucleus: float = 0.0


@dataclass
class Seen:
    """rows: all of the batch. old, now [token]: (log-prob, entropy) before the batch, and now. counted: trained tokens
    of the statistics. prompt: mean log-prob of a row's prompt, nucleus: entropies over nuclei, where
    the method takes them."""

    rows: Sequence[Row]
    old: Mapping[Token, tuple[float, float]]
    now: Mapping[Token, tuple[float, float]]
    counted: set[Token]
    prompt: Mapping[RowKey, float] = field(default_factory=dict)
    nucleus: Mapping[Token, float] = field(default_factory=dict)

    def rewards_of(self, row: Row) -> list[float]:
        mine = (row.key.question, row.key.training_mode)
        return [
            other.rollout.reward
            for other in self.rows
            if (other.key.question, other.key.training_mode) == mine and not other.rollout.auxiliary
        ]


def terms(name: str, seen: Seen, options, state: dict[str, float]) -> tuple[dict[Token, Terms], dict[str, float]]:
    """What every token of every row is trained with, and the state after it."""
    per_row = {row.key: advantage(name, row, seen, options) for row in seen.rows}
    found = {token: Terms(per_row[token[0]] if token in seen.counted else 0.0) for token in seen.now}
    shape = {
        "entropy_bonus": entropy_bonus,
        "adaptive_entropy": adaptive_entropy,
        "aepo": measured,
        "scope": measured,
        "entropy_adv": entropy_adv,
        "forking_tokens": forking_tokens,
        "clip_cov": clip_cov,
        "kl_cov": kl_cov,
        "steer": steer,
        "epo": epo,
        "aer": aer,
        "siren": siren,
    }.get(name)
    if shape is not None:
        state = shape(found, seen, options, state) or state
    return found, state


def advantage(name: str, row: Row, seen: Seen, options) -> float:
    """A_i of a response."""
    if row.rollout.auxiliary:
        return 1.0
    rewards, reward = seen.rewards_of(row), row.rollout.reward
    if len(set(rewards)) == 1:
        return 0.0
    mean = statistics.mean(rewards)
    if name in ("dr_grpo", "siren"):
        return reward - mean
    if name == "rloo":
        others = list(rewards)
        others.remove(reward)
        return reward - statistics.mean(others)
    if name == "asym_grpo":
        p = sum(r > 0.5 for r in rewards) / len(rewards)
        if p in (0, 1):
            return 0.0
        return ((1 - p) / p) ** options.beta_pos if reward > 0.5 else -((p / (1 - p)) ** options.beta_neg)
    z = (reward - mean) / (statistics.stdev(rewards) + 1e-6)
    if name == "edge_grpo":
        group = [other for other in seen.rows if other.key.group == row.key.group]
        entropies = {other.key: row_entropy(other, seen) for other in group}
        present = [entropy for entropy in entropies.values() if entropy is not None]
        if not present:
            return z
        own = entropies[row.key] or 0.0
        return z / max(own / statistics.mean(present), options.least)
    if name == "arm":
        ranked = sorted(seen.now[token][0] for token in seen.counted if token[0] == row.key)
        if ranked:
            lowest = ranked[: math.ceil(options.share * len(ranked))]
            z += options.alpha * (math.exp(seen.prompt[row.key]) - math.exp(statistics.mean(lowest)))
    return z


def row_entropy(row: Row, seen: Seen) -> float | None:
    values = [seen.now[token][1] for token in seen.counted if token[0] == row.key]
    return statistics.mean(values) if values else None


def mean_entropy(seen: Seen) -> float:
    return statistics.mean(seen.now[token][1] for token in seen.counted)


def entropy_bonus(found, seen, options, state):
    for term in found.values():
        term.entropy = options.coef


def adaptive_entropy(found, seen, options, state):
    low = mean_entropy(seen) <= options.target
    for term in found.values():
        term.entropy = state["coef"] if low else 0.0
    coef = state["coef"] + (options.delta if low else -options.delta)
    return {"coef": max(0.0, min(coef, options.coef_max))}


def measured(found, seen, options, state):
    auxiliary = {row.key for row in seen.rows if row.rollout.auxiliary}
    return {"entropy": statistics.mean(seen.now[token][1] for token in seen.counted if token[0] not in auxiliary)}


def entropy_adv(found, seen, options, state):
    for token in seen.counted:
        term = found[token]
        term.advantage += min(options.alpha * seen.now[token][1], abs(term.advantage) / options.kappa)


def forking_tokens(found, seen, options, state):
    ranked = sorted((seen.now[token][1] for token in seen.counted), reverse=True)
    bound = ranked[max(1, math.ceil(options.share * len(ranked))) - 1]
    for token, term in found.items():
        term.scale = 1.0 if seen.now[token][1] >= bound else 0.0


def covariances(found, seen) -> dict[Token, float]:
    mean_a = statistics.mean(found[token].advantage for token in seen.counted)
    mean_l = statistics.mean(seen.now[token][0] for token in seen.counted)
    return {t: (found[t].advantage - mean_a) * (seen.now[t][0] - mean_l) for t in seen.counted}


def clip_cov(found, seen, options, state):
    """With a ratio of 1 or more, where every candidate is cut and none is drawn. The clip is the method's, [0, 2]."""
    assert options.ratio >= 1
    for token, covariance in covariances(found, seen).items():
        ratio, a = math.exp(seen.now[token][0] - seen.old[token][0]), found[token].advantage
        clipped = (a > 0 and ratio > 2) or (a < 0 and ratio < 0)
        if options.low < covariance < options.high and not clipped:
            found[token].scale = 0.0


def kl_cov(found, seen, options, state):
    ranked = sorted(covariances(found, seen).items(), key=lambda item: -item[1])
    for token, _ in ranked[: max(1, math.floor(options.share * len(ranked)))]:
        found[token].drift = options.beta


def steer(found, seen, options, state):
    change = {}
    for token in seen.counted:
        (now, entropy), (old, _) = seen.now[token], seen.old[token]
        p = math.exp(now)
        change[token] = abs(found[token].advantage / math.exp(old) * p * (1 - p) * (now + entropy))
    largest, smallest = max(change.values()), min(change.values())
    for token, size in change.items():
        if options.variant == "exp":
            rate = -math.log(options.low) / max(largest, 0.02)
            found[token].scale = max(options.low, min(1.0, math.exp(-rate * size)))
        else:
            share = (size - smallest) / (largest - smallest)
            found[token].scale = options.high - (options.high - options.low) * share


def epo(found, seen, options, state):
    """Without a history no penalty; each token's weight is minus the slope of its part of the loss, by differences."""
    step = int(state["steps"])
    half = options.decay_steps // 2
    if step <= half:
        weight = 0.8 + 0.2 * math.exp(-2 * step / half)
    else:
        weight = 0.8 * math.exp(-3 * min(1.0, (step - half) / (options.decay_steps - half)))
    low, high = options.kappa_low * state["history"], options.kappa_high * state["history"]

    def part(entropy):
        outside = low - entropy if entropy < low else max(0.0, entropy - high)
        smooth = outside**2 if options.penalty == "squared" and step else 0.0
        return -options.coef * (entropy - options.smoothing * weight * smooth)

    for token in seen.counted:
        entropy = seen.now[token][1]
        found[token].entropy = (part(entropy - 1e-5) - part(entropy + 1e-5)) / 2e-5
    return {"steps": step + 1, "history": (state["history"] * step + mean_entropy(seen)) / (step + 1)}


def aer(found, seen, options, state):
    for row in seen.rows:
        rewards = seen.rewards_of(row)
        accuracy = sum(reward > 0.5 for reward in rewards) / len(rewards)
        for token in seen.counted:
            if token[0] == row.key and accuracy < options.rho:
                found[token].entropy = state["coef"] * (1 - accuracy / options.rho)
    initial = state.get("initial", mean_entropy(seen))
    coef = state["coef"] + options.rate * (options.tau * initial - mean_entropy(seen))
    return {"coef": max(0.0, min(coef, options.coef_max)), "initial": initial}


def siren(found, seen, options, state):
    kept = {}
    for row in seen.rows:
        mine = sorted((token for token in seen.counted if token[0] == row.key), key=lambda token: -seen.nucleus[token])
        if mine:
            kept[row.key] = mine[: math.ceil(options.share * len(mine))]
    mean = statistics.mean(statistics.mean(seen.nucleus[token] for token in tokens) for tokens in kept.values())
    anchor = state.get("anchor", mean)
    for tokens in kept.values():
        for token in tokens:
            found[token].nucleus = -2 * options.beta * (mean - anchor) / len(tokens)
    return {"anchor": anchor, "entropy": mean}
