"""The cap of new items: the first ten stay as they were, and new items come from place 11 on, in their own order."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.models.new_items import GAP, capped_logits


def order(logits: np.ndarray, exclude: list[int]) -> list[int]:
    """Items, best first, without the excluded ones."""
    return [int(i) for i in np.argsort(-logits, kind="stable") if i != 0 and i not in exclude]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 30), st.integers(0, 6))
def test_the_first_ten_known_items_stay_the_first_and_new_ones_keep_their_order(
    seed: int, known_count: int, new_count: int, excluded: int
) -> None:
    rng = np.random.default_rng(seed)
    items = known_count + new_count
    logits = np.concatenate([[NEVER], rng.normal(0, 4, items)]).astype(np.float32)
    new = np.zeros(items + 1, bool)
    new[1 + rng.permutation(items)[:new_count]] = True
    exclude = (1 + rng.permutation(items)[:excluded]).tolist()
    row = jnp.asarray([[*exclude, 0]], jnp.int32)
    capped = np.asarray(capped_logits(jnp.asarray(logits[None]), jnp.asarray(new), row))[0]
    np.testing.assert_array_equal(capped[~new], logits[~new])
    assert (capped[new] <= logits[new] + 1e-6).all()
    known = [item for item in order(logits, exclude) if not new[item]]
    assert order(capped, exclude)[: min(10, len(known))] == known[:10]
    if known:
        tenth = logits[known[:10][-1]]
        below = new & (logits < tenth - 2 * GAP)
        np.testing.assert_array_equal(capped[below], logits[below])
    ours, own = capped[new], logits[new]
    assert (np.diff(ours[np.argsort(own)]) >= 0).all()


def test_a_new_item_is_at_place_11_however_high_its_logit() -> None:
    logits = jnp.asarray([[0.0, *np.arange(20.0, 0, -1), 1e6, 30.0]])
    capped = np.asarray(capped_logits(logits, jnp.arange(23) > 20))[0]
    assert order(capped, [])[8:14] == [9, 10, 21, 22, 11, 12]
    # Without the history, here the three best, the tenth is three places further down.
    capped = np.asarray(capped_logits(logits, jnp.arange(23) > 20, jnp.array([[1, 2, 3, 0]])))[0]
    assert order(capped, [1, 2, 3])[8:13] == [12, 13, 21, 22, 14]


@pytest.mark.parametrize("known", [0, 1, 9])
def test_with_fewer_than_ten_known_items_new_ones_follow_all_of_them(known: int) -> None:
    logits = jnp.asarray([[0.0, *np.arange(known), 50.0, 60.0]])
    capped = np.asarray(capped_logits(logits, jnp.arange(known + 3) > known))[0]
    assert order(capped, []) == [*range(known, 0, -1), known + 2, known + 1]


def test_a_hybrid_without_new_items_scores_known_ones_as_before_and_new_ones_by_the_least_bias(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> None:
    plain = random_hybrid(small_data, 3, False)
    new = np.arange(len(small_data.catalog) + 1) % 6 == 2
    hybrid = Hybrid(plain.lstm, plain.content, plain.cooccurrence, plain.mix_weights(), plain.trend, new_items=new)
    assert plain.without_new_items() is plain
    left_out = hybrid.without_new_items()
    assert left_out.new_items is None
    np.testing.assert_array_equal(left_out.item_vectors()[~new], plain.item_vectors()[~new])
    np.testing.assert_array_equal(left_out.item_bias()[~new], plain.item_bias()[~new])
    np.testing.assert_allclose(np.asarray(left_out.item_vectors())[new], 0, atol=1e-6)
    assert np.asarray(left_out.item_bias())[new].max() <= np.asarray(plain.item_bias())[1:][~new[1:]].min() + 1e-6
    # For every history a new item's score is that bias, which is not the last of all.
    queries = np.random.default_rng(0).normal(size=(50, hybrid.item_vectors().shape[1]))
    scores = (queries @ np.asarray(left_out.item_vectors()).T + np.asarray(left_out.item_bias()))[:, 1:]
    np.testing.assert_allclose(np.ptp(scores[:, new[1:]], axis=0), 0, atol=1e-5)
    assert (scores[:, ~new[1:]].min(axis=1) < scores[:, new[1:]].min(axis=1)).all()
    with_policy = hybrid.with_policy(None)
    np.testing.assert_array_equal(with_policy.new_items[...], new)


def test_an_item_with_a_trend_is_not_new_any_more(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> None:
    """And a trend that is negative for known items lifts no new item above them."""
    plain = random_hybrid(small_data, 3, False)
    items = len(small_data.catalog)
    new = np.arange(items + 1) % 6 == 2
    hybrid = Hybrid(plain.lstm, plain.content, plain.cooccurrence, plain.mix_weights(), plain.trend, new_items=new)
    events = Events(*(np.array(column) for column in ([[1, 4, 7]], [[0.5] * 3], [[-1.0, 5, 5]], [3])))
    gap = jnp.array([-1.0])
    trend = np.where(new, 0, -50.0).astype(np.float32)
    first = order(np.asarray(hybrid.logits(events, gap, trend=jnp.asarray(trend))[0])[0], [])[:10]
    assert not new[first].any()
    trend[8] = 100.0
    (best, *rest) = order(np.asarray(hybrid.logits(events, gap, trend=jnp.asarray(trend))[0])[0], [])[:11]
    assert best == 8
    assert not new[rest[:9]].any()  # with item 8 they are the first ten of the known items
