"""Student's interval of a mean; each report writes it in its own format."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def student(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its 95 % t interval) of values [at least 2], which are taken as independent."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)
