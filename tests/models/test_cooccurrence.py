"""Co-occurrence counts, by hand and by their properties, and the item vectors that models start from."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from jaxrec.config import PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, TIME, TITLE, USER
from jaxrec.data.shares import share_of
from jaxrec.models import neighbours as cooccurrence
from jaxrec.models.neighbours import (
    BACKWARD,
    LAG_DECAY,
    POWER,
    Neighbours,
    Together,
    initial_embedding,
    neighbours,
    randomized_eigenpairs,
)


def log(*histories: str) -> PreparedData:
    """One letter an event, in order. Under leave-one-out a user's last two events are not training: here they are
    two items without training events."""
    events = [(user, item) for user, text in enumerate(histories, 1) for item in [*text, "y", "z"]]
    interactions = pd.DataFrame(
        {
            USER: [user for user, _ in events],
            ITEM: [item for _, item in events],
            TIME: 1_000_000_000 + np.arange(len(events)),
        }
    )
    letters = sorted({item for _, item in events})
    movies = pd.DataFrame({ITEM: letters, TITLE: letters, GENRES: ["Drama"] * len(letters)})
    return prepare(interactions, movies, PrepareConfig(min_user_ratings=1, min_movie_ratings=1))


def table(data: PreparedData, found: Neighbours) -> dict[tuple[str, str], float]:
    names = ["", *data.catalog.ids.raw_ids]
    return {
        (names[item], names[neighbour]): float(weight)
        for item in range(len(found.item))
        for neighbour, weight in zip(found.item[item], found.weight[item], strict=True)
        if neighbour
    }


def test_counts_by_hand() -> None:
    """abc and ab: a comes before b twice, before c once at lag 2; counts are a 2, b 2, c 1."""
    data = log("abc", "ab")
    found = table(data, neighbours(data))
    expected = {
        ("a", "b"): 2 / 2,
        ("b", "a"): BACKWARD * 2 / 2,
        ("b", "c"): 1 / 2**POWER,
        ("c", "b"): BACKWARD / 2 ** (1 - POWER),
        ("a", "c"): LAG_DECAY / 2**POWER,
        ("c", "a"): BACKWARD * LAG_DECAY / 2 ** (1 - POWER),
    }
    assert found == pytest.approx(expected)


def test_pairs_stay_within_a_user_and_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "WINDOW", 1)
    data = log("abc", "de")
    assert set(table(data, neighbours(data))) == {
        *[("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")],
        *[("d", "e"), ("e", "d")],
    }


def test_chunks_and_blocks_do_not_change_the_counts(small_data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = neighbours(small_data)
    assert len(cooccurrence._row_blocks(small_data.train_popularity())) == 1
    monkeypatch.setattr(cooccurrence, "PAIRS_PER_CHUNK", 37)
    monkeypatch.setattr(cooccurrence, "CELLS_PER_BLOCK", 300)
    assert len(cooccurrence._row_blocks(small_data.train_popularity())) > 5
    for left, right in zip(neighbours(small_data), whole, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_count_together_count_as_one(
    count: int, small_data: PreparedData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = neighbours(small_data)
    monkeypatch.setattr(cooccurrence, "CELLS_PER_BLOCK", 300)
    barrier = threading.Barrier(count)

    def process(index: int) -> Neighbours:
        share = share_of(small_data, index, count).with_popularity(small_data.train_popularity())
        return neighbours(share, together=Together(index, count, tmp_path, lambda point: barrier.wait(60)))

    with ThreadPoolExecutor(count) as pool:
        first, *_ = pool.map(process, range(count))
    for left, right in zip(first, whole, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_strongest_are_kept_best_first(small_data: PreparedData) -> None:
    whole, few = neighbours(small_data), neighbours(small_data, width=5)
    assert (np.diff(whole.weight) <= 0).all()
    np.testing.assert_array_equal(few.item, whole.item[:, :5])
    assert not whole.item[0].any()
    assert (whole.item[1:] != np.arange(1, len(whole.item))[:, None]).all()


def test_only_training_events_count() -> None:
    data = log("ab")
    assert set(table(data, neighbours(data))) == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize("dense", [True, False])
def test_initial_vectors_point_where_items_occur_together(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of items that are never met together: closer within a group than between the groups."""
    if not dense:
        monkeypatch.setattr(cooccurrence, "DENSE_ITEMS", 0)
    rng = np.random.default_rng(0)
    data = log(*("".join(rng.permutation(list(group))) for _ in range(30) for group in ("abcdef", "ghijkl")))
    embedding = initial_embedding(neighbours(data), 4)
    assert embedding.shape == (len(data.catalog) + 1, 4)
    assert embedding.std() == pytest.approx(cooccurrence.INITIAL_DEVIATION, rel=1e-5)
    place = {name: i + 1 for i, name in enumerate(data.catalog.ids.raw_ids)}
    first, second = ([place[name] for name in group] for group in ("abcdef", "ghijkl"))
    products = embedding @ embedding.T
    within = min(products[np.ix_(group, group)].min() for group in (first, second))
    assert within > products[np.ix_(first, second)].max()
    assert not embedding[[0, place["y"], place["z"]]].any()


@pytest.mark.parametrize("items", [300, 1500])
def test_the_randomized_factorization_is_the_exact_one(items: int) -> None:
    """On a matrix with groups of items that occur together, and noise: as a co-occurrence table is."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, items)
    together = (groups[:, None] == groups) * rng.random((items, items)) + 0.2 * (rng.random((items, items)) < 0.05)
    matrix = np.triu(together, 1) + np.triu(together, 1).T
    sparse = scipy.sparse.csr_array(matrix.astype(np.float32))
    values, vectors = randomized_eigenpairs(lambda columns: sparse @ columns, items, 64)
    exact, exact_vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(values, exact[-64:], rtol=0.05)
    np.testing.assert_allclose(values[-40:], exact[-40:], rtol=1e-3)
    products = (vectors * values) @ vectors.T
    best = (exact_vectors[:, -64:] * exact[-64:]) @ exact_vectors[:, -64:].T
    error, least = (np.linalg.norm(matrix - approximation) for approximation in (products, best))
    assert error < 1.01 * least


def test_without_pairs_there_is_nothing_to_start_from() -> None:
    data = log("a", "b")
    assert not neighbours(data).weight.any()
    assert not initial_embedding(neighbours(data), 4).any()
