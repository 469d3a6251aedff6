"""The index of the items: what it finds is measured, and an index that misses too much is refused."""

import faiss
import numpy as np
import pytest

from jaxrec.errors import ExportError
from jaxrec.onnx.ann_index import LEAST_RECALL, Probes, build_index, choose_candidates, index_points

ITEMS, WIDTH = 3000, 16
NO_TREND = np.zeros(ITEMS + 1, np.float32)


def items(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around 30 centres, and biases; row 0 is padding."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, WIDTH))
    vectors = (centres[rng.integers(0, 30, ITEMS + 1)] + 0.3 * rng.normal(size=(ITEMS + 1, WIDTH))).astype(np.float32)
    vectors[0] = 0
    return vectors, rng.gamma(1.0, 0.5, ITEMS + 1).astype(np.float32)


def probes(seed: int = 7) -> dict[str, Probes]:
    rng = np.random.default_rng(seed)
    exclude = rng.integers(0, ITEMS + 1, (50, 20)).astype(np.int32)
    query = rng.normal(size=(50, WIDTH)).astype(np.float32)
    return {"validation": Probes(query, exclude), "made_up": Probes(3 * query[::-1], np.zeros((50, 1), np.int32))}


@pytest.mark.parametrize("trending", [0.0, 0.02], ids=["no-trend", "trend"])
def test_what_the_manifest_says_of_recall_is_what_the_index_does(trending: float) -> None:
    vectors, bias = items(0)
    asked = probes()
    trend = np.where(np.random.default_rng(1).random(ITEMS + 1) < trending, 1.5, 0).astype(np.float32)
    index = build_index(vectors, bias, trend, asked)
    loaded = faiss.deserialize_index(np.frombuffer(index.content, np.uint8))
    for kind, of_kind in asked.items():
        # The candidates were chosen on the others.
        query, exclude = of_kind.query[1::2], of_kind.exclude[1::2]
        logits = query @ vectors.T + bias + trend
        np.put_along_axis(logits, exclude.astype(np.int64), -np.inf, axis=1)
        queries = index_points(query, np.ones(25, np.float32))
        excluded = (exclude > 0).sum(axis=1)
        for k, reported in ((10, index.recall[kind].of_top), (100, index.recall[kind].of_many)):
            best = np.argsort(-logits[:, 1:], axis=1)[:, :k] + 1
            found = [
                np.union1d(loaded.search(row[None], int(index.candidates + 4 * k + m))[1][0] + 1, np.flatnonzero(trend))
                for row, m in zip(queries, excluded, strict=True)
            ]
            assert reported == pytest.approx(
                np.mean([np.isin(row, ids).mean() for row, ids in zip(best, found, strict=True)])
            )
        assert index.recall[kind].of_top >= LEAST_RECALL
        assert index.recall[kind].probes == 25
    # Else the test would show nothing.
    assert index.candidates < ITEMS / 2


def test_the_same_items_give_the_same_index() -> None:
    one, other = (build_index(*items(1), NO_TREND, probes()).content for _ in range(2))
    assert one == other


def test_an_index_of_other_items_is_refused() -> None:
    index = faiss.deserialize_index(np.frombuffer(build_index(*items(2), NO_TREND, probes()).content, np.uint8))
    vectors, bias = items(3)
    few = {"made_up": Probes(probes()["made_up"].query, np.zeros((50, 1), np.int32))}
    # All of the 3,000 items would be found among 4,000 candidates, hence many more points.
    points = np.concatenate([index_points(vectors[1:], bias[1:])] * 3)
    points[ITEMS:] += 5
    with pytest.raises(ExportError, match=r"index: 4000 candidates hold 0\.\d+ of the 10 best items .* --index never"):
        choose_candidates(index, points, np.zeros(len(points)), few)


def test_neither_kind_of_request_makes_up_for_the_other() -> None:
    """Many requests that find all their items do not hide the few that don't."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, WIDTH + 1)).astype(np.float32)
    points[:10_000, 0] += 20
    points[10_000:, 0] -= 20
    # Those on the left are in the places of others.
    index = faiss.IndexFlatIP(WIDTH + 1)
    index.add(np.concatenate([points[:10_000], points[:9_999:-1]]))
    queries = rng.normal(size=(404, WIDTH)).astype(np.float32)
    queries[:400, 0], queries[400:, 0] = 5, -5
    nothing = np.zeros((400, 1), np.int32)
    right, left = Probes(queries[:400], nothing), Probes(queries[400:], nothing[:4])
    _, recall = choose_candidates(index, points, np.zeros(len(points)), {"validation": right})
    assert recall["validation"].of_top == 1
    with pytest.raises(ExportError, match=r"on 2 requests \(made_up\), expected 0\.99 or more"):
        choose_candidates(index, points, np.zeros(len(points)), {"validation": right, "made_up": left})


def test_too_few_items_for_an_index_are_refused() -> None:
    vectors, bias = items(4)
    with pytest.raises(ExportError, match=r"index: the catalogue has 15 items, expected 16 or more; .* --index never"):
        build_index(vectors[:16], bias[:16], NO_TREND[:16], probes())
    assert build_index(vectors[:17], bias[:17], NO_TREND[:17], {}).candidates > 0
