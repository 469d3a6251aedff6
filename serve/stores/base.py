"""What a store of events, slates, recurrent states and items promises, whichever database is behind it.

with open_store("events.sqlite") as store:          # or postgresql://..., redis://...
    store.record([UserEvent("e1", "7", Event("318", 4.5, 964983000))])
    store.history("7")
"""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Self

from serve.model.events import INTERACTION, Event
from serve.model.live_catalog import Item
from serve.stores.counters import NONE_READ, Counter, ItemCounts

MOST_EVENTS = 10_000
"""Of a user's history so many are read, the newest by time. All that is recorded stays in the store, as a log to learn
from; but a user with millions of events must not cost all others their answers."""

MOST_SLATES = 1_000
"""Of a user's slates so many are read to find what was shown lately."""

SOME_SLATES = 500
"""Slates of a time are read so many at once: one can have a thousand items."""

EVERY_SLATE = 2**31
"""More than a store has."""

MOST_MERGED = 10_000
"""So many events and slates of a user can become another one's: as one step, for which others wait."""

MOST_ITEM_MARKS = 10_000
"""So many of the last changes of items are remembered: a server that read the catalogue before them reads it anew."""

MOST_DELETIONS = 100_000
"""So many of the last deletions of users are remembered, by digests of the users' ids: what other servers still had to
write of these users is not written any more. By number and not by time, since clocks are set."""


class StoreError(Exception):
    """The store cannot be opened, read or written; nothing of the failed call was acknowledged."""


class TooManyToMerge(Exception):
    """A user has too much to be made another one's in one step."""

    def __init__(self, count: int, most: int) -> None:
        expected = f"a user with at most {most:,} events and recommendations"
        super().__init__(f"source_user_id: expected {expected}, came one with {count:,}")


class TooManySlates(Exception):
    """There are more slates than were asked for."""


class UserEvent(NamedTuple):
    """An event with its user and the client's own id for it."""

    event_id: str
    user_id: str
    event: Event
    recommendation_id: str | None = None
    """The recommendation that the event answers to; not checked against the slates."""
    type: str = INTERACTION
    """Name of the kind of event; what that means is in `event.weight`, as it was when the event was recorded."""
    value: float | None = None
    """A number of the client, such as a price or seconds, finite and not negative; None: there is none."""


class Slate(NamedTuple):
    """A recommendation as it was answered: with the events that refer to it, what the next policy learns from."""

    recommendation_id: str
    user_id: str | None
    """None: the history came with the request."""
    item_ids: tuple[str, ...]
    """Best first."""
    log_propensities: tuple[float, ...]
    """Natural logarithm of each item's probability, given those above it; their sum is the slate's. Empty: 0 for all,
    since the policy is deterministic."""
    policy: str
    model_version: str
    timestamp: int
    """When it was answered, seconds since 1970-01-01T00:00Z."""
    temperature: float | None = None
    """Of the exploration that drew it; None: not drawn, or noted by a server that did not note this yet."""
    request_time: int | None = None
    """For which the request asked, in seconds; None: it had none."""
    excluded_item_ids: tuple[str, ...] = ()
    """What was excluded beside the user's history, as far as the model knows it: by the request itself, what was
    recommended lately if the request asked for other items, the items that the user disliked, and those that were
    hidden or not available, unless `request_options` names the catalogue."""
    trend_time: int | None = None
    """The second, since 1970-01-01T00:00Z, to which the counts of the trend that ranked it were decayed. None: it was
    ranked without a trend, or by a server that did not note this yet."""
    trend_arrival: int | None = None
    """The arrival, as `EventStore.all_events` numbers it, of the last event in these counts; 0: no event is in them.
    None: the counts were those of the model's export alone, or `trend_time` is None."""
    request_options: tuple[str, ...] = ()
    """Which of `filter`, `seen`, `new_item_slots`, `rules` and `not_shown_within` the request set to something else
    than the model does by itself. The values of the first four are not noted, so the propensities cannot be computed
    again. What the last one excluded is in `excluded_item_ids`. Also `history` if events were sent along with the user,
    which are not noted, `model_version` if the request named the version that was to answer, `reranker` if the server
    has an own re-ranker, and `catalogue` if more items were hidden or not available than are noted
    (`serve.model.live_catalog.MOST_NOTED`)."""


class ShownItem(NamedTuple):
    """An item of a recommendation that was displayed, as a client says. Its user is that of the recommendation."""

    recommendation_id: str
    item_id: str
    position: int
    """From 1 on, as it was shown; 0: not known."""
    timestamp: int
    """When, by the client, in seconds since 1970-01-01T00:00Z."""
    recorded: int
    """When a server recorded it, in the same seconds."""


