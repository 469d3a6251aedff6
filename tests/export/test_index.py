"""The index of the items: what it finds is measured, and an index that misses too much is refused."""

import faiss
import numpy as np
import pytest

from jaxrec.export.errors import ExportError
from jaxrec.export.index import LEAST_RECALL, Probes, build_index, choose_candidates, index_points

ITEMS, WIDTH = 3000, 16


def items(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around 30 centres, and biases; row 0 is padding."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, WIDTH))
    vectors = (centres[rng.integers(0, 30, ITEMS + 1)] + 0.3 * rng.normal(size=(ITEMS + 1, WIDTH))).astype(np.float32)
    vectors[0] = 0
    return vectors, rng.gamma(1.0, 0.5, ITEMS + 1).astype(np.float32)


def probes(excluded: int = 20) -> Probes:
    rng = np.random.default_rng(7)
    exclude = rng.integers(0, ITEMS + 1, (50, excluded)).astype(np.int32)
    return Probes(rng.normal(size=(50, WIDTH)).astype(np.float32), exclude)


def test_what_the_manifest_says_of_recall_is_what_the_index_does() -> None:
    vectors, bias = items(0)
    asked = probes()
    index = build_index(vectors, bias, asked)
    loaded = faiss.deserialize_index(np.frombuffer(index.content, np.uint8))
    logits = asked.query @ vectors.T + bias
    np.put_along_axis(logits, asked.exclude.astype(np.int64), -np.inf, axis=1)
    best = np.argsort(-logits[:, 1:], axis=1)[:, :10] + 1
    queries = index_points(asked.query, np.ones(50, np.float32))
    excluded = (asked.exclude > 0).sum(axis=1)
    found = [
        loaded.search(query[None], int(index.candidates + 4 * 10 + m))[1][0] + 1
        for query, m in zip(queries, excluded, strict=True)
    ]
    recall = np.mean([np.isin(row, ids).mean() for row, ids in zip(best, found, strict=True)])
    assert recall == pytest.approx(index.recall)
    assert index.recall >= LEAST_RECALL
    assert index.probes == 50
    # Else the test would show nothing.
    assert index.candidates < ITEMS / 2


def test_the_same_items_give_the_same_index() -> None:
    one, other = (build_index(*items(1), probes()).content for _ in range(2))
    assert one == other


def test_an_index_of_other_items_is_refused() -> None:
    index = faiss.deserialize_index(np.frombuffer(build_index(*items(2), probes()).content, np.uint8))
    vectors, bias = items(3)
    few = Probes(probes().query, np.zeros((50, 1), np.int32))
    # All of the 3,000 items would be found among 4,000 candidates, hence many more points.
    points = np.concatenate([index_points(vectors[1:], bias[1:])] * 3)
    points[ITEMS:] += 5
    with pytest.raises(ExportError, match=r"index: 4000 candidates hold 0\.\d+ of the 10 best items .* --index never"):
        choose_candidates(index, points, few)
