"""How sure a measured accuracy is."""

import math

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): it stays within [0, 1] and holds for small counts."""
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that two models are equally good (McNemar 1947), by the binomial distribution.

    only_a, only_b: questions that A alone and B alone answers right; those where both agree say nothing.
    """
    n = only_a + only_b
    ways = tail = 1  # n over k, and their sum; each from the one before, as math.comb anew took seconds for n = 9,000
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(2 * tail / 2**n, 1.0)
