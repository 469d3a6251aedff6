"""All users' events as ragged columns: user u's events are rows offsets[u] : offsets[u + 1], in time order.

On disk each column is one .npy file, which is written block by block and read as a memory map.
"""

import contextlib
import dataclasses
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from jaxrec.data.ids import IdMap, open_ids
from jaxrec.data.schema import UNKNOWN_GAP

BLOCK_EVENTS = 4_000_000  # events that a pass over the log holds in memory at a time
EVENT_TYPES: dict[str, type[np.generic]] = {"items": np.int32, "ratings": np.float32, "times": np.int64}


@dataclasses.dataclass(frozen=True)
class Histories:
    """`offsets` [users + 1] int64; per event `items` int32, `ratings` float32 (raw, NaN = none), `times` int64."""

    offsets: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray

    @property
    def user_count(self) -> int:
        return len(self.offsets) - 1

    @property
    def event_count(self) -> int:
        return len(self.items)

    def lengths(self) -> np.ndarray:
        """[users] int64: events per user."""
        return np.diff(self.offsets)

    def users(self) -> np.ndarray:
        """[events] int64: the user of each event."""
        return np.repeat(np.arange(self.user_count), self.lengths())

    def positions(self) -> np.ndarray:
        """[events] int64: 0 for a user's first event, 1 for the second, ..."""
        return np.arange(self.event_count) - np.repeat(self.offsets[:-1], self.lengths())

    def gaps(self) -> np.ndarray:
        """[events] float32: seconds since the same user's event before, UNKNOWN_GAP for the first."""
        gaps = np.empty(self.event_count, np.float32)
        gaps[1:] = np.diff(self.times)
        gaps[self.offsets[:-1][self.lengths() > 0]] = UNKNOWN_GAP
        return gaps


def padded_history(column: np.ndarray, starts: np.ndarray, stops: np.ndarray, least_width: int = 1) -> np.ndarray:
    """One column of some histories as rows of one width.

    Args:
        column: [events], not empty: `Histories.items` or `Histories.times`.
        starts: [n] int, the row of each history's first event.
        stops: [n] int, the row after its last event.
        least_width: At least so wide is the result.

    Returns:
        [n, width] of the column's type, right-padded with 0. The width is a power of two, so that few shapes are
        compiled.

    Examples:
        >>> padded_history(np.array([7, 8, 9, 5]), np.array([0, 3]), np.array([3, 4])).tolist()
        [[7, 8, 9, 0], [5, 0, 0, 0]]
    """
    rows = starts[:, None] + np.arange(power_of_two(max(least_width, int((stops - starts).max(initial=0)))))
    where = rows < stops[:, None]
    return np.where(where, column[np.where(where, rows, 0)], np.zeros((), column.dtype))


def power_of_two(least: int) -> int:
    """The lowest power of two that is at least `least`, which is 1 or more.

    Examples:
        >>> [power_of_two(least) for least in (1, 2, 3, 8, 9)]
        [1, 2, 4, 8, 16]
    """
    return 1 << (least - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class EventLog:
    """A whole log before any filter: what `append` builds on.

    `events.items` are 1-based indices into `items`; users and items are all that occur.
    """

    users: IdMap
    items: IdMap
    events: Histories


def open_histories(folder: Path) -> Histories:
    """Histories that lie in `folder` as one file per column, as memory maps."""
    return Histories(**{name: open_column(folder / f"{name}.npy") for name in ("offsets", *EVENT_TYPES)})


def open_log(folder: Path) -> EventLog:
    """Opens a log that was sorted, merged or written, as memory maps."""
    return EventLog(open_ids(folder / "user_ids.npy"), open_ids(folder / "item_ids.npy"), open_histories(folder))


class ColumnWriter:
    """Writes one-dimensional arrays one after the other into one .npy file."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._length = 0
        self._write_header()
        self._start = self._file.tell()

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._write_header()
                if self._file.tell() != self._start:  # NumPy pads the header for growth; else data would be lost
                    raise RuntimeError(f"{self._file.name}: the header of {self._length} rows does not fit")

    def write(self, values: np.ndarray) -> None:
        """Appends `values`, cast to the column's type."""
        values = np.ascontiguousarray(values, self.dtype)
        self._file.write(values.data)
        self._length += len(values)

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def open_column(path: Path) -> np.ndarray:
    """The column as a read-only memory map: nothing is read before it is used."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def release(*columns: np.ndarray) -> None:
    """Gives back the memory of pages of memory maps that were read; they are read again when they are used again."""
    for column in columns:
        base: object = column
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def event_writers(folder: Path) -> Iterator[Mapping[str, ColumnWriter]]:
    """A writer of each column of events in `folder`."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(ColumnWriter(folder / f"{name}.npy", kind)) for name, kind in EVENT_TYPES.items()
        }


@dataclasses.dataclass(frozen=True)
class Block:
    """Some users' events. `users` [n] (0-based), `lengths` [n], `rows`: where their events are, one user after the
    other."""

    users: np.ndarray
    lengths: np.ndarray
    rows: slice | np.ndarray

    def per_event(self, per_user: np.ndarray) -> np.ndarray:
        """A value of each of the block's users, repeated for each of their events."""
        return np.repeat(per_user, self.lengths)

    def positions(self) -> np.ndarray:
        """0 for a user's first event, 1 for the second, ..."""
        return np.arange(int(self.lengths.sum())) - self.per_event(np.cumsum(self.lengths) - self.lengths)

    def sums(self, where: np.ndarray) -> np.ndarray:
        """[n] int64: how many of each user's events are true."""
        totals = np.concatenate([[0], np.cumsum(where)])
        ends = np.cumsum(self.lengths)
        return totals[ends] - totals[ends - self.lengths]


def blocks(offsets: np.ndarray, users: np.ndarray | None = None) -> Iterator[Block]:
    """All users, or the given ones in their order, in blocks that fit in memory."""
    if users is None:
        for first, stop in user_blocks(offsets):
            rows = slice(int(offsets[first]), int(offsets[stop]))
            yield Block(np.arange(first, stop), np.diff(offsets[first : stop + 1]), rows)
        return
    lengths = offsets[users + 1] - offsets[users]
    for first, stop in user_blocks(np.concatenate([[0], np.cumsum(lengths)])):
        chosen = users[first:stop]
        yield Block(chosen, lengths[first:stop], expand_ranges(offsets[chosen], lengths[first:stop]))


def user_blocks(offsets: np.ndarray, block_events: int = BLOCK_EVENTS) -> Iterator[tuple[int, int]]:
    """Ranges of users (first, stop) that cover all, each with at most `block_events` events, or a single user."""
    first, users = 0, len(offsets) - 1
    while first < users:
        stop = int(np.searchsorted(offsets, offsets[first] + block_events, side="right")) - 1
        stop = min(max(stop, first + 1), users)
        yield first, stop
        first = stop


def expand_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of the ranges starts[i] : starts[i] + lengths[i] (int64), one range after the other.

    Examples:
        >>> expand_ranges(np.array([5, 0, 9]), np.array([2, 3, 0])).tolist()
        [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