class Changes(NamedTuple):
    """What became of a user's history since a revision that was read before. Neutral events are not in it."""

    revision: int
    """Of the history with these events; 0: the user has none."""
    events: list[Event]
    """By (timestamp, arrival)."""
    complete: bool
    """True: `events` is the whole history, and what was known before is void (the user was deleted since, or
    the revision asked for was 0). False: `events` are those that arrived since, late ones among them."""


class SpilledState(NamedTuple):
    """A user's recurrent state as a state cache wants it back; the store does not look into it."""

    user_id: str
    model_version: str
    revision: int
    """Of the history that the state has seen."""
    state: bytes


class ItemCursor(NamedTuple):
    """How far a catalogue was read. Each change of items leaves a mark: a random text that no other store has."""

    revision: int = 0
    """Of the last item that was read; 0: begin anew."""
    begun: str = ""
    """The newest mark when the last read began that came to the end: until then, nothing is missing."""
    last: str = ""
    """The newest mark when the item was read."""

    @property
    def marks(self) -> set[str]:
        """Those that the store must have. If it lacks one, it is another store or an older copy, or it no longer knows
        which items were deleted."""
        return {self.begun, self.last} - {""}


class ItemChanges(NamedTuple):
    """What became of the catalogue since it was read before."""

    cursor: ItemCursor
    """To ask with the next time."""
    items: list[tuple[str, Item | None]]
    """Ids, each once, in the order of their last changes; None: the item was deleted. An item that cannot be decoded
    is hidden, and has nothing but its id."""
    anew: bool
    """True: these are the first of all items, and what was known before is void."""


class Swept(NamedTuple):
    """A part of the states that was looked at."""

    dropped_count: int
    place: Any
    """Where the next call goes on; None: this was the last part."""


class Deleted(NamedTuple):
    """How much of a user there was."""

    event_count: int
    slate_count: int


