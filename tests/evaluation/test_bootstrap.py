"""Bootstrap intervals by user: their width, their coverage, and that users are what is resampled."""

import math

import numpy as np
import pytest

from jaxrec.evaluation.bootstrap import bootstrap, draw_counts, ratio, resample


def test_interval_of_independent_cases_is_the_normal_one() -> None:
    values = (np.arange(400) % 4 == 0).astype(float)  # mean 1/4, standard error sqrt(3/16 / 400)
    estimate = bootstrap(values, resample(np.arange(400)))
    error = math.sqrt(3 / 16 / 400)
    assert estimate.mean == 1 / 4
    assert estimate.low == pytest.approx(1 / 4 - 1.96 * error, abs=error / 3)
    assert estimate.high == pytest.approx(1 / 4 + 1.96 * error, abs=error / 3)
    with pytest.raises(ValueError, match="no cases"):
        resample(np.array([]))


def test_users_are_drawn_with_all_their_cases() -> None:
    """Of two users of unlike size a resample holds both, or one of them twice."""
    users, values = np.array([3, 3, 3, 8]), np.array([0.0, 0.0, 0.0, 1.0])
    resamples = resample(users, samples=2000)
    counts = np.concatenate(list(resamples.counts()))
    assert counts.sum(axis=1).tolist() == [2] * 2000
    assert set(map(tuple, counts.tolist())) == {(2, 0), (1, 1), (0, 2)}
    estimate = bootstrap(values, resamples)
    assert (estimate.mean, estimate.low, estimate.high) == (1 / 4, 0.0, 1.0)


def test_the_order_of_cases_and_the_labels_of_users_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    users, values, order = rng.integers(30, size=200), rng.normal(size=200), rng.permutation(200)
    expected = bootstrap(values, resample(users))
    found = bootstrap(values[order], resample(users[order] * 5 + 1))
    np.testing.assert_allclose((found.mean, found.low, found.high), (expected.mean, expected.low, expected.high))


def test_a_ratio_is_paired_by_case() -> None:
    values = np.random.default_rng(0).uniform(1, 2, 100)
    estimate = bootstrap(np.stack([3 * values, values], axis=1), resample(np.arange(100)), ratio)
    np.testing.assert_allclose((estimate.mean, estimate.low, estimate.high), 3.0)


def test_values_of_other_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="values of 3 cases, resamples of 4"):
        bootstrap(np.zeros(3), resample(np.arange(4)))


def test_draws_in_chunks_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draw_counts(7, 20, seed=3)))
    monkeypatch.setattr("jaxrec.evaluation.bootstrap.DRAWS_AT_A_TIME", 30)
    chunks = list(draw_counts(7, 20, seed=3))
    assert len(chunks) == 5
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_draws_of_many_users_are_made_again_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, users = np.random.default_rng(0).normal(size=40), np.repeat(np.arange(20), 2)
    kept = resample(users)
    monkeypatch.setattr("jaxrec.evaluation.bootstrap.MOST_KEPT", 20 * 1000 - 1)
    drawn_again = resample(users)
    assert kept.kept is not None
    assert drawn_again.kept is None
    assert bootstrap(values, drawn_again) == bootstrap(values, kept)


def test_intervals_cover_the_truth_where_users_have_many_cases() -> None:
    """100 users with 10 cases each; a case hits with its user's own probability. Intervals that resample cases are too
    narrow, intervals that resample users are not."""
    worlds, users, cases = 200, 100, 10
    rng = np.random.default_rng(0)
    hits = rng.random((worlds, users, cases)) < rng.beta(0.5, 0.5, (worlds, users, 1))  # mean 1/2
    columns = hits.reshape(worlds, -1).astype(float)

    def covered(groups: np.ndarray) -> float:
        resamples = resample(groups)
        estimates = [bootstrap(values, resamples) for values in columns]
        return float(np.mean([estimate.low <= 0.5 <= estimate.high for estimate in estimates]))

    assert 0.90 <= covered(np.repeat(np.arange(users), cases)) <= 0.98
    assert covered(np.arange(users * cases)) < 0.80
