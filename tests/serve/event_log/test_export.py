"""What is recorded becomes a file that the training reads without options: once, whole or not at all."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import jaxrec
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.rules import IdKind
from serve.cli.main import main
from serve.event_log.export import export_events
from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import EventStore, StoreError, UserEvent
from tests.logs import by_user
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401

DAY = 86_400
START = 1_600_000_000
TEXT_IDS = ReadOptions(users=IdKind.TEXT, items=IdKind.TEXT)


def event(event_id: str, user_id: str, item_id: str, day: int, rating: float | None = None) -> UserEvent:
    return UserEvent(event_id, user_id, Event(item_id, rating, START + day * DAY))


EVENTS = [
    event("1", "7", "10", 0, 4.5),
    event("2", "8", "10", 1),
    event("3", "7", "20", 2, 1.0),
    event("4", "8", "20", 3, 5.0),
]


@pytest.fixture(params=KINDS)
def store(
    request: pytest.FixtureRequest,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> Iterator[EventStore]:
    with open_store(emptied(request.param, servers, tmp_path)) as opened:
        yield opened


def rows(path: Path) -> list[tuple[str, str, float | None, int]]:
    """Those of a file, sorted: Redis has them by user."""
    frame = (
        pd.read_parquet(path)
        if path.suffix == ".parquet"
        else pd.read_csv(path, dtype={"user_id": str, "item_id": str})
    )
    frame = frame.astype({"rating": object}).where(frame.notna(), None)
    return sorted(frame.itertuples(index=False, name=None), key=lambda row: row[3])


def expected(events: list[UserEvent]) -> list[tuple[str, str, float | None, int]]:
    return [(new.user_id, new.event.item_id, new.event.rating, new.event.timestamp) for new in events]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_each_event_is_exported_once(store: EventStore, tmp_path: Path, suffix: str) -> None:
    store.record(EVENTS[:3])
    first = export_events(store, tmp_path / f"first.{suffix}")
    assert first.events == 3
    assert rows(tmp_path / f"first.{suffix}") == expected(EVENTS[:3])
    assert export_events(store, tmp_path / f"none.{suffix}", first.revision) == (0, first.revision, 0)
    assert rows(tmp_path / f"none.{suffix}") == []
    store.record(EVENTS)  # the first three are known
    second = export_events(store, tmp_path / f"second.{suffix}", first.revision)
    assert (second.events, second.revision > first.revision) == (1, True)
    assert rows(tmp_path / f"second.{suffix}") == expected(EVENTS[3:])


def test_the_file_is_that_of_the_moment_when_the_export_began(
    store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded while it is written is in the next file, though the store would have shown it."""
    store.record(EVENTS[:2])
    read = store.all_events

    def record_meanwhile(after: int) -> Iterator[object]:
        store.record(EVENTS[2:])
        yield from read(after)

    monkeypatch.setattr(store, "all_events", record_meanwhile)
    first = export_events(store, tmp_path / "first.csv")
    monkeypatch.undo()
    assert rows(tmp_path / "first.csv") == expected(EVENTS[:2])
    assert export_events(store, tmp_path / "second.csv", first.revision).events == 2


def test_a_deletion_of_the_latest_events_moves_no_revision_back(store: EventStore, tmp_path: Path) -> None:
    store.record(EVENTS)
    first = export_events(store, tmp_path / "first.csv")
    store.delete_user("8")
    assert export_events(store, tmp_path / "none.csv", first.revision) == (0, first.revision, 0)
    store.record([event("5", "8", "10", 9)])
    assert export_events(store, tmp_path / "second.csv", first.revision).events == 1


def test_an_id_with_a_line_break_adds_no_row_of_another_user(tmp_path: Path) -> None:
    forged = event("forged", "6", "1\n7,2,5.0,1600000000\n8", 1, 2.0)
    with open_store(tmp_path / "s.sqlite") as store:
        store.record([EVENTS[0], forged, forged._replace(event_id="user", user_id="6\r7")])
        assert export_events(store, tmp_path / "events.csv") == (1, 3, 2)
        assert export_events(store, tmp_path / "events.parquet") == (3, 3, 0)
        printed = CliRunner().invoke(main, ["export-events", str(tmp_path / "s.sqlite"), str(tmp_path / "again.csv")])
    assert "1 events; 2 left out with a line break in an id" in printed.output
    assert rows(tmp_path / "events.csv") == expected(EVENTS[:1])
    config = jaxrec.PrepareConfig(1, 1, rating_scale=jaxrec.RatingScale(0.5, 5))
    data = jaxrec.prepare(tmp_path / "events.parquet", None, config, options=TEXT_IDS)
    assert {user: len(events) for user, (events, *_) in by_user(data).items()} == {"7": 1, "6": 1, "6\r7": 1}


