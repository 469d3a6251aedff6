"""What came of recommendations, by arm: rates and rewards by hand, whose events count, and what can be concluded."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from serve.cli.main import main
from serve.event_log.outcomes import Estimate, outcomes
from serve.event_log.slates import Arm, Slates, read_slates
from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import EventStore, Slate, UserEvent
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401

START = 1_600_000_000
OLD, NEW = Arm("1", "supervised"), Arm("2", "reinforce")


@pytest.fixture(params=KINDS)
def location(
    request: pytest.FixtureRequest,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> str:
    return emptied(request.param, servers, tmp_path)


@pytest.fixture
def store(location: str) -> Iterator[EventStore]:
    with open_store(location) as opened:
        yield opened


def slate(
    store: EventStore,
    name: str,
    user_id: str | None,
    arm: Arm,
    at: int,
    items: str = "abc",
    options: tuple[str, ...] = (),
) -> None:
    one = Slate(name, user_id, tuple(items), (), arm.policy, arm.model_version, START + at)
    store.log_slate(one._replace(request_options=options))


def response(store: EventStore, slate_id: str, user_id: str, item_id: str, at: int) -> None:
    event = Event(item_id, None, START + at)
    store.record([UserEvent(f"{slate_id}-{user_id}-{item_id}-{at}", user_id, event, slate_id)])


def small_log(store: EventStore) -> None:
    """Two users; the window is given as 10 s, so that what came until 90 s is closed."""
    slate(store, "r1", "u", OLD, 0)
    slate(store, "r2", "u", OLD, 20)
    slate(store, "r3", "v", OLD, 30)
    slate(store, "r4", "v", NEW, 40, "a")
    slate(store, "open", "v", NEW, 95)
    slate(store, "last", "u", OLD, 100)
    slate(store, "anonymous", None, OLD, 50)
    store.flush()
    response(store, "r1", "u", "a", 5)
    response(store, "r1", "u", "a", 6)  # again: still one slot
    response(store, "r1", "u", "c", 10)  # the last second of the window
    response(store, "r2", "u", "b", 31)  # too late
    response(store, "r2", "v", "b", 21)  # another user
    response(store, "r3", "v", "z", 31)  # on no item of the slate
    response(store, "r4", "v", "a", 39)  # before it, by the client's clock: immediate


def test_slates_of_a_version_that_the_request_named_are_left_out(store: EventStore) -> None:
    """With what came of them; other options do not matter."""
    slate(store, "named", "u", NEW, 0, options=("filter", "model_version"))
    slate(store, "r", "u", OLD, 0, options=("filter",))
    slate(store, "last", "u", OLD, 100)
    store.flush()
    response(store, "named", "u", "a", 5)
    response(store, "r", "u", "b", 5)
    found = read_slates(store, 10)
    assert (found.arms, found.responded.tolist()) == ([OLD], [1.0])
    assert found.left_out == {"of a version that the request named": 1, "with an open attribution window": 1}


def test_rates_and_rewards_by_hand(store: EventStore) -> None:
    """DCG's discounts of three slots are 1, 1 / log2(3) and 1 / 2, over their sum."""
    small_log(store)
    slates = read_slates(store, attribution_window=10)
    assert slates.left_out == {"without a user id": 1, "with an open attribution window": 2}
    first, third, total = 1.0, 0.5, 1.0 + 1 / math.log2(3) + 0.5
    old, new = outcomes(slates).arms
    assert (old.arm, old.slates, old.users) == (OLD, 3, 2)
    assert (new.arm, new.slates, new.users) == (NEW, 1, 1)
    assert old.interaction_rate.mean == pytest.approx(1 / 3)
    assert old.reward.mean == pytest.approx((first + third) / total / 3)
    assert (new.interaction_rate.mean, new.reward.mean) == (1.0, 1.0)
    # Samples hold u alone, v alone or both: rates 1/2, 0 and 1/3.
    assert (old.interaction_rate.low, old.interaction_rate.high) == (0.0, 0.5)
    assert math.isnan(new.reward.low)


