#!/usr/bin/env python3
"""Writes tests/prove/statistics_table.inc: reference values for src/prove/statistics.h.

Wilson and McNemar come from statsmodels. The two paired score intervals have no implementation
there, so they are found the long way: the likelihood under the hypothesis is maximised by a
bounded numerical search over one free probability, and the score test is inverted by brentq.
Neither step uses the closed forms that the C++ code uses.

    python3 tests/parity/expect_statistics.py > tests/prove/statistics_table.inc

Needs scipy and statsmodels.
"""
import math

from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

PROPORTIONS = [(0, 1), (1, 1), (0, 20), (20, 20), (1, 20), (13, 20), (81, 263), (870, 1000),
               (999, 1000), (12345, 14042)]
PAIRS = [(43, 0, 1, 0), (212, 144, 256, 707), (4, 9, 3, 16), (80, 5, 15, 0), (10, 10, 10, 10),
         (20, 0, 0, 0), (19, 0, 0, 1), (0, 7, 3, 10), (15, 5, 0, 3), (15, 0, 5, 3), (820, 31, 44, 105),
         (900, 1, 2, 97), (0, 5, 0, 5), (0, 0, 5, 5)]


def log(x, count):
    if count == 0:
        return 0.0
    return count * math.log(x) if x > 0 else -math.inf


def most_likely(cells, free_range, probabilities):
    """The probabilities (both, only a, only b, neither) that maximise the likelihood."""
    low, high = free_range
    found = minimize_scalar(
        lambda x: -sum(log(p, n) for p, n in zip(probabilities(x), cells)),
        bounds=(low, high), method="bounded", options={"xatol": 1e-15, "maxiter": 500})
    best = min([low, found.x, high], key=lambda x: -sum(log(max(p, 0.0), n) for p, n in
                                                        zip(probabilities(x), cells)))
    return probabilities(best)


def difference_score(cells, d):
    both, a, b, neither = cells
    n = sum(cells)
    # only_b = x, only_a = x + d; both and neither share the rest as they do in the data.
    share = both / (both + neither) if both + neither else 0.5

    def probabilities(x):
        rest = 1 - 2 * x - d
        return (share * rest, x + d, x, (1 - share) * rest)
    p = most_likely(cells, (max(0.0, -d), (1 - d) / 2), probabilities)
    variance = n * (p[1] + p[2] - d * d)
    return (a - b - n * d) / math.sqrt(variance)


def ratio_score(cells, r):
    both, a, b, neither = cells
    n = sum(cells)
    m = both + a + b

    # accuracy b = q, accuracy a = r q; P(neither) = neither / n leaves both = (1 + r) q - m / n.
    def probabilities(q):
        p11 = (1 + r) * q - m / n
        return (p11, r * q - p11, q - p11, neither / n)
    q_low = (m / n) / (1 + r)
    q_high = min((m / n) / r, m / n)
    p = most_likely(cells, (q_low, q_high), probabilities)
    p1, p2 = p[0] + p[1], p[0] + p[2]
    variance = n * (p1 + r * r * p2 - 2 * r * p[0])
    return (both + a - r * (both + b)) / math.sqrt(variance)


def invert(score, z, low, high):
    at = lambda x: score(x) - z
    return brentq(at, low, high, xtol=1e-13) if at(low) * at(high) < 0 else None


def difference_interval(cells, confidence):
    z = norm.ppf(0.5 + confidence / 2)
    estimate = (cells[1] - cells[2]) / sum(cells)
    tiny = 1e-9
    low = invert(lambda d: difference_score(cells, d), z, -1 + tiny, estimate - tiny)
    high = invert(lambda d: difference_score(cells, d), -z, estimate + tiny, 1 - tiny)
    return low if low is not None else -1.0, high if high is not None else 1.0


def ratio_interval(cells, confidence):
    z = norm.ppf(0.5 + confidence / 2)
    both, a, b, _ = cells
    first, second = both + a, both + b
    tiny = 1e-7
    low, high = 0.0, math.inf
    if first:
        low = invert(lambda r: ratio_score(cells, r), z, tiny,
                     first / second - tiny if second else 1e6)
    if second:
        high = invert(lambda r: ratio_score(cells, r), -z,
                      first / second + tiny if first else tiny, 1e6)
    return low, high


def mid_p(cells):
    a, b = cells[1], cells[2]
    n, k = a + b, min(a, b)
    seen = binom.pmf(k, n, 0.5)
    total = 0.0
    for i in range(n + 1):  # less likely splits count whole, equally likely ones half
        p = binom.pmf(i, n, 0.5)
        total += p if p < seen * (1 - 1e-9) else p / 2 if p < seen * (1 + 1e-9) else 0
    return total


def number(x):
    return "kInfinity" if x == math.inf else repr(float(x))


def main():
    print("// Written by tests/parity/expect_statistics.py.")
    print("constexpr WilsonRow kWilson[] = {")
    for correct, total in PROPORTIONS:
        for confidence in (0.95, 0.99):
            low, high = proportion_confint(correct, total, 1 - confidence, method="wilson")
            print(f"    {{{correct}, {total}, {confidence}, {number(low)}, {number(high)}}},")
    print("};")
    print("constexpr PairedRow kPaired[] = {")
    for cells in PAIRS:
        both, a, b, neither = cells
        exact = mcnemar([[both, a], [b, neither]], exact=True).pvalue if a + b else 1.0
        values = [exact, mid_p(cells), *difference_interval(cells, 0.95),
                  *ratio_interval(cells, 0.95)]
        print(f"    {{{{{both}, {a}, {b}, {neither}}}, " + ", ".join(map(number, values)) + "},")
    print("};")


if __name__ == "__main__":
    main()
