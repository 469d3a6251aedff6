"""The slates that a store logged, as arrays: which arm showed them to whom, and the responses to them."""

import heapq
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.stores.base import EventStore, Slate, TooManySlates, UserEvent

QUANTILE = 0.99  # of the responses: by when the log ends, and within which window they come by default
SENT_ALONG = "without a user id"
EMPTY = "without an item"
SHORTER = "ask for a shorter time, or use `python -m serve outcomes`"
STILL_OPEN = "with an open attribution window"
NAMED = "of a version that the request named"
NO_EVENTS = "from before the events that are read"
FIRST_RESPONSES = 11
"""Of the newest events, those that arrived first. The median of their times is taken for the time from which on all
responses are read, since single clocks are wrong."""


class Arm(NamedTuple):
    """What answered: a model version, and what ranked the items (`supervised`, `reinforce`, `popularity`)."""

    model_version: str
    policy: str


class TooLong(Exception):
    """There is more in a log than may be read."""


class TooSlow(Exception):
    """A log was not read in the time that there is for it."""


class Bounds(NamedTuple):
    """How much of a log is read."""

    since: int
    """Slates from this second on."""
    slates: int
    """At most so many."""
    items: int
    """At most so many in all of the slates together."""
    events: int
    """So many of the newest events."""
    until: float
    """By when it must have been read, by `time.monotonic()`."""
    check_wanted: Callable[[], None] = lambda: None
    """Raises what ends the reading, if nobody waits for it any more."""

    def check(self, items: int) -> None:
        """Raises TooLong if more than so many items were read, TooSlow if it took too long, and as `check_wanted`."""
        if items > self.items:
            raise self.too_long(self.items, "items in the recommendations")
        if time.monotonic() > self.until:
            raise TooSlow(f"the log of the last {self._seconds()} seconds cannot be read in time: {SHORTER}")
        self.check_wanted()

    def too_long(self, most: int, what: str) -> TooLong:
        """The error where there is more than that of something."""
        return TooLong(f"there are more than {most} {what} of the last {self._seconds()} seconds: {SHORTER}")

    def _seconds(self) -> int:
        return int(time.time()) - self.since


class Slates(NamedTuple):
    """Slates whose attribution window has closed."""

    arms: list[Arm]
    """In the order of their first slate in the log."""
    arm: NDArray[np.int32]
    """`[slates]`, index into `arms`."""
    user: NDArray[np.int32]
    """`[slates]`, from 0 on."""
    responded: NDArray[np.float64]
    """`[slates]`, 1.0: the user interacted with an item of the slate within the window."""
    reward: NDArray[np.float64]
    """`[slates]`, the share of its slots that were interacted with, weighted by DCG's rank discounts, 0..1."""
    attribution_window: int
    """In seconds."""
    left_out: dict[str, int]
    """How many other slates there are, by reason."""


