"""Requests of random histories, and when two rankings are the same; for the tests of the search."""

import numpy as np

from serve.model.directory import Artifact, IndexFiles
from serve.model.features import Features
from serve.model.ranking.engine import Ranking

LARGE = 3000
"""Items of the model `large`, of which its index names some hundreds."""


def index_of(artifact: Artifact) -> IndexFiles:
    assert artifact.index is not None
    return artifact.index


def histories(exclude: int, items: int) -> list[Features]:
    """Of 1 to 30 events; excluded are that many other items."""
    random = np.random.default_rng(exclude)
    rows = []
    for length in (1, 2, 7, 30):
        rating = random.random(length, np.float32)
        gap = random.integers(0, 10**6, length).astype(np.float32)
        item = random.integers(1, items + 1, length).astype(np.int32)
        others = random.permutation(items)[:exclude].astype(np.int32) + 1
        rows.append(Features(item, rating, gap, 3600.0, others))
    return rows


def assert_same(found: Ranking, expected: Ranking) -> None:
    np.testing.assert_array_equal(found.items, expected.items)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)
