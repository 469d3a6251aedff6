"""What the stores in SQL databases have in common: reading a user's events by arrival, and the whole log in parts."""

import json
import time
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, LiteralString, NamedTuple

from serve.model.events import Event
from serve.model.live_catalog import Item
from serve.stores.base import (
    EVERY_SLATE,
    MOST_EVENTS,
    MOST_SLATES,
    SOME_SLATES,
    Changes,
    ItemChanges,
    ItemCursor,
    ShownItem,
    Slate,
    SpilledState,
    Swept,
    TooManySlates,
    UserEvent,
)
from serve.stores.counters import Counter, Damaged, add_events
from serve.stores.deferred import DeferringStore
from serve.stores.rows import event_of_row, item_of_text, slate_of_row

LARGEST = 2**63 - 1
LAST = (LARGEST, LARGEST)
FIRST = ("", "")
COPIED_AT_ONCE = 10_000
SLATES_AT_ONCE = 50
LOOKED_AT_AT_ONCE = 100_000  # arrivals, of which few may be wanted: a statement must not take long


class Queries(NamedTuple):
    """The same questions in each database's SQL; parameters in brackets."""

    life: LiteralString
    """First and last arrival of a user's events (user)."""
    changes: LiteralString
    """The columns of `Event`, without neutral ones, in order of arrival (user, arrival before the first, last arrival,
    limit)."""
    newest: LiteralString
    """The same, newest first by timestamp and arrival (user, last arrival, last timestamp, limit)."""
    listed: tuple[LiteralString, LiteralString]
    """Arrival and the columns of `UserEvent`, newest first: of events that are not neutral, and of those that are
    (user, timestamp and arrival that come after, limit)."""
    recent_slates: LiteralString
    """Id and item ids of a user's slates, newest first (user, first timestamp, limit, how many to pass over)."""
    recorded: LiteralString
    """Those of some event ids that are stored (the ids as JSON)."""
    state: LiteralString
    """The columns of `SpilledState` (user, model version)."""
    state_keys: LiteralString
    """User and model version of states in order (user and model version before the first, limit)."""
    events: LiteralString
    """Arrival and the columns of `UserEvent` in order of arrival (arrival before the first, limit)."""
    slates: LiteralString
    """Number and SLATE_COLUMNS in order of numbers (number before the first, limit)."""
    first_slate: LiteralString
    """One row: how many slates there are from a time on, and the least number of them, None without one; of the oldest
    ones (timestamp, limit)."""
    shown_items: LiteralString
    """The columns of `ShownItem` in order (recommendation and item that come before, limit)."""
    last_deletion: LiteralString
    """One row: the number of the last deletion of a user, 0 without one."""
    times: LiteralString
    """Item and timestamp (arrival before the first, last arrival, timestamp before the first)."""
    counted_until: LiteralString
    """One row: see `EventStore.counted_until` ()."""
    changed_items: LiteralString
    """Revision, id and text of items, None for a deleted one, in order of revisions (revision before the first, limit).
    """
    item_marks: LiteralString
    """One row: how many of two marks are there, and the newest mark, '' without one (mark, mark)."""
    item: LiteralString
    """The text of an item that is not deleted (id)."""
    listed_items: LiteralString
    """Id and text of items that are not deleted, in order of ids (id before the first, limit)."""


