"""How far a few numbers can be trusted: intervals that would hold the truth 19 times in 20."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""With fewer runs of a model, how much the seed moves its score is not known well enough to call one better."""


def t_quantile(probability: float, degrees: float) -> float:
    """The t with P(|T| < t) = probability, for Student's T.

    With T = sqrt(degrees) tan(angle), the density over the angle is proportional to cos(angle)^(degrees - 1).
    """
    angle = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(probability * below[-1], below, angle)))


def half_width(values: Sequence[float]) -> float | None:
    """Half the interval of a mean over seeds; None with fewer than LEAST_SEEDS."""
    if len(values) < LEAST_SEEDS:
        return None
    return t_quantile(CONFIDENCE, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def difference(a: Sequence[float], b: Sequence[float], *, comparisons: int = 1) -> tuple[float, float] | None:
    """(mean of a - mean of b, half its interval), by Welch; None with fewer than LEAST_SEEDS of either.

    Whoever makes many comparisons finds a large gap by chance, so the interval is widened for their number
    (Bonferroni).
    """
    if min(len(a), len(b)) < LEAST_SEEDS:
        return None
    gap = statistics.mean(a) - statistics.mean(b)
    parts = [statistics.variance(a) / len(a), statistics.variance(b) / len(b)]
    if sum(parts) == 0:
        return gap, 0.0
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    probability = 1 - (1 - CONFIDENCE) / comparisons
    return gap, t_quantile(probability, degrees) * math.sqrt(sum(parts))


def binomial(share: float, n: int) -> tuple[float, float]:
    """The interval of a share found in n trials (Wilson, 1927)."""
    if n < 1:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
