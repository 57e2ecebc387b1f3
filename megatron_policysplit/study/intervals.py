"""Means of a handful of values with confidence intervals of Student's t.

Five seeds are too few for a bootstrap: with n = 5 it resamples from a spread that is too small by
sqrt((n - 1) / n) and knows nothing of the tails. The t interval is exact for normal values at any
n >= 2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of n values and its confidence interval, made by `estimate`."""

    n: int
    mean: float
    low: float | None  # ends of the interval; None for a single value
    high: float | None


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """The mean with mean -+ t * s / sqrt(n), t of n - 1 degrees of freedom; None without values."""
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(1, mean, None, None)
    half = t_quantile((1 + confidence) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half)


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, by bisection of its distribution function.

    Raises ValueError unless 0.5 < probability < 1 and degrees >= 1.
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(
            f"the {probability} quantile of t with {degrees} degrees of freedom is not computed "
            "here"
        )
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        high *= 2
    for _ in range(100):  # far below the resolution of a double
        middle = (low + high) / 2
        low, high = (
            (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
        )
    return (low + high) / 2


def t_distribution(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom.

    By the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return 0.5 + inside / 2
