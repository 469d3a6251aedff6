"""With an index, a filtered answer is that of the whole product among the allowed items."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest

from serve.model.directory import Artifact
from serve.model.ranking.engine import Engine, Ranking
from serve.model.ranking.faiss_index import ItemIndex
from serve.model.ranking.search import NEVER, Search
from tests.serve.model.rankings import LARGE, assert_same, histories, index_of


def assert_as_good(found: Ranking, expected: Ranking) -> None:
    """Items whose scores are equal but for rounding may change places."""
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)
    assert len(np.union1d(found.items, expected.items)) <= len(found.items) + 1


def blocking(share: float, seed: int) -> np.ndarray:
    """[items + 1] bool: about that share is allowed."""
    blocked = np.random.default_rng(seed).random(LARGE + 1) >= share
    blocked[0] = True
    return blocked


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many items the index was searched, in the order of the searches."""
    found, original = [], ItemIndex.search
    monkeypatch.setattr(ItemIndex, "search", lambda *given: found.append(given[2]) or original(*given))
    return found


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.025])
def test_of_few_allowed_items_the_answer_is_exact(large: Artifact, share: float, searched: list[int]) -> None:
    """The index is not searched: every allowed item is a candidate."""
    exact, index = Engine(large, "cpu", search_by="exact"), Engine(large, "cpu")
    searched.clear()  # loading checks the index
    for seed in range(5):
        rows = [dataclasses.replace(row, blocked=blocking(share, seed)) for row in histories(20 + seed, LARGE)]
        for row, found, expected in zip(rows, index.rank(rows, 20), exact.rank(rows, 20), strict=True):
            assert row.blocked is not None
            left = np.setdiff1d(np.flatnonzero(~row.blocked), row.exclude)
            assert len(found.items) == min(20, len(left))
            assert_as_good(found, expected)
    assert searched == []


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_of_many_allowed_items_the_index_finds_the_best(large: Artifact, share: float) -> None:
    """As well as of all items, and among rows without blocked items whose answers stay as they are."""
    exact, index = Engine(large, "cpu", search_by="exact"), Engine(large, "cpu")
    rows = [row for seed in range(20, 30) for row in histories(seed, LARGE)]
    masked = [dataclasses.replace(row, blocked=blocking(share, at)) for at, row in enumerate(rows)]
    mixed = index.rank([row for pair in zip(masked, rows, strict=True) for row in pair], 10)
    kept = []
    for row, found, expected in zip(masked, mixed[::2], exact.rank(masked, 10), strict=True):
        assert row.blocked is not None
        assert len(found.items) == 10
        assert not row.blocked[found.items].any()
        kept.append(np.isin(found.items, expected.items).mean())
    assert np.mean(kept) >= 0.99
    for found, alone in zip(mixed[1::2], index.rank(rows, 10), strict=True):
        assert_same(found, alone)


def test_where_the_index_names_only_blocked_items_all_others_are_looked_at(large: Artifact) -> None:
    """What is allowed is the worse half of the ranking, of which the index names nothing."""
    exact, index = Engine(large, "cpu", search_by="exact"), Engine(large, "cpu")
    for row in histories(0, LARGE):
        (whole,) = exact.rank([row], LARGE)
        blocked = np.ones(LARGE + 1, bool)
        blocked[whole.items[LARGE // 2 :]] = False
        masked = dataclasses.replace(row, blocked=blocked)
        (found,), (expected,) = index.rank([masked], 10), exact.rank([masked], 10)
        assert_as_good(found, expected)


def test_a_filtered_row_gets_as_many_candidates_as_another_one(large: Artifact, searched: list[int]) -> None:
    """The index is asked for 1.5 times as many as the share of allowed items demands, and for none where 1/32 or less
    is allowed; it is searched for the next power of two."""
    search = Search(large, dataclasses.replace(index_of(large), candidates=90, candidates_per_answer=1))
    searched.clear()
    query = large.item_vectors[5:6]
    state, nothing = np.zeros((1, len(index_of(large).recent_weights)), np.float32), np.zeros((1, 1), np.int32)
    trending = search.trending(np.zeros(LARGE + 1, np.float32))
    for every in (1, 2, 8, 32):
        blocked = np.arange(LARGE + 1) % every > 0
        search.best(query, state, nothing, np.array([10]), trending, blocked=[blocked])
    assert searched == [128, 512, 2048]  # from 100, 300 and 1200


class Vectors(np.ndarray):
    """Notes how many rows each copy of some of them has."""

    copied: ClassVar[list[int]] = []

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, np.ndarray) and self.ndim == 2:
            self.copied.append(len(key))
        return super().__getitem__(key)


def test_an_answer_from_many_allowed_items_copies_no_vectors(large: Artifact) -> None:
    """All 1,000 allowed items are asked for, more than the index names: every item is multiplied where it lies."""
    watched = dataclasses.replace(large, item_vectors=large.item_vectors.view(Vectors))
    search, (query, state) = Search(watched, index_of(large)), (large.item_vectors[5:6], np.zeros((1, 100), np.float32))
    trending, blocked = search.trending(np.zeros(LARGE + 1, np.float32)), np.arange(LARGE + 1) % 3 > 0
    Vectors.copied.clear()
    items, scores = search.best(
        query, state, np.array([[3, 6]], np.int32), np.array([LARGE]), trending, None, [blocked]
    )
    assert Vectors.copied == []
    found = items[0, scores[0] > NEVER]
    np.testing.assert_array_equal(np.sort(found), np.arange(9, LARGE + 1, 3))
    expected = large.item_vectors[found] @ query[0] + index_of(large).item_bias[found]
    neighbours = np.isin(found, index_of(large).neighbour_item[0])
    np.testing.assert_allclose(scores[0, : len(found)][~neighbours], expected[~neighbours], rtol=0, atol=1e-4)
    assert not np.isin(items[0], np.flatnonzero(blocked[1:]) + 1).any()


def test_a_few_blocked_items_cost_no_wider_search(large: Artifact, searched: list[int]) -> None:
    """As a catalogue has them that hides a few items: no more candidates are asked for than those and the items."""
    index = Engine(large, "cpu")
    rows = histories(20, LARGE)
    whole = index.rank(rows, 10)
    few = np.zeros(LARGE + 1, np.bool_)
    few[[0, *(ranking.items[0] for ranking in whole)]] = True
    searched.clear()
    index.rank(rows, 10)
    expected = list(searched)
    searched.clear()
    blocked = index.rank([dataclasses.replace(row, blocked=few) for row in rows], 10)
    assert searched == expected
    for found, before in zip(blocked, whole, strict=True):
        assert not few[found.items].any()
        left = [item for item in before.items.tolist() if not few[item]]
        assert found.items[: len(left)].tolist() == left