def test_the_window_is_that_of_99_in_100_responses(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        for number in range(100):
            slate(store, f"r{number}", "u", OLD, number)
        store.flush()
        for number in range(100):
            response(store, f"r{number}", "u", "a", number + (7 if number else 1000))
        assert read_slates(store).attribution_window == 7


def test_events_on_other_items_do_not_count_for_the_window(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        slate(store, "r1", "u", OLD, 0)
        slate(store, "r2", "v", OLD, 0, "d")
        store.flush()
        response(store, "r1", "u", "a", 7)
        response(store, "r1", "u", "d", 1000)  # of another slate
        response(store, "r1", "u", "z", 1000)  # of none
        assert read_slates(store).attribution_window == 7


@pytest.mark.parametrize(("users", "said"), [(29, "too few users to compare 2"), (30, "2 (reinforce) is worse")])
def test_few_users_give_no_verdict(users: int, said: str) -> None:
    """Each of the users met both arms, and responded to the first one alone: the interval has width 0."""
    (difference,) = outcomes(drawn(users, {OLD: 1.0, NEW: 0.0}, seed=0)).differences
    assert difference.verdict.startswith(said)


def test_events_of_a_wrong_clock_do_not_count(tmp_path: Path) -> None:
    """They would close the window of slates that were shown a moment ago."""
    with open_store(tmp_path / "s.sqlite") as store:
        slate(store, "r1", "u", OLD, 0)
        store.flush()
        response(store, "r1", "u", "a", 2_000_000_000)
        found = read_slates(store, 10)
    assert (len(found.user), found.left_out) == (0, {"with an open attribution window": 1})


def test_a_store_without_slates_has_no_arm(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        assert outcomes(read_slates(store)) == ([], [])


def drawn(users: int, rates: dict[Arm, float], seed: int) -> Slates:
    """Five slates of each user by each arm, with a response at the arm's rate."""
    rng = np.random.default_rng(seed)
    arm = np.tile(np.repeat(np.arange(len(rates)), 5), users).astype(np.int32)
    user = np.repeat(np.arange(users), 5 * len(rates)).astype(np.int32)
    responded = (rng.random(len(arm)) < np.array(list(rates.values()))[arm]).astype(float)
    return Slates(list(rates), arm, user, responded, responded / 2, 10, {})


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({OLD: 0.2, NEW: 0.4}, "2 (reinforce) is better than 1 (supervised): reward per slate +"),
        ({OLD: 0.4, NEW: 0.2}, "2 (reinforce) is worse than 1 (supervised): reward per slate -"),
        ({OLD: 0.3, NEW: 0.3}, "no difference can be seen between 2 (reinforce) and 1 (supervised): reward per slate"),
    ],
)
def test_which_arm_is_better(rates: dict[Arm, float], expected: str) -> None:
    (difference,) = outcomes(drawn(300, rates, seed=1)).differences
    assert difference.verdict.startswith(expected)
    assert difference.reward.mean == pytest.approx(difference.interaction_rate.mean / 2)


def test_intervals_cover_the_rate_as_often_as_they_say() -> None:
    """95 in 100, within three standard errors: 200 logs of 60 users."""
    found = [outcomes(drawn(60, {OLD: 0.3}, seed)).arms[0].interaction_rate for seed in range(200)]
    covered = np.mean([one.low <= 0.3 <= one.high for one in found])
    assert 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5 <= covered <= 0.95 + 3 * (0.95 * 0.05 / 200) ** 0.5


def test_users_are_drawn_and_not_slates() -> None:
    """Ten slates of a user that are all alike say no more than one."""
    once = Slates(
        [OLD], np.zeros(40, np.int32), np.arange(40, dtype=np.int32), np.arange(40) % 2.0, np.zeros(40), 1, {}
    )
    often = once._replace(
        arm=np.repeat(once.arm, 10), user=np.repeat(once.user, 10), responded=np.repeat(once.responded, 10)
    )
    often = often._replace(reward=np.zeros(400))
    one, ten = (outcomes(each).arms[0].interaction_rate for each in (once, often))
    assert one == pytest.approx(ten)


def test_the_command_prints_a_table_or_json(location: str) -> None:
    with open_store(location) as store:
        small_log(store)
    arguments = ["outcomes", location, "--attribution-window", "10"]
    table = CliRunner().invoke(main, arguments).output.splitlines()
    assert table[0].split("  ")[0] == "model version"
    assert table[1].split()[:6] == ["1", "supervised", "3", "2", "0.3333", "(0.0000"]
    assert table[3].startswith("Responses within 10 s; 1 slates without a user id left out; 2 slates with an open")
    assert table[4].startswith("too few users to compare 2 (reinforce) with 1 (supervised): 1, expected at least 30")
    found = json.loads(CliRunner().invoke(main, [*arguments, "--format", "json"]).output)
    assert found["arms"][1] == {
        **NEW._asdict(),
        "slates": 1,
        "users": 1,
        "interaction_rate": {"mean": 1.0, "low": None, "high": None},
        "reward": {"mean": 1.0, "low": None, "high": None},
    }
    assert found["differences"][0]["verdict"] == table[4].removesuffix(".")


def test_an_estimate_reads_as_text() -> None:
    assert str(Estimate(0.25, 0.125, 0.5)) == "0.2500 (0.1250 to 0.5000)"
    assert str(Estimate(0.25, math.nan, math.nan)) == "0.2500 (no interval)"
