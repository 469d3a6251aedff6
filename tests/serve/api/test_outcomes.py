"""GetOutcomes: the figures of `python -m serve outcomes` for the newest of a log, with bounds, in every store."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.api import outcomes as report
from serve.api.errors import InvalidRequest, status_of
from serve.api.outcomes import Asked, OutcomesReport, decode_outcomes
from serve.event_log.outcomes import outcomes
from serve.event_log.slates import NO_EVENTS, TooLong, TooSlow, read_slates
from serve.model.events import Event
from serve.pb import model_admin_pb2 as pb
from serve.serving.errors import Cancelled
from serve.stores import open_store
from serve.stores.base import EventStore, Slate, UserEvent
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401

HOUR, DAY = 3_600, 86_400


@pytest.fixture(params=KINDS)
def store(
    request: pytest.FixtureRequest,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> Iterator[EventStore]:
    with open_store(emptied(request.param, servers, tmp_path)) as opened:
        yield opened


@pytest.fixture
def now() -> int:
    return int(time.time())


def fill(store: EventStore, now: int, count: int = 80) -> None:
    """Of two versions, to as many users, one an hour before now and back; every third is responded to at once."""
    for at in range(count):
        version = "1" if at % 4 else "2"
        shown = now - HOUR * (count - at)
        store.log_slate(Slate(f"r{at}", f"u{at % 40}", ("a", "b"), (), "supervised", version, shown))
    store.flush()
    store.record(
        [
            UserEvent(f"e{at}", f"u{at % 40}", Event("a", None, now - HOUR * (count - at)), f"r{at}")
            for at in range(0, count, 3)
        ]
    )


def test_the_whole_log_is_compared_as_by_the_command(store: EventStore, now: int) -> None:
    fill(store, now)
    found = OutcomesReport(store).get(Asked(31 * DAY, 60))
    slates = read_slates(store, 60)
    expected = outcomes(slates)
    assert [(one.model_version, one.policy) for one in found.outcomes] == [("1", "supervised"), ("2", "supervised")]
    for one, other in zip(found.outcomes, expected.arms, strict=True):
        assert (one.recommendation_count, one.user_count) == (other.slates, other.users)
        for figure, estimate in ((one.interaction_rate, other.interaction_rate), (one.reward, other.reward)):
            assert (figure.mean, figure.low, figure.high) == estimate
    (difference,) = found.differences
    assert (difference.model_version, difference.verdict) == ("2", expected.differences[0].verdict)
    assert (found.attribution_window, dict(found.left_out)) == (60, slates.left_out)
    assert abs(found.computed_time - now) < 60


def test_older_recommendations_do_not_count(store: EventStore, now: int) -> None:
    fill(store, now)
    found = OutcomesReport(store).get(Asked(10 * HOUR + HOUR // 2, 60))
    assert sum(one.recommendation_count for one in found.outcomes) + sum(found.left_out.values()) == 10
    assert OutcomesReport(store).get(Asked(1, 60)).outcomes == []


def test_one_users_interval_is_absent(store: EventStore, now: int) -> None:
    store.log_slate(Slate("r", "u", ("a",), (), "supervised", "1", now - HOUR))
    store.log_slate(Slate("last", "u", ("a",), (), "supervised", "1", now))
    store.flush()
    ((one,), *_) = (OutcomesReport(store).get(Asked(DAY, 60)).outcomes,)
    assert (one.recommendation_count, one.user_count) == (1, 1)
    assert not one.reward.HasField("low")
    assert not one.reward.HasField("high")


def test_an_answer_is_kept_for_some_seconds(store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "KEPT_S", 1e9)
    fill(store, now)
    found = OutcomesReport(store)
    first = found.get(Asked(31 * DAY, 60))
    store.log_slate(Slate("more", "u", ("a",), (), "supervised", "1", now - 5 * HOUR))
    store.flush()
    assert found.get(Asked(31 * DAY, 60)) is first
    assert found.get(Asked(30 * DAY, 60)) != first
    monkeypatch.setattr(report, "KEPT_S", 0.0)
    later = found.get(Asked(31 * DAY, 60))
    counts = [sum(one.recommendation_count for one in answer.outcomes) for answer in (first, later)]
    assert counts[1] == counts[0] + 1
    monkeypatch.setattr(report, "KEPT_S", 1e9)
    for seconds in range(3 * report.MOST_KEPT):
        found.get(Asked(seconds + 1, 60))
    assert len(found._kept) <= report.MOST_KEPT


def test_too_many_recommendations_are_a_status(store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, now)
    monkeypatch.setattr(report, "MOST_SLATES", 10)
    with pytest.raises(TooLong, match=r"more than 10 recommendations of the last .* seconds: ask for a shorter") as no:
        OutcomesReport(store).get(Asked(31 * DAY, 60))
    assert status_of(no.value).code.name == "FAILED_PRECONDITION"
    assert OutcomesReport(store).get(Asked(9 * HOUR, 60)).outcomes


def test_too_many_items_are_a_status(store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few recommendations can have many: of 10 of two items, 20."""
    fill(store, now)
    monkeypatch.setattr(report, "MOST_ITEMS", 19)
    with pytest.raises(TooLong, match=r"more than 19 items in the recommendations of the last"):
        OutcomesReport(store).get(Asked(10 * HOUR + HOUR // 2, 60))
    monkeypatch.setattr(report, "MOST_ITEMS", 20)
    assert OutcomesReport(store).get(Asked(10 * HOUR + HOUR // 2, 60)).outcomes


def test_that_a_log_is_too_long_is_kept_too(store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "KEPT_S", 1e9)
    fill(store, now)
    found = OutcomesReport(store)
    monkeypatch.setattr(report, "MOST_SLATES", 10)
    for _ in range(2):
        with pytest.raises(TooLong):
            found.get(Asked(31 * DAY, 60))
        # It would be short enough now, but is not looked at again.
        monkeypatch.setattr(report, "MOST_SLATES", 1_000)


def test_what_nobody_waits_for_is_not_read_on(store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "KEPT_S", 1e9)
    fill(store, now)
    found, asked = OutcomesReport(store), []

    def gone() -> None:
        asked.append(1)
        raise Cancelled("gone")

    with pytest.raises(Cancelled):
        found.get(Asked(31 * DAY, 60), gone)
    assert asked == [1]
    assert found.get(Asked(31 * DAY, 60)).outcomes


def test_a_log_that_takes_too_long_is_a_status(store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, now)
    monkeypatch.setattr(report, "READ_S", 0.0)
    with pytest.raises(TooSlow, match="cannot be read in time") as no:
        OutcomesReport(store).get(Asked(31 * DAY, 60))
    assert status_of(no.value).code.name == "DEADLINE_EXCEEDED"


def test_recommendations_before_the_events_that_are_read_are_left_out(
    store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would seem to have got no response."""
    fill(store, now)
    monkeypatch.setattr(report, "MOST_EVENTS", 9)
    monkeypatch.setattr("serve.event_log.slates.FIRST_RESPONSES", 1)
    found = OutcomesReport(store).get(Asked(31 * DAY, 60))
    # The events of 54, 57, ..., 78: slates from 54 on count.
    assert found.left_out["from before the events that are read"] == 54
    rate = sum(one.interaction_rate.mean * one.recommendation_count for one in found.outcomes)
    assert rate == pytest.approx(9)


def test_an_import_of_old_events_does_not_say_since_when_events_are_read(
    store: EventStore, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are newer than most responses by their arrival, and older by their own times."""
    fill(store, now, 40)
    store.record([UserEvent(f"old {at}", f"u{at}", Event("a", None, now - 900 * DAY)) for at in range(30)])
    fill(store, now, 80)
    monkeypatch.setattr(report, "MOST_EVENTS", 9 + 30)
    monkeypatch.setattr("serve.event_log.slates.FIRST_RESPONSES", 1)
    found = OutcomesReport(store).get(Asked(31 * DAY, 60))
    assert found.left_out[NO_EVENTS] > 0
    # Nothing but old events is read: nothing is known of any response.
    store.record([UserEvent(f"older {at}", f"u{at}", Event("a", None, now - 900 * DAY)) for at in range(39)])
    assert OutcomesReport(store).get(Asked(31 * DAY, 60)).outcomes == []


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.GetOutcomesRequest(window=-1), ["window"]),
        (pb.GetOutcomesRequest(window=31 * DAY + 1, attribution_window=-1), ["window", "attribution_window"]),
        (pb.GetOutcomesRequest(attribution_window=2**62), ["attribution_window"]),
    ],
)
def test_absurd_spans_are_refused(request_: pb.GetOutcomesRequest, fields: list[str]) -> None:
    with pytest.raises(InvalidRequest) as no:
        decode_outcomes(request_)
    assert [one.field for one in no.value.violations] == fields


def test_defaults() -> None:
    assert decode_outcomes(pb.GetOutcomesRequest()) == Asked(7 * DAY, None)
    assert decode_outcomes(pb.GetOutcomesRequest(window=5, attribution_window=0)) == Asked(5, 0)
