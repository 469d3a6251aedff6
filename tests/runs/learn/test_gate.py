"""Which events decide, what the serving model is given of them, and when it is replaced."""

import numpy as np
import pandas as pd
import pytest

import jaxrec
from jaxrec.evaluation.bootstrap import Estimate
from jaxrec.runs.learn.gate import decide, new_cases, with_known_items

COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
OLD = [(1, 10, 4.0, 1), (1, 20, 3.0, 2), (1, 30, 3.0, 3), (2, 10, 5.0, 1), (2, 20, 2.0, 2), (2, 30, 2.0, 3)]
EVERYTHING = jaxrec.PrepareConfig(1, 1, rating_scale=jaxrec.RatingScale(0.5, 5.0))


def grown(new: list[tuple[int, int, float, int]]) -> tuple[jaxrec.PreparedData, jaxrec.PreparedData]:
    """The old data, and the same with new events."""
    old = jaxrec.prepare(pd.DataFrame(OLD, columns=COLUMNS), None, EVERYTHING)
    return old, jaxrec.append(old, pd.DataFrame(new, columns=COLUMNS))


def raw(data: jaxrec.PreparedData, cases: object) -> list[tuple[int, int, int]]:
    """User, item and time of each case."""
    users = data.users.raw_ids[cases.users].tolist()  # type: ignore[attr-defined]
    rows = cases.rows  # type: ignore[attr-defined]
    items = data.catalog.ids.decode(data.histories.items[rows]).tolist()
    return list(zip(users, items, data.histories.times[rows].tolist(), strict=True))


def test_the_last_events_decide_of_users_with_new_ones() -> None:
    """User 1 has a later event, user 2 only one that comes before a known one, user 3 is new."""
    old, data = grown([(1, 10, 3.0, 9), (2, 40, 3.0, 0), (3, 10, 3.0, 5), (3, 40, 3.0, 6), (3, 20, 3.0, 7)])
    assert raw(data, data.split.test) == [(1, 10, 9), (2, 30, 3), (3, 20, 7)]
    assert raw(data, new_cases(old, data)) == [(1, 10, 9), (3, 20, 7)]


def test_the_same_item_at_another_time_is_a_new_event() -> None:
    old, data = grown([(1, 30, 3.0, 4), (2, 40, 3.0, 3)])
    assert raw(data, new_cases(old, data)) == [(1, 30, 4), (2, 40, 3)]


def test_the_serving_model_is_given_the_items_that_it_knows() -> None:
    """Item 40 is new: user 3 has it within the history, user 1 as the target, and user 4 nothing else before."""
    new = [
        (1, 40, 3.0, 9),
        (3, 10, 1.0, 5),
        (3, 40, 3.0, 6),
        (3, 20, 2.0, 7),
        (4, 40, 3.0, 5),
        (4, 40, 3.0, 6),
        (4, 20, 3.0, 7),
    ]
    old, data = grown(new)
    cases = new_cases(old, data)
    assert raw(data, cases) == [(1, 40, 9), (3, 20, 7), (4, 20, 7)]
    known, usable, ranked = with_known_items(data, cases, old)
    assert raw(data, usable) == [(1, 40, 9), (3, 20, 7)]
    assert raw(known, ranked) == [(3, 20, 7)]
    first, row = known.histories.offsets[ranked.users[0]], ranked.rows[0]
    assert known.catalog.ids.decode(known.histories.items[first:row]).tolist() == [10]
    assert known.histories.ratings[first : row + 1].tolist() == [1.0, 2.0]
    assert np.diff(known.histories.offsets).tolist() == [3, 3, 2, 1]
    assert (data.histories.items > len(old.catalog)).sum() == 4


@pytest.mark.parametrize(
    ("low", "mean", "high", "accepted", "why"),
    [
        (-0.004, 0.01, 0.02, True, "accepted: the lower end is not below -0.0050, 5% of the serving model's"),
        (-0.005, 0.0, 0.005, True, "accepted"),
        (-0.006, 0.0, 0.006, False, "refused: it may be worse, since the lower end is below -0.0050"),
        (-0.030, -0.02, -0.01, False, "refused: it is worse"),
        (-0.004, -0.002, -0.001, False, "refused: it is worse"),  # within the margin, but again and again
        (0.0, 0.0, 0.0, False, "refused: both models rank these events alike"),
    ],
)
def test_the_lower_end_decides(low: float, mean: float, high: float, accepted: bool, why: str) -> None:
    decision = decide(0.1 + mean, 0.1, Estimate(mean, low, high), 12, 0.05)
    assert decision.accepted == accepted
    assert why in decision.reason
    assert decision.reason.startswith("NDCG@10 on the new held-out events of 12 users: new 0.")


def test_a_few_users_and_a_model_without_a_hit_prove_nothing() -> None:
    better = Estimate(0.02, 0.01, 0.03)
    assert decide(0.12, 0.1, better, 100, 0.05, least_users=100).accepted
    few = decide(0.12, 0.1, better, 99, 0.05, least_users=100)
    assert (few.accepted, "refused: expected at least 100 users" in few.reason) == (False, True)
    assert "refused: both models rank" in decide(0.1, 0.1, Estimate(0.0, 0.0, 0.0), 1, 0.05).reason
    none = decide(0.02, 0.0, better, 100, 0.05)
    assert (none.accepted, "refused: the serving model ranks none" in none.reason) == (False, True)