def read_slates(store: EventStore, attribution_window: int | None = None, bounds: Bounds | None = None) -> Slates:
    """Reads a store, and attributes events to slates as `jaxrec rl served` does.

    A positive event is a response to the slate that it names, if it is on an item of the slate, by the same user, and
    comes within the attribution window by its own clock; one before the slate counts as immediate. Only events on
    items of their slate count for the default window. The log ends with the last slate, or with the responses, if
    these end later (all but the last one in a hundred). Slates less than the window before that are left out. So are
    slates of a model version that the request named: no draw decided who got them. Events dated after now have a wrong
    clock and count for neither.

    Args:
        store: Servers may use it. Some 300 bytes for each slate, 50 for each of its items and 30 for each
            response are in memory.
        attribution_window: In seconds; None: within which 99 % of the log's responses came.
        bounds: How much is read; None: all. If the events do not reach back to the first slates, these are left out.

    Returns:
        The slates.

    Raises:
        StoreError: The store cannot be read.
        TooLong: There is more than `bounds` allow.
        TooSlow: It takes longer than `bounds` allow.
    """
    numbers: dict[str, int] = {}  # of a slate, by its recommendation id
    arms: dict[Arm, int] = {}
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    arm, user, shown_at = array("i"), array("i"), array("q")
    slots, offsets = array("i"), array("q", [0])
    left_out = {SENT_ALONG: 0, EMPTY: 0, NAMED: 0}
    last = 0
    for slates in _slates(store, bounds):
        for one in slates:
            last = max(last, one.timestamp)
            if one.user_id is None or not one.item_ids or "model_version" in one.request_options:
                left_out[SENT_ALONG if one.user_id is None else NAMED if one.item_ids else EMPTY] += 1
                continue
            if one.recommendation_id in numbers:
                continue
            numbers[one.recommendation_id] = len(arm)
            arm.append(arms.setdefault(Arm(one.model_version, one.policy), len(arms)))
            user.append(users.setdefault(one.user_id, len(users)))
            shown_at.append(one.timestamp)
            slots.extend(items.setdefault(item_id, len(items)) for item_id in one.item_ids)
            offsets.append(len(slots))
    slot, came, delay = array("q"), array("q"), array("q")
    now = int(time.time())
    newest = _NewestEvents(store, bounds)
    for events in newest:
        for arrival, new in events:
            number = numbers.get(new.recommendation_id or "")
            at = new.event.timestamp
            positive = new.event.weight > 0
            if number is None or not positive or users.get(new.user_id) != user[number] or at > now:
                continue
            at_slot = _slot(slots, items.get(new.event.item_id, -1), offsets[number], offsets[number + 1])
            if at_slot is None:
                continue
            slot.append(at_slot)
            came.append(at)
            delay.append(max(0, at - shown_at[number]))
            newest.respond(arrival, max(at, shown_at[number]))
    window = _quantile(np.array(delay)) if attribution_window is None else attribution_window
    closed = np.array(shown_at, np.int64) <= max(_quantile(np.array(came)), last) - window
    left_out[STILL_OPEN] = int((~closed).sum())
    has_events = np.array(shown_at, np.int64) >= newest.first_time(now)
    left_out[NO_EVENTS] = int((closed & ~has_events).sum())
    closed &= has_events
    within = np.array(delay, np.int64) <= window
    starts = np.array(offsets, np.int64)
    hits = np.zeros(len(slots))  # [slots] 1.0 where the slot's item was interacted with, however often
    hits[np.array(slot, np.int64)[within]] = 1.0
    number_of = np.repeat(np.arange(len(arm)), np.diff(starts))  # [slots] the slate of each
    return Slates(
        list(arms),
        np.array(arm, np.int32)[closed],
        np.array(user, np.int32)[closed],
        (np.bincount(number_of, hits, len(arm)) > 0)[closed].astype(np.float64),
        np.bincount(number_of, hits * _discounts(starts), len(arm))[closed].astype(np.float64),
        window,
        {reason: count for reason, count in left_out.items() if count},
    )


def _slates(store: EventStore, bounds: Bounds | None) -> Iterator[Sequence[Slate]]:
    """Those within the bounds; raises TooLong and TooSlow."""
    if bounds is None:
        yield from store.all_slates()
        return
    items = 0
    try:
        for slates in store.all_slates(max(1, bounds.since), bounds.slates):
            items += sum(len(one.item_ids) for one in slates)
            bounds.check(items)
            yield slates
    except TooManySlates as error:
        raise bounds.too_long(bounds.slates, "recommendations") from error


def _slot(slots: "array[int]", item: int, start: int, end: int) -> int | None:
    """The place of an item among the slots of one slate; None: it is not there."""
    try:
        return slots.index(item, start, end)
    except ValueError:
        return None


class _NewestEvents:
    """The newest events of a store, in parts."""

    def __init__(self, store: EventStore, bounds: Bounds | None) -> None:
        """Reads nothing yet but how many there may be."""
        self._store, self._bounds = store, bounds
        self._after = 0 if bounds is None else max(0, store.last_arrival() - bounds.events)
        self._responses: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[Sequence[tuple[int, UserEvent]]]:
        for events in self._store.all_events(self._after):
            if self._bounds is not None:
                self._bounds.check(0)
            yield events

    def respond(self, arrival: int, time: int) -> None:
        """One of them is a response. Others, such as events of long ago that are imported, do not say when they
        arrived."""
        if self._after:
            self._responses.append((arrival, time))

    def first_time(self, now: int) -> float:
        """From when on all responses are among them; `now`: there is no response. 0: they are all events."""
        if not self._after:
            return 0.0
        first = [time for _, time in heapq.nsmallest(FIRST_RESPONSES, self._responses)]
        return float(np.median(first)) if first else now


def _discounts(starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[slots]`, DCG's 1 / log2(rank + 1), scaled to sum 1 in each slate."""
    lengths = np.diff(starts)
    gains = 1.0 / np.log2(np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + 2.0)
    number_of = np.repeat(np.arange(len(lengths)), lengths)
    return gains / np.bincount(number_of, gains, len(lengths))[number_of]


def _quantile(values: NDArray[np.int64]) -> int:
    """The least of the values that at least QUANTILE of them do not exceed; 0 where there is none."""
    return int(np.quantile(values, QUANTILE, method="inverted_cdf")) if len(values) else 0
