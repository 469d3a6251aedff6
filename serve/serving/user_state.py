"""What the cache of states keeps of one user, and its bytes in the store."""

import json
import struct
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.events import NO_UNKNOWN, UnknownItems, positive_count
from serve.model.repeat import ITEM_STATS, ItemStats
from serve.stores.base import Changes

# Format, number of disliked items, bytes of the unknown items, last, newest, known_count, ignored_count,
# negative_count, item, rating, gap; then the state, the disliked items, the unknown items as JSON, and the excluded
# items or the ITEM_STATS.
_HEADER = struct.Struct("<IIIqqqqqiff")
# States of servers before there were negative events begin with a time, of which this is the lower half in 2106 only.
_FORMAT = 0xFFFFFFF2


@dataclass(slots=True)
class UserState:
    """What is kept of one user; `last` is the last event on an item that the model knows."""

    revision: int
    """Of the history that this has read."""
    newest: int
    """Time of the newest event of all, in seconds."""
    known_count: int
    """Positive events on items that the model knows. 0: all below but `disliked` is empty."""
    ignored_count: int
    """Positive events on other items."""
    negative_count: int
    """Events that are no part of the sequence."""
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
    disliked: NDArray[np.int32]
    """`[d]`, items of which the last event is negative."""
    unknown: UnknownItems
    """Items that the model does not know."""
    spilled: bool
    """Whether the store has it as it is."""

    def to_bytes(self) -> bytes:
        unknown = json.dumps(dict(self.unknown)).encode() if self.unknown else b""
        header = _HEADER.pack(
            *(_FORMAT, len(self.disliked), len(unknown)),
            *(self.last, self.newest, self.known_count, self.ignored_count, self.negative_count),
            *(self.item.item(), self.rating.item(), self.gap.item()),
        )
        seen = self.stats.tobytes() if len(self.stats) else self.exclude.tobytes()
        return header + self.before.tobytes() + self.disliked.tobytes() + unknown + seen

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
        if len(content) < _HEADER.size:
            return None
        found, disliked_count, unknown_size, last, newest, *counts, item, rating, gap = _HEADER.unpack_from(content)
        of_disliked = _HEADER.size + 4 * width
        of_unknown = of_disliked + 4 * disliked_count
        end = of_unknown + unknown_size
        kind = ITEM_STATS if repeats else np.dtype(np.int32)
        if found != _FORMAT or len(content) <= end or (len(content) - end) % kind.itemsize:
            return None
        known_count, ignored_count, negative_count = counts
        before = np.frombuffer(content, np.float32, width, _HEADER.size)
        disliked = np.frombuffer(content, np.int32, disliked_count, of_disliked)
        unknown = _unknown(content[of_unknown:end])
        rest: NDArray[Any] = np.frombuffer(content, kind, -1, end)
        items = rest["item"] if repeats else rest
        if not (
            1 <= item <= item_count
            and items.min() >= 0
            and items.max() <= item_count
            and disliked.min(initial=1) > 0
            and disliked.max(initial=1) <= item_count
            and known_count > 0
            and unknown is not None
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
            negative_count=negative_count,
            before=before[None],
            after=None,
            item=np.array([item], np.int32),
            rating=np.array([rating], np.float32),
            gap=np.array([gap], np.float32),
            last=last,
            exclude=_NO_ITEM if repeats else rest[None],
            stats=rest if repeats else _NO_STATS,
            disliked=disliked,
            unknown=unknown,
            spilled=True,
        )


def _unknown(content: bytes) -> UnknownItems | None:
    """None for bytes that are none."""
    if not content:
        return NO_UNKNOWN
    try:
        found = json.loads(content)
    except ValueError:
        return None
    is_right = isinstance(found, dict) and all(isinstance(value, bool) for value in found.values())
    return found if is_right else None


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


def empty_state(changes: Changes, known_count: int, width: int) -> UserState:
    """What can be said of a history without the sequence: `known_count` and all that belongs to it stays empty.

    Args:
        changes: The history.
        known_count: Its positive events on items that the model knows.
        width: Of the state.
    """
    positive = positive_count(changes.events)
    zero = np.zeros(1, np.float32)
    return UserState(
        revision=changes.revision,
        newest=max((event.timestamp for event in changes.events), default=0),
        known_count=0,
        ignored_count=positive - known_count,
        negative_count=len(changes.events) - positive,
        before=np.zeros((1, width), np.float32),
        after=None,
        item=np.zeros(1, np.int32),
        rating=zero,
        gap=zero,
        last=0,
        exclude=_NO_ITEM,
        stats=_NO_STATS,
        disliked=np.zeros(0, np.int32),
        unknown=NO_UNKNOWN,
        spilled=False,
    )
