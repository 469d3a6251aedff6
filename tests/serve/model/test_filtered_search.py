"""With an index, a filtered answer is that of the whole product among the allowed items."""

import dataclasses

import numpy as np
import pytest

from serve.model.directory import Artifact
from serve.model.ranking.engine import Engine, Ranking
from serve.model.ranking.faiss_index import ItemIndex
from serve.model.ranking.search import Search
from tests.serve.model.test_search import LARGE, assert_same, histories, index_of


def assert_as_good(found: Ranking, expected: Ranking) -> None:
    """Items whose scores are equal but for rounding may change places."""
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)
    assert len(np.union1d(found.items, expected.items)) <= len(found.items) + 1


def blocking(share: float, seed: int) -> np.ndarray:
    """[items + 1] bool: about that share is allowed."""
    blocked = np.random.default_rng(seed).random(LARGE + 1) >= share
    blocked[0] = True
    return blocked


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.1])
def test_of_few_allowed_items_the_answer_is_exact(large: Artifact, share: float) -> None:
    """No candidates are asked for: the allowed items are all looked at."""
    exact, index = Engine(large, "cpu", search_by="exact"), Engine(large, "cpu")
    for seed in range(5):
        rows = [dataclasses.replace(row, blocked=blocking(share, seed)) for row in histories(20 + seed, LARGE)]
        for row, found, expected in zip(rows, index.rank(rows, 20), exact.rank(rows, 20), strict=True):
            assert row.blocked is not None
            left = np.setdiff1d(np.flatnonzero(~row.blocked), row.exclude)
            assert len(found.items) == min(20, len(left))
            assert_as_good(found, expected)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
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


def test_a_filtered_row_gets_as_many_candidates_as_another_one(
    large: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is asked for 1.5 times as many as the share of allowed items demands, and for none where an eighth or
    less is allowed; it is searched for the next power of two."""
    search = Search(large, dataclasses.replace(index_of(large), candidates=90, candidates_per_answer=1))
    searched, original = [], ItemIndex.search
    monkeypatch.setattr(ItemIndex, "search", lambda *given: searched.append(given[2]) or original(*given))
    query = large.item_vectors[5:6]
    state, nothing = np.zeros((1, len(index_of(large).recent_weights)), np.float32), np.zeros((1, 1), np.int32)
    trending = search.trending(np.zeros(LARGE + 1, np.float32))
    for every in (1, 2, 8):
        blocked = np.arange(LARGE + 1) % every > 0
        search.best(query, state, nothing, np.array([10]), trending, blocked=[blocked])
    assert searched == [128, 512]  # from 100 and 300
