"""Means with their 95 % intervals (Student's t)."""

import math
from dataclasses import dataclass

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Mean:
    mean: float
    half: float  # half the width of the 95 % interval; NaN where one value says nothing of it
    n: int

    @property
    def low(self):
        return self.mean - self.half

    @property
    def high(self):
        return self.mean + self.half


def mean_of(values):
    values = list(values)
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Mean(mean, math.nan, n)
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    return Mean(mean, t_quantile(n - 1) * math.sqrt(variance / n), n)


def mean_of_groups(groups):
    """The mean of the means of groups of values (the average over the sets of a benchmark), each counting the same;
    what varies is the samples within each. Degrees of freedom by Welch and Satterthwaite, rounded down."""
    means = [mean_of(group) for group in groups]
    mean, n = sum(m.mean for m in means) / len(means), sum(m.n for m in means)
    if min(m.n for m in means) < 2:
        return Mean(mean, math.nan, n)
    squares = [(m.half / t_quantile(m.n - 1)) ** 2 for m in means]  # the standard error of each group's mean
    if not any(squares):
        return Mean(mean, 0.0, n)
    freedom = sum(squares) ** 2 / sum(square**2 / (m.n - 1) for square, m in zip(squares, means, strict=True))
    return Mean(mean, t_quantile(math.floor(freedom + 1e-9)) * math.sqrt(sum(squares)) / len(means), n)


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom; for more the expansion about the normal
    distribution (Abramowitz and Stegun 26.7.5), within 0.12 %."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
