"""The part of the mix that learns how much is added to items of the history."""

import numpy as np
import pytest
import scipy.optimize

from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.models.masks import NEVER
from jaxrec.models.repeat import AGO_EDGES, COUNT_EDGES, FEATURES, SIZES, STARTS, TABLE_SIZE
from jaxrec.training import mix
from jaxrec.training.mix import START, Candidates, choose, fit_weights, penalized_loss, seen_candidates, units
from tests.groceries import groceries
from tests.training.test_mix import candidates_of, drawn_targets


def random_places(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """[*shape, FEATURES] uint8: of each feature a bucket at random."""
    return np.stack([rng.integers(start, start + size, shape) for start, size in zip(STARTS, SIZES, strict=True)], -1)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Six cases of 7 candidates, of which the target and three more have places in the table, or none."""
    rng = np.random.default_rng(0)
    repeats = random_places((6, 4), rng)
    repeats[rng.random((6, 4)) < 0.3] = 0
    log_weight = np.where(rng.random((6, 7)) < 0.2, NEVER, rng.uniform(0, 3, (6, 7)))
    log_weight[:, 0] = 0
    found = Candidates(rng.normal(size=(6, 3, 7)), rng.normal(size=(6, 2, 7)), log_weight, repeats.astype(np.uint8))
    objective = penalized_loss(found, START, units(found, START))
    # Numbers that float32 holds exactly, with the steps of the finite differences.
    weights = np.round(rng.normal(size=5 + TABLE_SIZE) * 64) / 64
    weights[5] = 0.0  # place 0 adds nothing
    _, gradient = objective(weights)
    expected = scipy.optimize.approx_fprime(weights, lambda at: objective(at)[0], 2.0**-14)
    expected[5] = 0.0
    np.testing.assert_allclose(gradient, expected, atol=1e-3)
    assert (np.abs(gradient[6:]) > 0.01).sum() > TABLE_SIZE / 2


def test_the_table_that_made_the_targets_is_found() -> None:
    """Each of 3,000 cases has 10 items of the history and 20 others. The more events an item has, the more it is
    wanted; the more events came after it, the less."""
    rng = np.random.default_rng(1)
    cases, own, items = 3000, 10, 30
    wanted = np.zeros(TABLE_SIZE)
    wanted[STARTS[0] : STARTS[0] + SIZES[0]] = np.linspace(-1, 2, SIZES[0])
    wanted[STARTS[1] : STARTS[1] + SIZES[1]] = np.linspace(1, -2, SIZES[1])
    parts = (rng.normal(size=(cases, 3, items)) / (2 * np.array(mix.START)[:, None])).astype(np.float32)
    places = np.zeros((cases, items, FEATURES), np.uint8)
    places[:, :own] = random_places((cases, own), rng)
    logits = np.einsum("p,cpi->ci", mix.START, parts) + wanted[places].sum(axis=2)
    target = drawn_targets(logits, rng)
    rows = np.arange(cases)
    with_target = np.concatenate([target[:, None], np.tile(np.arange(items), (cases, 1))], axis=1)
    log_weight = np.zeros((cases, 1 + items))
    log_weight[rows, 1 + target] = NEVER  # the target is a candidate already
    found = fit_weights(
        Candidates(
            np.take_along_axis(parts, with_target[:, None], 2),
            np.zeros((cases, 0, 1 + items), np.float32),
            log_weight,
            np.concatenate([places[rows, target][:, None], places[:, :own]], axis=1),
        )
    )
    np.testing.assert_allclose(found[:3], mix.START, rtol=0.1)
    table = found[3:]
    assert table[0] == 0
    some = random_places((500,), rng)
    added, expected = table[some].sum(axis=1), wanted[some].sum(axis=1)
    assert np.abs(expected).mean() > 1
    np.testing.assert_allclose(added, expected, atol=0.8)
    assert np.abs(added - expected).mean() < 0.25


def test_the_fit_ends_at_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a log of groceries with 1,000 cases: there the slope of the loss is 0 but for rounding, for each weight and
    each number of the table. After 200 iterations it was 9e-6."""
    for name, count in (("SEEN", 30), ("BEST_OF_EACH", 10), ("SAMPLED", 60)):
        monkeypatch.setattr(mix, name, count)
    found = candidates_of(groceries(users=1000, items=200, staples=6, days=60, new_share=0.3, seed=0).log)
    objective = penalized_loss(found, START, units(found, START))
    weights = fit_weights(found)
    assert (weights[: len(START)] > 0).all()  # at its bound a weight may have a slope
    before, after = (np.abs(objective(at)[1]).max() for at in (np.append(START, 0 * weights[3:]), weights))
    assert before > 0.01
    assert after < 1e-6


def case(history: list[int], target: int, small_data: PreparedData) -> CaseBatch:
    """One case of `small_data` with another history, an event a day, and a request on the day after the last."""
    (batch,) = case_batches(small_data, small_data.split.test.at_most(1), 8, 1, exclude_seen=False)
    times = 86_400 * np.arange(len(history))[None]
    return batch._replace(
        history=np.array([history], np.int32),
        history_time=times,
        time=np.array([86_400 * len(history)]),
        target=np.array([target], np.int32),
    )


def test_candidates_are_the_target_then_items_of_the_history_then_others(small_data: PreparedData) -> None:
    """Of six items 2, 5 and 3 are of the history, and 3 and 5 are its candidates; the target is 5."""
    one = case([2, 5, 3], 5, small_data)
    parts, counts = np.zeros((1, 3, 7), np.float32), np.zeros((1, 6, 7), np.float32)
    chosen, log_weight = choose(parts, counts, one, np.zeros(7, bool), np.random.default_rng(0), np.array([[3, 5, 0]]))
    assert chosen[0, :4].tolist() == [5, 3, 5, 0]
    assert (log_weight[0, :4] > NEVER).tolist() == [True, True, False, False]
    others = chosen[0, 4:][log_weight[0, 4:] > NEVER]
    assert sorted(others) == [1, 4, 6]  # 2 is of the history, and no candidate
    assert set(log_weight[log_weight > NEVER].tolist()) == {0.0}


@pytest.mark.parametrize("target", [1, 4, 6])
def test_a_target_has_its_places_wherever_it_is(
    target: int, small_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the history 1, 2, 1, 3, 4, 5 the three latest items are candidates. Item 1 is not among them, 6 is new."""
    monkeypatch.setattr(mix, "SEEN", 3)
    items, places = seen_candidates(case([1, 2, 1, 3, 4, 5], target, small_data))
    assert items.tolist() == [[5, 4, 3]]
    assert (places.shape, places.dtype) == ((1, 4, FEATURES), np.uint8)
    count = lambda n: STARTS[0] + int(np.searchsorted(COUNT_EDGES, n, side="right"))  # noqa: E731
    ago = lambda n: STARTS[1] + int(np.searchsorted(AGO_EDGES, n, side="right"))  # noqa: E731
    of_target = {1: [count(2), ago(3)], 4: [count(1), ago(1)], 6: [0, 0]}[target]
    expected = [of_target, *([count(1), ago(n)] for n in range(3))]
    assert places[0, :, :2].tolist() == expected
    assert (places[0, 0] > 0).all() == (target != 6)


def test_a_short_history_is_filled_up(small_data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "SEEN", 3)
    items, places = seen_candidates(case([7], 7, small_data))
    assert items.tolist() == [[7, 0, 0]]
    np.testing.assert_array_equal(places[0, 0], places[0, 1])
    assert not places[0, 2:].any()