def test_a_store_that_never_came_to_the_revision_is_an_error(store: EventStore, tmp_path: Path) -> None:
    """It was replaced, or restored from an older copy: events until the revision would be missed."""
    store.record(EVENTS)
    ahead = store.last_arrival() + 1
    with pytest.raises(StoreError, match=f"has come to revision {ahead - 1}, and the export begins after.*{ahead}"):
        export_events(store, tmp_path / "events.csv", ahead)


def test_a_failed_export_leaves_the_older_file_and_nothing_beside_it(
    store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    store.record(EVENTS)
    export_events(store, out / "events.csv")
    before = (out / "events.csv").read_bytes()

    def fail(after: int) -> Iterator[object]:
        yield [(1, EVENTS[0])]
        raise StoreError("gone")

    monkeypatch.setattr(store, "all_events", fail)
    with pytest.raises(StoreError, match="gone"):
        export_events(store, out / "events.csv")
    assert [path.name for path in out.iterdir()] == ["events.csv"]
    assert (out / "events.csv").read_bytes() == before


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store, pytest.raises(StoreError, match=r"ends in \.csv or \.parquet"):
        export_events(store, tmp_path / "events.json")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_prepare_and_append_read_the_files_without_options(tmp_path: Path, suffix: str) -> None:
    """Ids with commas, quotes and vertical bars stay what they are."""
    names = ['a,"b"', "c|d", "e;f", "g h"]
    with open_store(tmp_path / "s.sqlite") as store:
        store.record(
            [event(f"{user}{item}", f"u{user},", names[item], user + item, 3.5) for user in (1, 2) for item in range(3)]
        )
        first = export_events(store, tmp_path / f"first.{suffix}")
        store.record([event("late", "u1,", names[3], 9)])
        export_events(store, tmp_path / f"second.{suffix}", first.revision)
    config = jaxrec.PrepareConfig(1, 1, rating_scale=jaxrec.RatingScale(0.5, 5))
    data = jaxrec.prepare(tmp_path / f"first.{suffix}", None, config, out=tmp_path / "data")
    assert sorted(data.catalog.ids.raw_ids.tolist()) == sorted(names[:3])
    both = by_user(jaxrec.append(data, tmp_path / f"second.{suffix}"))
    assert both["u1,"][0] == [(START + (1 + item) * DAY, names[item], 3.5) for item in range(3)] + [
        (START + 9 * DAY, names[3], -1.0)
    ]


def test_the_command_prints_the_revision_for_the_next_export(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        store.record(EVENTS[:2])
    run = partial(CliRunner().invoke, main)
    first = run(["export-events", str(tmp_path / "s.sqlite"), str(tmp_path / "a.csv")])
    assert first.output == f"{tmp_path / 'a.csv'}: 2 events\n2\n"
    with open_store(tmp_path / "s.sqlite") as store:
        store.record(EVENTS[2:])
    again = ["export-events", str(tmp_path / "s.sqlite"), str(tmp_path / "b.csv"), "--after", "2"]
    assert run(again).output == f"{tmp_path / 'b.csv'}: 2 events\n4\n"
    missing = run(["export-events", str(tmp_path / "none.sqlite"), str(tmp_path / "c.csv")])
    assert (missing.exit_code, "there is no such file" in missing.output) == (1, True)
    assert not (tmp_path / "none.sqlite").exists()


def test_memory_is_bounded_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.stores.sql.COPIED_AT_ONCE", 2)
    parts: list[int] = []
    with open_store(tmp_path / "s.sqlite") as store:
        store.record(EVENTS)
        export_events(store, tmp_path / "events.csv", progress=parts.append)
    assert parts == [2, 2]
