"""Which users, items and events of the whole log are kept, and their dense indices."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxrec.data.histories import Block, EventLog, Histories, blocks, event_writers, open_histories, release
from jaxrec.data.ids import IdMap

# True for the events that the filter, and with it the catalogue, is fitted on.
Fitted = Callable[[Block], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Core:
    """What the filter keeps: `users` [log users] bool, `items` [log items + 1] bool (0 = padding, False)."""

    users: np.ndarray
    items: np.ndarray


def k_core(log: EventLog, fitted: Fitted, min_user_ratings: int, min_item_ratings: int) -> Core:
    """Drops users and items with few fitted events, again and again until none is left (the literature's k-core).

    A user or an item without any fitted event is dropped whatever the threshold.
    """
    events = log.events
    core = Core(np.ones(len(log.users), bool), np.ones(len(log.items) + 1, bool))
    core.items[0] = False
    while True:
        by_user = np.zeros(len(core.users), np.int64)
        by_item = np.zeros(len(core.items), np.int64)
        for block in blocks(events.offsets):
            items = events.items[block.rows]
            kept = fitted(block) & block.per_event(core.users[block.users]) & core.items[items]
            by_user[block.users] = block.sums(kept)
            by_item += np.bincount(items[kept], minlength=len(by_item))
            release(events.items)
        users = by_user >= max(1, min_user_ratings)
        items_kept = by_item >= max(1, min_item_ratings)
        stable = (users == core.users).all() and (items_kept == core.items).all()
        core = Core(users, items_kept)
        if stable:
            return core


@dataclasses.dataclass(frozen=True)
class Selection:
    """Kept events. `order`: the log's user of each kept user; `index` [log items + 1]: new index of each item, 0 for
    none; `train_counts`, `last_kept` and `before_last_kept` [kept users]: how many of a user's kept events are fitted,
    and whether the last two of all its events are kept."""

    histories: Histories
    order: np.ndarray
    train_counts: np.ndarray
    last_kept: np.ndarray
    before_last_kept: np.ndarray


def select(
    log: EventLog,
    fitted: Fitted,
    core: Core,
    catalog: IdMap,
    known_users: IdMap | None,
    keep_every_user: bool,
    folder: Path,
    current_items: np.ndarray | None = None,
) -> Selection:
    """Writes the kept events as columns into `folder`: the fitted ones of the core, and of the others those whose
    item is in the catalogue (and one of the raw ids `current_items`, where the catalogue has more, which only keep
    their index) and whose user is in the core (or any user, with all the events before them).

    Users come in the order of `known_users`, then sorted by raw id; a known user stays, if only without events.
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
    return Selection(open_histories(folder), order, train_counts[order], last_kept[order], before_last_kept[order])


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
