"""nanochat.evaluate.intervals: known values, and that intervals hold as often as they say."""

import math

import pytest

from nanochat.evaluate.intervals import McNemar, combined, mean, t_quantile, wilson


def test_wilson_is_right_and_sensible_at_the_ends():
    assert wilson(10, 20) == pytest.approx((0.29930, 0.70070), abs=1e-5)
    assert wilson(0, 50)[0] == 0 and 0.05 < wilson(0, 50)[1] < 0.09
    assert wilson(50, 50)[1] == pytest.approx(1) and wilson(50, 50)[0] == pytest.approx(1 - wilson(0, 50)[1])
    assert all(math.isnan(end) for end in wilson(0, 0))


@pytest.mark.parametrize("n, p", [(10, 0.1), (10, 0.5), (40, 0.02), (40, 0.9), (100, 0.25)])
def test_wilson_holds_about_as_often_as_it_says(n, p):
    held = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert 0.91 < held < 0.99


# scipy.stats.t.ppf(0.975, freedom), scipy 1.16
@pytest.mark.parametrize(
    "freedom, t",
    [(1, 12.706204736), (2, 4.302652730), (3, 3.182446305), (4, 2.776445105), (9, 2.262157163), (101, 1.983731003)],
)
def test_t_is_students(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=1e-8)


def test_the_mean_over_seeds():
    middle, low, high = mean([1.0, 2.0, 3.0])
    assert middle == 2 and high - 2 == pytest.approx(4.302652730 / math.sqrt(3)) == pytest.approx(2 - low)
    assert mean([0.5]) == (0.5, -math.inf, math.inf)


def test_a_mean_of_scores_is_surer_than_each():
    scores = [(0.5, 0.4, 0.6), (0.1, 0.05, 0.2), (0.0, 0.0, 0.04)]
    middle, low, high = combined(scores)
    assert middle == pytest.approx(0.2)
    assert middle - low == pytest.approx(math.hypot(0.1, 0.05) / 3) and high - middle > middle - low
    assert combined([(0.5, 0.4, 0.6)]) == pytest.approx((0.5, 0.4, 0.6))


# scipy.stats.binomtest(only_a, only_a + only_b).pvalue
@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (3, 9, 0.14599609375),
        (0, 5, 0.0625),
        (4, 4, 1.0),
        (0, 0, 1.0),
        (480, 510, 0.356701401637),
        (600, 500, 0.002819544991),
    ],
)
def test_the_exact_test(only_a, only_b, p):
    assert McNemar(2000, only_a, only_b).p == pytest.approx(p, rel=1e-9) == McNemar(2000, only_b, only_a).p


@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize("a, b", [(0.1, 0.1), (0.05, 0.2), (0.3, 0.1), (0.02, 0.02)])
def test_the_differences_interval_holds_about_as_often_as_it_says(n, a, b):
    held = 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            ways = math.comb(n, i) * math.comb(n - i, j)
            low, high = McNemar(n, i, j).interval
            if low <= a - b <= high:
                held += ways * a**i * b**j * (1 - a - b) ** (n - i - j)
    assert held > 0.93
    assert McNemar(n, 3, 1).interval == pytest.approx(tuple(-end for end in reversed(McNemar(n, 1, 3).interval)))