class SqlStore(DeferringStore):
    """A store whose arrivals of events are numbers that grow and never come back: a user's last is a revision."""

    _queries: Queries
    _damaged_items: Damaged

    @abstractmethod
    def _read(self, query: LiteralString, *parameters: Any) -> list[Any]:
        """The rows that a query finds."""

    def history(self, user_id: str, until: int | None = None) -> list[Event]:
        return self._newest(user_id, LARGEST, LARGEST if until is None else until, MOST_EVENTS)

    def recorded_ids(self, event_ids: Sequence[str]) -> set[str]:
        rows = self._read(self._queries.recorded, json.dumps(event_ids, ensure_ascii=False))
        return {event_id for (event_id,) in rows}

    def revision(self, user_id: str) -> int:
        return self._life(user_id)[1]

    def changes(self, user_id: str, since: int = 0, most: int = MOST_EVENTS) -> Changes:
        first, revision = self._life(user_id)
        if revision and since >= revision:
            return Changes(revision, [], complete=False)
        # Not in one snapshot: events after `revision` are left to the next call, and a deletion in between
        # changes the revision, so the next call starts anew.
        if revision and since >= first:
            events = [Event(*row) for row in self._read(self._queries.changes, user_id, since, revision, most)]
            if len(events) < most:
                return Changes(revision, sorted(events, key=lambda event: event.timestamp), complete=False)
        return Changes(revision, self._newest(user_id, revision, LARGEST, most), complete=True)

    def list_events(
        self, user_id: str, most: int, before: tuple[int, int] | None = None
    ) -> list[tuple[int, UserEvent]]:
        # Each is in the order of an index of its own.
        rows = [row for query in self._queries.listed for row in self._read(query, user_id, *(before or LAST), most)]
        events = [(row[0], event_of_row(row[1:])) for row in rows]
        events.sort(key=lambda row: (row[1].event.timestamp, row[0]), reverse=True)
        return events[:most]

    def _stored_slates(self, user_id: str, since: int) -> Iterator[tuple[str, Sequence[str]]]:
        # What is logged meanwhile shifts the others, which are then found twice.
        for start in range(0, MOST_SLATES, SLATES_AT_ONCE):
            limit = min(SLATES_AT_ONCE, MOST_SLATES - start)
            rows = self._read(self._queries.recent_slates, user_id, since, limit, start)
            yield from ((recommendation_id, json.loads(items)) for recommendation_id, items in rows)
            if len(rows) < limit:
                return

    def load_state(self, user_id: str, model_version: str) -> SpilledState | None:
        rows = self._read(self._queries.state, user_id, model_version)
        return SpilledState(*rows[0]) if rows else None

    def drop_states(self, keep_versions: Collection[str], most: int, place: Any = None) -> Swept:
        """Reads the states outside of a transaction, so that those that stay keep no other write waiting."""
        keys = self._read(self._queries.state_keys, *(place or FIRST), most)
        gone = [key for key in keys if key[1] not in keep_versions]
        dropped = self._delete_states(gone) if gone else 0
        return Swept(dropped, None if len(keys) < most else tuple(keys[-1]))

    @abstractmethod
    def _delete_states(self, keys: Sequence[tuple[str, str]]) -> int:
        """Deletes states by user and model version, in this order; how many there were."""

    def all_events(self, after: int = 0) -> Iterator[Sequence[tuple[int, UserEvent]]]:
        for rows in self._parts(self._queries.events, after):
            yield [(row[0], event_of_row(row[1:])) for row in rows]

    def all_slates(self, since: int = 0, most: int = EVERY_SLATE) -> Iterator[Sequence[Slate]]:
        if not since:
            for rows in self._parts(self._queries.slates):
                yield [slate_of_row(row[1:]) for row in rows]
            return
        ((count, first),) = self._read(self._queries.first_slate, since, most + 1)
        if count > most:
            raise TooManySlates
        for rows in self._parts(self._queries.slates, first - 1, SOME_SLATES) if count else ():
            slates = [slate_of_row(row[1:]) for row in rows]
            # Those of one second are written in any order, and by several servers.
            yield [one for one in slates if one.timestamp >= since]

    def all_shown(self) -> Iterator[Sequence[ShownItem]]:
        last = FIRST
        while rows := self._read(self._queries.shown_items, *last, COPIED_AT_ONCE):
            yield [ShownItem(*row) for row in rows]
            last = rows[-1][:2]

    def counted_until(self) -> int | None:
        ((until,),) = self._read(self._queries.counted_until)
        return None if until is None else int(until)

    def items_since(self, cursor: ItemCursor, most: int) -> ItemChanges:
        # Before the items: a mark that comes between the two statements is not one of what was read.
        ((count, newest),) = self._read(self._queries.item_marks, cursor.begun, cursor.last)
        anew = not cursor.revision or count < len(cursor.marks)
        revision = 0 if anew else cursor.revision
        rows = self._read(self._queries.changed_items, revision, most)
        changed = [(item_id, None if text is None else self._item(item_id, text)) for _, item_id, text in rows]
        begun = newest if anew or len(rows) < most else cursor.begun
        return ItemChanges(ItemCursor(rows[-1][0] if rows else revision, begun, newest), changed, anew)

    def item(self, item_id: str) -> Item | None:
        rows = self._read(self._queries.item, item_id)
        return self._item(item_id, rows[0][0]) if rows else None

    def list_items(self, after: str, most: int) -> list[Item]:
        return [self._item(*row) for row in self._read(self._queries.listed_items, after, most)]

    def _item(self, item_id: str, text: str | bytes) -> Item:
        return item_of_text(item_id, text, self._damaged_items)

    def _seed(self, counters: dict[str, Counter], until: int) -> None:
        """Most events are read before the transaction, which others wait for: it reads only those that came since."""
        last = self.last_arrival()
        for start in range(0, last, LOOKED_AT_AT_ONCE):
            times = self._read(self._queries.times, start, min(start + LOOKED_AT_AT_ONCE, last), until)
            add_events(counters, times, time.time())
        self._seed_after(last, counters, until)

    @abstractmethod
    def _seed_after(self, last: int, counters: dict[str, Counter], until: int) -> None:
        """Seeds the store in one transaction, unless it is seeded.

        Args:
            last: The arrival up to which events after `until` are in `counters`; later ones are added.
            counters: By item id; may be changed.
            until: As in `_seed`.
        """

    def _parts(self, query: LiteralString, last: int = 0, size: int | None = None) -> Iterator[list[Any]]:
        while rows := self._read(query, last, size or COPIED_AT_ONCE):
            yield rows
            last = rows[-1][0]

    def _last_deletion(self) -> int:
        ((number,),) = self._read(self._queries.last_deletion)
        return int(number)

    def _life(self, user_id: str) -> tuple[int, int]:
        """First and last arrival of a user's events; zeros: there are none."""
        rows = self._read(self._queries.life, user_id)
        return rows[0] if rows else (0, 0)

    def _newest(self, user_id: str, last_arrival: int, until: int, most: int) -> list[Event]:
        """A user's newest events up to an arrival and a time, by (timestamp, arrival)."""
        return [Event(*row) for row in reversed(self._read(self._queries.newest, user_id, last_arrival, until, most))]
