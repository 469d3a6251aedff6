"""Which users, items and events of the whole log are kept, and their dense indices."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxrec.data.histories import Block, EventLog, Histories, blocks, event_writers, open_histories, release
from jaxrec.data.ids import IdMap

# True for the events that the filter, and with it the catalogue, is fitted on.
FittedEvents = Callable[[Block], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Core:
    """What the filter keeps: `users` [log users] bool, `items` [log items + 1] bool (0 = padding, False)."""

    users: np.ndarray
    items: np.ndarray


def count_items(
    log: EventLog, fitted: FittedEvents, items: np.ndarray, min_user_ratings: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the fitted events on some items, of the users that have enough of them.

    Args:
        log: All events, or those of some users.
        fitted: Which of them count.
        items: [items + 1] bool: the items that are left.
        min_user_ratings: Events on these that a user needs; one without any is dropped whatever the threshold.

    Returns:
        Events per item [items + 1] int64, and the users [log users] bool that have enough.
    """
    counts, users = np.zeros(len(items), np.int64), np.zeros(len(log.users), bool)
    for block in blocks(log.events.offsets):
        of_events = log.events.items[block.rows]
        kept = fitted(block) & items[of_events]
        users[block.users] = block.sums(kept) >= max(1, min_user_ratings)
        kept &= block.per_event(users[block.users])
        counts += np.bincount(of_events[kept], minlength=len(counts))
        release(log.events.items)
    return counts, users


def k_core(count: Callable[[np.ndarray], np.ndarray], items: int, min_item_ratings: int) -> np.ndarray:
    """The items that are left when no user and no item has few fitted events (the literature's k-core).

    Args:
        count: Counts the events of the items [items + 1] bool that are left so far: the sum of `count_items` over the
            parts of the log. A user that falls out in one round has no more events in the next, so nothing has to be
            remembered of users.
        items: Number of items of the log.
        min_item_ratings: Events that an item needs; one without any is dropped whatever the threshold.

    Returns:
        [items + 1] bool (0 = padding, False); all False where nothing is left.
    """
    kept = np.arange(items + 1) > 0
    while True:
        left = kept & (count(kept) >= max(1, min_item_ratings))
        if np.array_equal(left, kept) or not left.any():
            return left
        kept = left


@dataclasses.dataclass(frozen=True)
class FilteredLog:
    """Kept events, by kept user. `order` [users] int64: each one's position among the log's users.

    `train_counts` [users] int64: how many of the kept events the filter was fitted on; `last_kept` and
    `before_last_kept` [users] bool: whether the last two of all of a user's events are kept.
    """

    histories: Histories
    order: np.ndarray
    train_counts: np.ndarray
    last_kept: np.ndarray
    before_last_kept: np.ndarray


def filter_log(
    log: EventLog,
    fitted: FittedEvents,
    core: Core,
    catalog: IdMap,
    known_users: IdMap | None,
    keep_every_user: bool,
    folder: Path,
    current_items: np.ndarray | None = None,
) -> FilteredLog:
    """Writes the kept events as columns into `folder`.

    Kept are the fitted events of the core, and of the others those whose item is in the catalogue and whose user is in
    the core, or with `keep_every_user` of any user, with all the events before them.

    Args:
        log: All events.
        fitted: Which of them the filter was fitted on.
        core: What the filter keeps of these.
        catalog: The items, whose indices the columns get.
        known_users: Users that come first, in this order, and stay, if only without events; the others follow sorted
            by raw id.
        keep_every_user: Whether users outside of the core are evaluated.
        folder: Where the columns go.
        current_items: Raw ids of the items that the log's other events may have; None: all of the catalogue. The rest
            of the catalogue only keeps its indices.

    Returns:
        The kept events as memory maps.
    """
    events = log.events
    index = catalog.encode(log.items.raw_ids)
    index = np.concatenate([[0], index]).astype(np.int32)
    usable = index > 0
    if current_items is not None:
        usable[1:] &= np.isin(log.items.raw_ids, current_items)

    def kept_events(block: Block, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of_core = block.per_event(core.users[block.users])
        is_fitted = fitted(block)
        # A user with events of both kinds is asked about: the history counts whole, also where it does not train.
        asked = keep_every_user & block.per_event(block.sums(~is_fitted) > 0)
        kept = np.where(
            is_fitted,
            np.where(of_core, core.items[items], asked & usable[items]),
            usable[items] & (of_core | keep_every_user),
        )
        return kept, is_fitted & of_core

    counts, train_counts = np.zeros((2, len(log.users)), np.int64)
    last_kept, before_last_kept = np.zeros((2, len(log.users)), bool)
    for block in blocks(events.offsets):
        kept, trains = kept_events(block, events.items[block.rows])
        counts[block.users] = block.sums(kept)
        train_counts[block.users] = block.sums(kept & trains)
        ends = np.cumsum(block.lengths)
        last_kept[block.users] = kept[ends - 1]
        before_last_kept[block.users] = kept[np.maximum(ends - 2, 0)]
        release(events.items, events.times)
    order = _user_order(log.users, counts > 0, known_users)
    with event_writers(folder) as writers:
        for block in blocks(events.offsets, None if _is_identity(order, len(log.users)) else order):
            items = events.items[block.rows]
            kept, _ = kept_events(block, items)
            writers["items"].write(index[items[kept]])
            writers["ratings"].write(events.ratings[block.rows][kept])
            writers["times"].write(events.times[block.rows][kept])
            release(events.items, events.ratings, events.times)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64))
    return FilteredLog(open_histories(folder), order, train_counts[order], last_kept[order], before_last_kept[order])


def _user_order(users: IdMap, kept: np.ndarray, known: IdMap | None) -> np.ndarray:
    if known is None:
        return sorted_by_raw_id(users, np.flatnonzero(kept))
    first = users.encode(known.raw_ids).astype(np.int64) - 1
    kept = kept.copy()
    kept[first] = False
    return np.concatenate([first, sorted_by_raw_id(users, np.flatnonzero(kept))])


def sorted_by_raw_id(ids: IdMap, positions: np.ndarray) -> np.ndarray:
    """0-based positions in `ids`, in the order of their raw ids."""
    return positions[np.argsort(ids.raw_ids[positions], kind="stable")]


def _is_identity(order: np.ndarray, count: int) -> bool:
    return len(order) == count and bool((order == np.arange(count)).all())
