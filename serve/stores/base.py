"""What a store of events, impressions and recurrent states promises, whichever database is behind it.

with open_store("events.sqlite") as store:          # or postgresql://..., redis://...
    store.record([UserEvent("e1", "7", Event("318", 4.5, 964983000))])
    store.history("7")
"""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Self

from serve.model.events import Event
from serve.stores.counters import NONE_READ, Counter, ItemCounts

MOST_EVENTS = 10_000
"""Of a user's history so many are read, the newest by time. All that is recorded stays in the store, as a log to learn
from; but a user with millions of events must not cost all others their answers."""

# A deletion is remembered for so long, by a digest of the user's id: what other servers still had to write of the user
# is not written any more.
DELETION_S = 7 * 86_400


class StoreError(Exception):
    """The store cannot be opened, read or written; nothing of the failed call was acknowledged."""


class UserEvent(NamedTuple):
    """An event with its user and the client's own id for it."""

    event_id: str
    user_id: str
    event: Event
    recommendation_id: str | None = None
    """The recommendation that the event answers to; not checked against the impressions."""


class Impression(NamedTuple):
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
    """What the request itself excluded, beside the user's history, as far as the model knows it."""
    trend_time: int | None = None
    """The second, since 1970-01-01T00:00Z, to which the counts of the trend that ranked it were decayed. None: it was
    ranked without a trend, or by a server that did not note this yet."""
    trend_arrival: int | None = None
    """The arrival, as `EventStore.all_events` numbers it, of the last event in these counts; 0: no event is in them.
    None: the counts were those of the model's export alone, or `trend_time` is None."""
    request_options: tuple[str, ...] = ()
    """Which of `filter`, `seen` and `new_item_slots` the request set to something else than the model does by itself.
    Their values are not noted, so the propensities cannot be computed again."""


class Changes(NamedTuple):
    """What became of a user's history since a revision that was read before."""

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


class Deleted(NamedTuple):
    """How much of a user there was."""

    event_count: int
    impression_count: int


class EventStore(ABC):
    """An open store, to be shared between threads. Close it, or use it in a `with` statement.

    Every call may raise StoreError, and works again once the cause is gone.
    """

    @abstractmethod
    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        """Stores the events whose id is new, all or none.

        If the store is seeded, the events that happened after `counted_until` are added to the counters of their items.
        A counter that cannot be decoded stays as it is: the events are stored without being counted, and the item is
        logged once as an error.

        Args:
            events: Of any users; of equal ids in one call the first counts.

        Returns:
            Those that were stored, once they are on disk.
        """

    @abstractmethod
    def history(self, user_id: str, until: int | None = None) -> list[Event]:
        """A user's newest `MOST_EVENTS` events by (timestamp, arrival); empty for a user without events.

        Args:
            user_id: The user.
            until: The last timestamp that counts, in seconds; None: all count.
        """

    @abstractmethod
    def revision(self, user_id: str) -> int:
        """A number that changes with the user's history and never comes back; 0 for a user without events.

        It grows with every recorded event, and after a deletion starts above all that went before.

        Args:
            user_id: The user.
        """

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
    def log_impression(self, impression: Impression, *, started: float | None = None) -> None:
        """Logs a recommendation, once for each `recommendation_id`; returns at once and raises nothing.

        It is written with others within about a second. A crash, or a store that stays broken, loses it (counted in
        `dropped_count`), since an answer is worth more than its log. An impression whose user was deleted after the
        request began is not written, and does not count as dropped.

        Args:
            impression: What was recommended.
            started: When the request began, by `time.monotonic()`; None: now.
        """

    @abstractmethod
    def save_states(self, states: Sequence[SpilledState]) -> None:
        """Keeps states until they are wanted again; written later and without a promise, like impressions.

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
    def drop_states(self, keep_versions: Collection[str], most: int) -> int:
        """Deletes states of model versions that are not used any more.

        Args:
            keep_versions: The versions whose states stay.
            most: About how many states to delete now.

        Returns:
            How many were deleted, 0 when none was left.
        """

    @abstractmethod
    def delete_user(self, user_id: str) -> Deleted:
        """Deletes all that is known of a user, on disk on return; the ids of the events may be used again.

        What any server still had to log or keep of the user is not written any more. The counters of items are sums
        over users and name none: they keep what the user's events added to them, and the second of an item's latest
        event.

        Args:
            user_id: The user.

        Returns:
            How many events and impressions there were.
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
    def all_impressions(self) -> Iterator[Sequence[Impression]]:
        """Every impression that was logged, in parts; those of one user in their order."""

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

    @property
    @abstractmethod
    def dropped_count(self) -> int:
        """How many impressions and states were given up since the store was opened."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when what `log_impression` and `save_states` put off has been written."""

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
