"""The log with known transitions: it is drawn from the probabilities that it says, and nobody repeats an item."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench.sequential_log import ITEMS_FILE, LOG_FOLDER, Transitions, activities, best_scorer, histories, write_log
from jaxrec.config import PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases

ITEMS = 500


def test_draws_have_the_probabilities() -> None:
    transitions, rng, draws = Transitions.of(ITEMS), np.random.default_rng(0), 400_000
    probabilities = transitions.probabilities(np.array([199, 3]), np.array([499, 3]))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
    cdf = np.concatenate([[0.0], np.cumsum(transitions.popularity)])
    source = np.where(rng.random(draws) < 0.7, 199, 499)
    shares = np.bincount(transitions.draw(source, cdf, rng), minlength=ITEMS) / draws
    np.testing.assert_allclose(shares, probabilities[0], atol=5 * np.sqrt(probabilities[0].max() / draws))


def test_the_first_steps_of_a_circle_are_the_likeliest() -> None:
    (found,) = Transitions.of(ITEMS).probabilities(np.array([199]), np.array([199]))
    assert np.argsort(-found)[:3].tolist() == [100, 101, 102]  # items 100 to 199 are a circle


def test_users_have_the_events_asked_for_and_repeat_no_item() -> None:
    rng = np.random.default_rng(0)
    counts = activities(200, 8_000, 20, rng)
    assert counts.sum() == 8_000
    assert counts.min() >= 20
    for items, count in zip(histories(Transitions.of(ITEMS), counts, rng), counts, strict=True):
        assert (items[:count] >= 0).all()
        assert (items[count:] == -1).all()
        assert len(np.unique(items[:count])) == count


def test_more_events_than_can_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="60 distinct events of 100 items"):
        histories(Transitions.of(100), np.array([60]), np.random.default_rng(0))
    with pytest.raises(ValueError, match="150 items do not make whole circles of 100"):
        Transitions.of(150)


def test_the_ranking_by_probability_is_as_good_as_it_says(tmp_path: Path) -> None:
    """Its NDCG@10 is what the probabilities of the ten best items let expect."""
    write_log(tmp_path, 3_000, ITEMS, 90_000)
    data = prepare(tmp_path / LOG_FOLDER, tmp_path / ITEMS_FILE, PrepareConfig(min_movie_ratings=0))
    assert len(data.catalog) == ITEMS
    assert data.histories.event_count == 90_000
    cases, places = data.split.test, np.asarray(data.catalog.ids.raw_ids) - 1
    histories, transitions, expected = data.histories, Transitions.of(ITEMS), []
    for user, row in zip(cases.users, cases.rows, strict=True):
        past = places[histories.items[histories.offsets[user] : row] - 1]
        (found,) = transitions.probabilities(past[-1:], past[-2:-1])
        found[past] = 0.0
        expected.append(np.sort(found / found.sum())[::-1][:10] @ (1 / np.log2(np.arange(2, 12))))
    ranks = rank_cases(best_scorer(data, ITEMS), data, cases, 200, request_time=False).ranks
    gained = ndcg(ranks, 10)
    assert abs(gained.mean() - np.mean(expected)) < 3 * gained.std() / np.sqrt(len(gained))
    assert np.mean(expected) > 0.2


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        write_log(tmp_path / name, 50, ITEMS, 1_500, seed=seed)
    one, two, other = (pq.read_table(tmp_path / name / LOG_FOLDER) for name in ("one", "two", "other"))
    assert one.equals(two)
    assert not one.equals(other)
    times = one["timestamp"].to_numpy()
    assert (np.diff(times)[np.diff(one["userId"].to_numpy()) == 0] > 0).all()
