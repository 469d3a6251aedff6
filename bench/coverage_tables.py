"""Tables of how often intervals cover a truth that is known, in Markdown."""

import itertools
from typing import NamedTuple

import numpy as np

from bench.intervals import student

SIZES = (0, 10, 30, 100, 300, np.inf)  # bins of the effective sample size


class Coverage(NamedTuple):
    """One interval of one log: which, its truth, value and ends, and the effective sample size."""

    name: str
    truth: float
    value: float
    low: float
    high: float
    size: float


def over_seeds(figures: list[float]) -> str:
    """Mean and 95 % t interval over the seeds."""
    mean, half = student(figures)
    return f"{mean:.3f} ± {half:.3f}"


def coverage_table(by_seed: list[list[Coverage]]) -> list[str]:
    names = list(dict.fromkeys(one.name for one in by_seed[0]))
    lines = ["| | covers the truth | truth below | truth above | median width | mean error |", "|---" * 6 + "|"]
    for name in names:
        cells = [[one for one in intervals if one.name == name] for intervals in by_seed]
        every = [one for cell in cells for one in cell]
        covered = over_seeds([np.mean([one.low <= one.truth <= one.high for one in cell]) for cell in cells])
        below, above = (np.mean([test(one) for one in every]) for test in (_below, _above))
        width, error = np.median([one.high - one.low for one in every]), np.mean([o.value - o.truth for o in every])
        lines.append(f"| {name} | {covered} | {below:.3f} | {above:.3f} | {width:.3f} | {error:+.4f} |")
    return lines


def _below(one: Coverage) -> bool:
    return one.truth < one.low


def _above(one: Coverage) -> bool:
    return one.truth > one.high


def size_table(intervals: list[Coverage], names: tuple[str, ...]) -> list[str]:
    """Coverage by the effective sample size of the log."""
    labels = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(SIZES)]
    lines = ["| effective sample size | logs | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for label, (low, high) in zip(labels, itertools.pairwise(SIZES), strict=True):
        cells, count = [], 0
        for name in names:
            found = [one for one in intervals if one.name == name and low <= one.size < high]
            count = len(found)
            covered = np.mean([one.low <= one.truth <= one.high for one in found]) if found else np.nan
            width = np.median([one.high - one.low for one in found]) if found else np.nan
            cells.append(f"{covered:.3f} (width {width:.2f})" if found else "")
        lines.append(f"| {label} | {count} | " + " | ".join(cells) + " |")
    return lines
