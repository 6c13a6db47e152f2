"""How sure a measured accuracy is."""

import math

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): it stays within [0, 1] and holds for small counts."""
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)
