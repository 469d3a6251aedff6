"""Resampling of whole groups of rows with replacement, since rows of one user depend on each other."""

from collections.abc import Iterator

import numpy as np

DRAWS_AT_A_TIME = 100_000  # that are held in memory; they fit a core's cache, which halves the time


def group_sums(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """The sums of values over the rows of each group.

    Args:
        values: [rows, parts].
        groups: [rows] labels; None: each row is a group.

    Returns:
        [groups, parts], in the order of the sorted labels.

    Raises:
        ValueError: There is not one group for each row.

    Examples:
        >>> group_sums(np.array([[1.0], [2.0], [4.0]]), np.array(["a", "b", "a"]))
        array([[5.],
               [2.]])
    """
    if groups is None:
        return values
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} rows, expected one for each")
    labels, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(labels), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def resampled_counts(groups: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is drawn in each bootstrap sample, a chunk of samples at a time.

    A chunk @ `group_sums` gives the sums of its samples.

    Args:
        groups: how many there are; a sample draws as many.
        samples: how many samples there are in all chunks.
        seed: of the draws.

    Yields:
        [samples of the chunk, groups] float64.

    Examples:
        >>> next(resampled_counts(groups=3, samples=2, seed=0)).sum(axis=1)
        array([3., 3.])
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, DRAWS_AT_A_TIME // groups)
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        draws = rng.integers(groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        yield np.bincount(draws.ravel(), minlength=size * groups).reshape(size, groups).astype(np.float64)
