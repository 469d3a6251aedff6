"""What the cache of states keeps of one user, and its bytes in the store."""

import struct
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.repeat import ITEM_STATS, ItemStats
from serve.stores.base import Changes

# last, newest, known_count, ignored_count, item, rating, gap; then the state and the excluded items or the ITEM_STATS.
_HEADER = struct.Struct("<qqqqiff")


@dataclass(slots=True)
class UserState:
    """What is kept of one user; `last` is the last event on an item that the model knows."""

    revision: int
    """Of the history that this has read."""
    newest: int
    """Time of the newest event of all, in seconds."""
    known_count: int
    """Events on items that the model knows. 0: all below is empty."""
    ignored_count: int
    """Events on other items."""
    before: NDArray[np.float32]
    """`[1, width]`, the state before `last`."""
    after: NDArray[np.float32] | None
    """`[1, width]`, the state after it, once it was needed."""
    item: NDArray[np.int32]
    rating: NDArray[np.float32]
    gap: NDArray[np.float32]
    """`last` as `Step` has it, each `[1]`."""
    last: int
    """When that was, in seconds."""
    exclude: NDArray[np.int32]
    """`[1, m]`, m >= 1, items of the whole history; `[[0]]` where they may be recommended again."""
    stats: ItemStats
    """Of the whole history, for a model that may recommend its items again; else none."""
    spilled: bool
    """Whether the store has it as it is."""

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(
            *(self.last, self.newest, self.known_count, self.ignored_count),
            *(self.item.item(), self.rating.item(), self.gap.item()),
        )
        return header + self.before.tobytes() + (self.stats.tobytes() if len(self.stats) else self.exclude.tobytes())

    @classmethod
    def from_bytes(cls, revision: int, content: bytes, width: int, item_count: int, repeats: bool) -> Self | None:
        """Reads what `to_bytes` wrote.

        Args:
            revision: Of the history that the state has read.
            content: Any bytes.
            width: Of the state.
            item_count: Of the model.
            repeats: Whether the model may recommend items of the history again.

        Returns:
            None for bytes that are no state of this width and on these items.
        """
        end = _HEADER.size + 4 * width
        kind = ITEM_STATS if repeats else np.dtype(np.int32)
        if len(content) <= end or (len(content) - end) % kind.itemsize:
            return None
        last, newest, known_count, ignored_count, item, rating, gap = _HEADER.unpack_from(content)
        before = np.frombuffer(content, np.float32, width, _HEADER.size)
        rest: NDArray[Any] = np.frombuffer(content, kind, -1, end)
        items = rest["item"] if repeats else rest
        if not (
            1 <= item <= item_count
            and items.min() >= 0
            and items.max() <= item_count
            and known_count > 0
            and np.isfinite(before).all()
            and np.isfinite((rating, gap)).all()
            and (not repeats or _are_stats(rest, known_count))
        ):
            return None
        return cls(
            revision=revision,
            newest=newest,
            known_count=known_count,
            ignored_count=ignored_count,
            before=before[None],
            after=None,
            item=np.array([item], np.int32),
            rating=np.array([rating], np.float32),
            gap=np.array([gap], np.float32),
            last=last,
            exclude=_NO_ITEM if repeats else rest[None],
            stats=rest if repeats else _NO_STATS,
            spilled=True,
        )


_NO_ITEM = np.zeros((1, 1), np.int32)
_NO_STATS: ItemStats = np.zeros(0, ITEM_STATS)


def _are_stats(stats: ItemStats, length: int) -> bool:
    """Whether rows can be those of a history of that many events."""
    return bool(
        stats["item"][0] > 0
        and (np.diff(stats["item"]) > 0).all()
        and stats["count"].min() > 0
        and stats["count"].sum(dtype=np.int64) == length
        and stats["place"].min() >= 0
        and stats["place"].max() < length
        and (stats["first"] <= stats["last"]).all()
    )


def empty_state(changes: Changes, ignored_count: int, width: int) -> UserState:
    """Of a user whose history has no event that the model knows, as far as it was read.

    Args:
        changes: The history.
        ignored_count: Its events on items that the model does not know.
        width: Of the state.
    """
    zero = np.zeros(1, np.float32)
    return UserState(
        revision=changes.revision,
        newest=max((event.timestamp for event in changes.events), default=0),
        known_count=0,
        ignored_count=ignored_count,
        before=np.zeros((1, width), np.float32),
        after=None,
        item=np.zeros(1, np.int32),
        rating=zero,
        gap=zero,
        last=0,
        exclude=_NO_ITEM,
        stats=_NO_STATS,
        spilled=False,
    )
