"""The slates that a store logged, as arrays: which arm showed them to whom, and what came of them."""

import time
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.stores.base import EventStore, Slate, UserEvent

QUANTILE = 0.99  # of the responses: by when the log ends, and within which window they come by default
SENT_ALONG = "without a user id"
EMPTY = "without an item"
STILL_OPEN = "with an open attribution window"
NAMED = "of a version that the request named"
NO_EVENTS = "from before the events that are read"
FIRST_EVENTS = 101
"""The median of their times is when the first event that is read arrived: single ones have a wrong clock."""


class Arm(NamedTuple):
    """What answered: a model version, and what ranked the items (`supervised`, `reinforce`, `popularity`)."""

    model_version: str
    policy: str


class TooLong(Exception):
    """There is more in a log than may be read."""


class Bounds(NamedTuple):
    """How much of a log is read."""

    since: int
    """Slates from this second on."""
    slates: int
    """At most so many."""
    events: int
    """So many of the newest events."""
    until: float
    """By when it must have been read, by `time.monotonic()`."""

    def check(self, slates: int) -> None:
        """Raises TooLong if more than so many slates were read, or it took too long."""
        seconds = int(time.time()) - self.since
        shorter = "ask for a shorter time, or use `python -m serve outcomes`"
        if slates > self.slates:
            raise TooLong(f"there are more than {self.slates} recommendations in the last {seconds} seconds: {shorter}")
        if time.monotonic() > self.until:
            raise TooLong(f"the log of the last {seconds} seconds cannot be read in time: {shorter}")


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
    slate, item, came, delay = array("q"), array("i"), array("q"), array("q")
    now = int(time.time())
    newest = _NewestEvents(store, bounds)
    for events in newest:
        for _, new in events:
            number = numbers.get(new.recommendation_id or "")
            at = new.event.timestamp
            positive = new.event.weight > 0
            if number is None or not positive or users.get(new.user_id) != user[number] or at > now:
                continue
            on = items.get(new.event.item_id, -1)
            if on not in slots[offsets[number] : offsets[number + 1]]:
                continue
            slate.append(number)
            item.append(on)
            came.append(at)
            delay.append(max(0, at - shown_at[number]))
    window = _quantile(np.array(delay)) if attribution_window is None else attribution_window
    closed = np.array(shown_at, np.int64) <= max(_quantile(np.array(came)), last) - window
    left_out[STILL_OPEN] = int((~closed).sum())
    has_events = np.array(shown_at, np.int64) >= newest.first_time(now)
    left_out[NO_EVENTS] = int((closed & ~has_events).sum())
    closed &= has_events
    within = np.array(delay, np.int64) <= window
    starts = np.array(offsets, np.int64)
    hits = _hits(np.array(slate, np.int64)[within], np.array(item)[within], np.array(slots, np.int32), starts)
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
    """Those within the bounds; raises TooLong."""
    count = 0
    for slates in store.all_slates(0 if bounds is None else bounds.since):
        count += len(slates)
        if bounds is not None:
            bounds.check(count)
        yield slates


class _NewestEvents:
    """The newest events of a store, in parts."""

    def __init__(self, store: EventStore, bounds: Bounds | None) -> None:
        """Reads nothing yet but how many there may be."""
        self._store, self._bounds = store, bounds
        self._after = 0 if bounds is None else max(0, store.last_arrival() - bounds.events)
        self._arrivals, self._times = array("q"), array("q")

    def __iter__(self) -> Iterator[Sequence[tuple[int, UserEvent]]]:
        for events in self._store.all_events(self._after):
            if self._bounds is not None:
                self._bounds.check(0)
            if self._after:
                self._arrivals.extend(arrival for arrival, _ in events)
                self._times.extend(new.event.timestamp for _, new in events)
            yield events

    def first_time(self, now: int) -> float:
        """When the first of them arrived, by their own times; `now`: there is none. 0: they are all events."""
        if not self._after:
            return 0.0
        first = np.array(self._times)[np.argsort(np.array(self._arrivals))[:FIRST_EVENTS]]
        return float(np.median(first)) if len(first) else now


def _hits(
    slate: NDArray[np.int64], item: NDArray[np.int32], slots: NDArray[np.int32], starts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`[slots]`, 1.0 where the slot's item was interacted with, however often.

    Args:
        slate: `[responses]`, the slate that each names.
        item: `[responses]`.
        slots: `[slots]`, the items of all slates.
        starts: `[slates+1]`, where each slate begins in `slots`.
    """
    hits = np.zeros(len(slots))
    for number, one in zip(slate.tolist(), item.tolist(), strict=True):
        of_slate = slice(starts[number], starts[number + 1])
        hits[of_slate][slots[of_slate] == one] = 1.0
    return hits


def _discounts(starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[slots]`, DCG's 1 / log2(rank + 1), scaled to sum 1 in each slate."""
    lengths = np.diff(starts)
    gains = 1.0 / np.log2(np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + 2.0)
    number_of = np.repeat(np.arange(len(lengths)), lengths)
    return gains / np.bincount(number_of, gains, len(lengths))[number_of]


def _quantile(values: NDArray[np.int64]) -> int:
    """The least of the values that at least QUANTILE of them do not exceed; 0 where there is none."""
    return int(np.quantile(values, QUANTILE, method="inverted_cdf")) if len(values) else 0
