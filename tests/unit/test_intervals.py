import math

import pytest
from scipy import stats

from megatron_policysplit.study.intervals import estimate, t_distribution, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 101])
def test_students_t_against_scipy(degrees):
    for t in (0.0, 0.3, 1.0, 2.7, 40.0):
        assert t_distribution(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
    for probability in (0.6, 0.9, 0.975, 0.999):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


def test_quantiles_that_are_not_computed():
    for arguments in ((0.5, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="is not computed here"):
            t_quantile(*arguments)


def test_an_estimate_by_hand_and_by_scipy():
    values = [1.0, 2.0, 4.0, 5.0]
    found = estimate(values)
    s = math.sqrt((4 + 1 + 1 + 4) / 3)
    assert (found.n, found.mean) == (4, 3.0)
    assert found.high - 3.0 == pytest.approx(3.182446 * s / 2, rel=1e-6)  # t(0.975; 3) of the tables
    low, high = stats.t.interval(0.95, 3, loc=3.0, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert estimate([]) is None
    assert (estimate([2.0]).mean, estimate([2.0]).low) == (2.0, None)