class EventStore(ABC):
    """An open store, to be shared between threads. Close it, or use it in a `with` statement.

    Every call may raise StoreError, and works again once the cause is gone.
    """

    @abstractmethod
    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        """Stores the events whose id is new, all or none.

        If the store is seeded, the positive events that happened after `counted_until` are added to the counters of
        their items.
        A counter that cannot be decoded stays as it is: the events are stored without being counted, and the item is
        logged once as an error.

        Args:
            events: Of any users; of equal ids in one call the first counts.

        Returns:
            Those that were stored, once they are on disk.
        """

    @abstractmethod
    def history(self, user_id: str, until: int | None = None) -> list[Event]:
        """A user's newest `MOST_EVENTS` events that are not neutral, by (timestamp, arrival); empty: there are none.

        Args:
            user_id: The user.
            until: The last timestamp that counts, in seconds; None: all count.
        """

    @abstractmethod
    def recorded_ids(self, event_ids: Sequence[str]) -> set[str]:
        """Those of some event ids under which an event is stored, of any user."""

    @abstractmethod
    def revision(self, user_id: str) -> int:
        """A number that changes with the user's history and never comes back; 0 for a user without events.

        It grows with every recorded event, and after a deletion starts above all that went before.

        Args:
            user_id: The user.
        """

    def revisions(self, user_ids: Sequence[str]) -> dict[str, int]:
        """The `revision` of each of some users, with one question to the store where it is far away.

        Args:
            user_ids: The users.
        """
        return {user_id: self.revision(user_id) for user_id in user_ids}

    def revisions_at_once(self, user_ids: Sequence[str]) -> dict[str, int] | None:
        """As `revisions`, for an event loop: waits neither for a network nor for a lock.

        Args:
            user_ids: The users.

        Returns:
            The revisions; None: the store cannot say it without waiting.
        """
        return None

    @abstractmethod
    def changes(self, user_id: str, since: int = 0, most: int = MOST_EVENTS) -> Changes:
        """What came to a user's history after a revision. Costs little when nothing did.

        Args:
            user_id: The user.
            since: The revision that was read before; 0: none.
            most: When more events than this came, the answer is the whole history, of which `events` are the newest
                `most`.
        """

    @abstractmethod
    def log_slate(self, slate: Slate, *, started: float | None = None) -> None:
        """Logs a recommendation, once for each `recommendation_id`; returns at once and raises nothing.

        It is written with others within about a second. A crash, or a store that stays broken, loses it (counted in
        `dropped_count`), since an answer is worth more than its log. A slate whose user was deleted after the
        request began is not written, and does not count as dropped. Nor is one of a user who comes back within the
        second in which another server has yet to see the deletion.

        Args:
            slate: What was recommended.
            started: When the request began, by `time.monotonic()`; None: now.
        """

    @abstractmethod
    def record_shown(self, items: Sequence[ShownItem]) -> int:
        """Stores which items were shown, all or none; on disk on return. An item of a recommendation counts once.

        Args:
            items: Whether their recommendations are logged does not matter.

        Returns:
            How many are new.
        """

    @abstractmethod
    def all_shown(self) -> Iterator[Sequence[ShownItem]]:
        """Every item that was recorded as shown, in parts and in no order."""

    @abstractmethod
    def save_states(self, states: Sequence[SpilledState]) -> None:
        """Keeps states until they are wanted again; written later and without a promise, like slates.

        A later state of the same user and model version replaces the earlier one.
        """

    @abstractmethod
    def load_state(self, user_id: str, model_version: str) -> SpilledState | None:
        """The state that was kept for a user, perhaps of an older revision.

        Args:
            user_id: The user.
            model_version: The version whose state it is.

        Returns:
            The state; None: there is none.
        """

    @abstractmethod
    def drop_states(self, keep_versions: Collection[str], most: int, place: Any = None) -> Swept:
        """Deletes states of model versions that are not used any more, in a step that others need not wait for.

        Args:
            keep_versions: The versions whose states stay.
            most: About how many states, or users with states, to look at now.
            place: Where the last call ended; None: at the beginning.
        """

    @abstractmethod
    def prune_slates(self, before: int, most: int) -> bool:
        """Deletes slates from before a time, and the items of these that were shown, in a step that others need
        not wait for. Shown items without a slate go by the time at which they were recorded.

        Args:
            before: In seconds; what is of this second or later stays.
            most: About how many entries to look at now.

        Returns:
            Whether there may be more.
        """

    @abstractmethod
    def delete_user(self, user_id: str) -> Deleted:
        """Deletes all that is known of a user, on disk on return; the ids of the events may be used again.

        What any server still had to log or keep of the user is not written any more. Shown items of recommendations
        that are not logged have no user, and stay. The counters of items are sums
        over users and name none: they keep what the user's events added to them, and the second of an item's latest
        event.

        Args:
            user_id: The user.

        Returns:
            How many events and slates there were.
        """

    @abstractmethod
    def list_events(
        self, user_id: str, most: int, before: tuple[int, int] | None = None
    ) -> list[tuple[int, UserEvent]]:
        """A user's events, neutral ones too, newest first by (timestamp, arrival).

        Args:
            user_id: The user.
            most: How many events.
            before: Timestamp and arrival of an event: only events that are before it. None: all count.

        Returns:
            (arrival, event); fewer than `most`: there are no more.
        """

    @abstractmethod
    def delete_events(self, user_id: str, event_ids: Sequence[str]) -> int:
        """Deletes those of a user's events that have these ids, on disk on return; the ids may be used again.

        The user's history gets a new revision, as of which `changes` reads it as a whole. The counters of items keep
        what the events added to them.

        Args:
            user_id: The user.
            event_ids: Ids; those of other users' events and of none are ignored.

        Returns:
            How many events there were.
        """

    @abstractmethod
    def merge_users(self, source: str, target: str) -> Deleted:
        """Makes all that is stored of one user another one's, as a whole, on disk on return. Safe to repeat.

        Events keep their ids and arrivals. The source is then a user like any that never was: what any other server
        still had to log or keep of it is not written any more, and what comes later is of a new user.

        Args:
            source: The user to merge; it has no data afterwards.
            target: Another user, who need not have events.

        Returns:
            How many events and slates the source had.

        Raises:
            TooManyToMerge: The source has more than `MOST_MERGED`; nothing was changed.
        """

    @abstractmethod
    def last_arrival(self) -> int:
        """The latest arrival that was given, as `all_events` numbers them; 0: none was given yet.

        It never goes back, also where its event was deleted since. Events that become visible later have later
        arrivals.
        """

    @abstractmethod
    def all_events(self, after: int = 0) -> Iterator[Sequence[tuple[int, UserEvent]]]:
        """Every recorded event, in parts; those that come meanwhile may be missing.

        Args:
            after: Only events with later arrivals than this.

        Returns:
            Parts of (arrival, event). Arrivals grow with the order in which events were recorded, and are given once.
        """

    @abstractmethod
    def shown_items(self, user_id: str, since: int, most: int, but: str = "") -> list[str]:
        """What was recommended to a user from a time on, also if it waits here to be written.

        Args:
            user_id: The user.
            since: By `Slate.timestamp`, in seconds.
            most: How many items.
            but: The `recommendation_id` of a slate that does not count.

        Returns:
            Item ids, each once, of the newest `MOST_SLATES` slates, newest first.
        """

    @abstractmethod
    def all_slates(self, since: int = 0, most: int = EVERY_SLATE) -> Iterator[Sequence[Slate]]:
        """Every slate that was logged, in parts; those of one user in their order.

        Args:
            since: Only slates from this second on, then in small parts and in any order; one that is logged meanwhile
                may be missing, or bring another one twice. 0: all.
            most: With `since`: how many of them are wanted.

        Raises:
            TooManySlates: There are more than `most`.
        """

    @abstractmethod
    def item_counts(self, since: int = NONE_READ) -> ItemCounts:
        """The counters that changed since a read. Some that did not change may be among them.

        It costs little if no counter changed. Counters are complete once `counted_until` is not None. A read before
        that is no base for `since`: the next one may miss counters that the seed changed.

        Args:
            since: `ItemCounts.change` of that read; NONE_READ: all counters.

        Returns:
            The counters, the number to ask with the next time, and up to which arrival events are counted.

        Raises:
            StoreError: The store cannot be read, or a counter cannot be decoded.
        """

    @abstractmethod
    def counted_until(self) -> int | None:
        """Until when the seeding model's counts have all events, in seconds since 1970-01-01T00:00Z: the store counts
        later events only. None: the store is not seeded."""

    def seed_counts(self, exported: ItemCounts, until: int) -> None:
        """Begins the counters with a model's counts, once in the life of a store, however many servers try.

        Before that no event is counted. This adds the stored events that happened after `until`; from then on events
        that happened after `until` are counted when they are recorded. Earlier ones are in the model's counts.

        Args:
            exported: The model's counts, as of `until`; references ahead of the clock count as now.
            until: Until when, in seconds, the model's counts have all events; a time ahead of the clock counts as now.

        Raises:
            StoreError: The store cannot be read or written. To repeat the call neither loses nor doubles anything.
        """
        if self.counted_until() is not None:
            return
        now = int(time.time())
        counters = {
            item_id: Counter(min(reference, now), counts)
            for item_id, (reference, counts) in exported.counters().items()
        }
        self._seed(counters, min(until, now))

    @abstractmethod
    def _seed(self, counters: dict[str, Counter], until: int) -> None:
        """Unless the store is seeded: adds a model's counters and the stored events after `until` to the counters, and
        notes `counted_until`, so that no event is lost or counted twice.

        Args:
            counters: By item id; may be changed.
            until: What `counted_until` returns from then on, in seconds.
        """

    @abstractmethod
    def upsert_items(self, items: Sequence[Item]) -> int:
        """Stores items, all or none; on disk on return. Each replaces the one with its id as a whole.

        Args:
            items: Each id once.

        Returns:
            How many the store did not have before.
        """

    @abstractmethod
    def delete_items(self, item_ids: Sequence[str]) -> int:
        """Deletes items from the catalogue, all or none; on disk on return. Their events and counters stay.

        Args:
            item_ids: Each id once; those that the store does not have are ignored.

        Returns:
            How many the store had.
        """

    @abstractmethod
    def items_since(self, cursor: ItemCursor, most: int) -> ItemChanges:
        """The items that changed since the read before. Costs little if none did.

        Args:
            cursor: `ItemChanges.cursor` of the read before. If the store lacks one of its marks, the answer begins
                anew.
            most: How many items; if so many are answered, there may be more.
        """

    @abstractmethod
    def item(self, item_id: str) -> Item | None:
        """One item; None: the store does not have it. An item that cannot be decoded is hidden."""

    @abstractmethod
    def list_items(self, after: str, most: int) -> list[Item]:
        """Items in the order of their ids' bytes as UTF-8, which is that of their code points.

        Args:
            after: Only items with later ids than this; "": all.
            most: How many items.

        Returns:
            Items; fewer than `most`: there are no more.
        """

    @property
    @abstractmethod
    def dropped_count(self) -> int:
        """How many slates and states were given up since the store was opened."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when what `log_slate` and `save_states` put off has been written."""

    @abstractmethod
    def close(self) -> None:
        """Flushes and closes. No call may be under way or follow."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def digest(user_id: str) -> str:
    """What is remembered of a deleted user."""
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()
