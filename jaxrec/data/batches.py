"""Training and evaluation batches, each of one shape: a step compiles once, and little is padding."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from jaxrec.config import MISSING_RATING
from jaxrec.data.events import Events
from jaxrec.data.histories import Histories, expand_ranges, padded_history
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.shares import TrainingShare, share_of
from jaxrec.data.split import Cases

Item = TypeVar("Item")


OTHERS = -1  # the part of a user whose events another process has
MAX_EARLIER = 1000  # of the items before a window, so many of the most recent ones are excluded from the candidates


class TrainBatch(NamedTuple):
    """Rows that hold several windows back to back: `events` [batch, length]; `starts` [batch, length] bool is True
    where a window begins and the recurrent state must be forgotten; `target` [batch, length] int32 is the next item
    (0 at padding) and `target_gap` [batch, length] float32 the seconds until it; `earlier` [batch, width] int32 the
    items of the row's user before its window, the last one first (0 = no more)."""

    events: Events
    starts: np.ndarray
    target: np.ndarray
    target_gap: np.ndarray
    earlier: np.ndarray


class CaseBatch(NamedTuple):
    """Cases for a scorer.

    Attributes:
        events: [batch, length], the last events before each target.
        request_gap: [batch] float32, seconds from the last event until the target.
        target: [batch] int32.
        exclude: [batch, any] int32, items that are no candidates (0 = none).
        time: [batch] int64, seconds: the request time, which is the target's.
        history: [batch, width] int32, the items of the whole history in order (0 = padding).
        history_time: [batch, width] int64, seconds: the times of the history's events. [batch, 0] where items of the
            history are excluded, since nothing reads it there.
    """

    events: Events
    request_gap: np.ndarray
    target: np.ndarray
    exclude: np.ndarray
    time: np.ndarray
    history: np.ndarray
    history_time: np.ndarray


def training_windows(counts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts the training events of each user into windows.

    A window of n positions spans n + 1 events; neighbours share one event, so that each event but a user's first is
    a target exactly once. The most recent window is full, the oldest holds the rest.

    Args:
        counts: [users] int, the first events of each user that are for training.
        max_length: of a window, in positions.

    Returns:
        User, start (among the user's events) and length of each window, each [windows] int64.

    Examples:
        >>> [column.tolist() for column in training_windows(np.array([6, 1, 3]), max_length=4)]
        [[0, 0, 2], [1, 0, 0], [4, 1, 2]]
    """
    positions = np.maximum(np.asarray(counts, np.int64) - 1, 0)
    of_user = -(-positions // max_length)
    users = np.repeat(np.arange(len(positions)), of_user)
    stops = positions[users] - max_length * expand_ranges(np.zeros_like(of_user), of_user)
    starts = np.maximum(stops - max_length, 0)
    return users, starts, stops - starts


def pack_windows(lengths: np.ndarray, row_length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Fits windows into rows by best fit, longest first, so that little is left empty.

    Equal lengths come in random order, so that neighbours in a row differ from call to call.

    Args:
        lengths: [windows] int, none above `row_length`.
        row_length: positions of a row.
        rng: of the order of equal lengths.

    Returns:
        The row of each window and its offset there, each [windows] int64.

    Examples:
        >>> rows, offsets = pack_windows(np.array([2, 5, 3]), 5, np.random.default_rng(0))
        >>> rows.tolist(), offsets.tolist()
        ([1, 0, 1], [3, 0, 0])
    """
    rows, offsets = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    with_space: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by what is left in them
    row_count = 0
    for window in np.lexsort((rng.random(len(lengths)), -lengths)):
        length = int(lengths[window])
        space = next((s for s in range(length, row_length) if with_space[s]), row_length)
        if space == row_length:
            row, row_count = row_count, row_count + 1
        else:
            row = with_space[space].pop()
        rows[window], offsets[window] = row, row_length - space
        with_space[space - length].append(row)
    return rows, offsets


class TrainingData:
    """The training part of prepared data as batches of one shape: [batch_tokens / max_length, max_length].

    The batches are those of all users, also where this process has a share of them: every process packs the windows of
    all, whose lengths it knows, and fills in the events of its own users. At the events of others it has zeros, so that
    the sum over the processes is the batch (`jaxrec.training.sharding.whole_batch`).
    """

    def __init__(
        self, data: PreparedData | TrainingShare, max_length: int, batch_tokens: int, multiple_of: int = 1
    ) -> None:
        """A batch has about `batch_tokens` positions; its number of rows is a multiple of `multiple_of`."""
        share = data if isinstance(data, TrainingShare) else share_of(data)
        self._parts = share.parts
        self.max_length = max_length
        self.rows_per_batch = max(1, round(batch_tokens / max_length / multiple_of)) * multiple_of
        users, starts, self._lengths = training_windows(share.train_counts, max_length)
        first_rows, part_of_user = np.zeros((2, len(share.train_counts)), np.int64)
        part_of_user[:] = OTHERS
        for number, (part, places) in enumerate(zip(share.parts, share.places, strict=True)):
            first_rows[places], part_of_user[places] = part.histories.offsets[:-1], number
        self._starts, self._part_of = first_rows[users] + starts, part_of_user[users]
        # Only a full window has something before it, so a row has one such window at most, and no other one.
        self._earlier_counts = starts
        self._earlier_width = int(np.clip(starts.max(initial=0), 1, MAX_EARLIER))
        # Every epoch packs into the same number of rows, since that depends on the lengths alone.
        rows, _ = pack_windows(self._lengths, max_length, np.random.default_rng(0))
        self._row_count = int(rows.max(initial=-1)) + 1

    @property
    def target_count(self) -> int:
        """Targets in an epoch."""
        return int(self._lengths.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self._row_count // self.rows_per_batch)

    def padding_share(self) -> float:
        """The share of positions in an epoch's batches that hold no event."""
        return 1.0 - self.target_count / (self.steps_per_epoch * self.rows_per_batch * self.max_length)

    def epoch(self, seed: int, epoch: int, first_step: int = 0) -> Iterator[TrainBatch]:
        """Every window once, in an order that follows from (seed, epoch); the last batch is filled with empty rows.

        With `first_step` the steps before it are left out: an interrupted epoch resumes where it stopped.
        """
        rng = np.random.default_rng((seed, epoch))
        rows, offsets = pack_windows(self._lengths, self.max_length, rng)
        by_row = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[by_row], np.arange(self._row_count + 1))
        order = rng.permutation(self._row_count)
        for step in range(first_step, self.steps_per_epoch):
            chosen = order[step * self.rows_per_batch : (step + 1) * self.rows_per_batch]
            windows = [by_row[bounds[row] : bounds[row + 1]] for row in chosen]
            batch_rows = np.repeat(np.arange(len(chosen)), [len(of_row) for of_row in windows])
            flat = np.concatenate(windows)
            yield self._batch(flat, batch_rows * self.max_length + offsets[flat])

    def _batch(self, windows: np.ndarray, slots: np.ndarray) -> TrainBatch:
        """The batch with each window's events from its slot on; slots count through the rows."""
        shape = (self.rows_per_batch, self.max_length)
        lengths, part_of = self._lengths[windows], self._part_of[windows]
        occupied = expand_ranges(slots, lengths)
        where, starts = np.zeros(shape, bool), np.zeros(shape, bool)
        where.flat[occupied] = starts.flat[slots] = True
        batch = TrainBatch(
            Events(
                item=np.zeros(shape, np.int32),
                rating=np.where(where, 0, MISSING_RATING).astype(np.float32),
                gap=np.where(where, 0, UNKNOWN_GAP).astype(np.float32),
                length=where.sum(axis=1, dtype=np.int32),
            ),
            starts,
            target=np.zeros(shape, np.int32),
            target_gap=np.where(where, 0, UNKNOWN_GAP).astype(np.float32),
            earlier=np.zeros((self.rows_per_batch, self._earlier_width), np.int32),
        )
        for number, part in enumerate(self._parts):
            mine = part_of == number
            self._fill(batch, part, windows[mine], slots[mine])
        return batch

    def _fill(self, batch: TrainBatch, part: PreparedData, windows: np.ndarray, slots: np.ndarray) -> None:
        """Puts the events of windows of one part into the batch."""
        histories, lengths = part.histories, self._lengths[windows]
        rows, into = expand_ranges(self._starts[windows], lengths), expand_ranges(slots, lengths)
        columns = (
            (batch.events.item, histories.items[rows]),
            (batch.events.rating, part.unit_ratings(rows)),
            (batch.events.gap, gaps_at(histories, rows)),
            (batch.target, histories.items[rows + 1]),
            (batch.target_gap, gaps_at(histories, rows + 1)),
        )
        for array, values in columns:
            np.put(np.asarray(array), into, values)
        counts = np.minimum(self._earlier_counts[windows], self._earlier_width)
        of_window = np.repeat(np.arange(len(windows)), counts)
        ago = expand_ranges(np.zeros_like(counts), counts)
        earlier = histories.items[self._starts[windows][of_window] - 1 - ago]
        batch.earlier[slots[of_window] // self.max_length, ago] = earlier


def prefetch(batches: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same batches in the same order, made by a thread up to `depth` ahead of their use."""
    source = iter(batches)
    with ThreadPoolExecutor(1) as maker:
        pending = deque(maker.submit(next, source, None) for _ in range(depth))
        while (batch := pending.popleft().result()) is not None:
            pending.append(maker.submit(next, source, None))
            yield batch


def case_batches(
    data: PreparedData, cases: Cases, max_length: int, size: int = 64, exclude_seen: bool = True
) -> Iterator[CaseBatch]:
    """Evaluation cases in order; the last batch is filled with repeats of its last case.

    The width of `history` is a power of two, from `max_length` on, that holds the longest history of the batch: one
    long history widens its own batch only, and few shapes are compiled.

    Args:
        data: That the cases are of.
        cases: Any number.
        max_length: Of the events that the model reads, the most recent ones.
        size: Cases of a batch.
        exclude_seen: Whether the items of the whole history are no candidates.
    """
    histories = data.histories
    for start in range(0, len(cases), size):
        chosen = np.minimum(np.arange(start, start + size), len(cases) - 1)
        targets, firsts = cases.rows[chosen], histories.offsets[cases.users[chosen]]
        earlier = targets - firsts
        lengths = np.minimum(earlier, max_length).astype(np.int32)
        where = np.arange(max_length) < lengths[:, None]
        rows = np.where(where, (targets - lengths)[:, None] + np.arange(max_length), 0)
        history = padded_history(histories.items, firsts, targets, max_length)
        times = np.zeros((size, 0), np.int64)
        if not exclude_seen:
            times = padded_history(histories.times, firsts, targets, max_length)
        yield CaseBatch(
            _events(data, rows, where, lengths),
            gaps_at(histories, targets),
            histories.items[targets],
            history if exclude_seen else np.zeros((size, 1), np.int32),
            histories.times[targets],
            history,
            times,
        )


def gaps_at(histories: Histories, rows: np.ndarray) -> np.ndarray:
    """`histories.gaps()[rows]`, [...] float32, from these rows alone: gaps of the whole log are not held in memory."""
    is_first = histories.offsets[np.searchsorted(histories.offsets, rows)] == rows
    gaps = histories.times[rows] - histories.times[np.maximum(rows - 1, 0)]
    return np.where(is_first, UNKNOWN_GAP, gaps).astype(np.float32)


def _events(data: PreparedData, rows: np.ndarray, where: np.ndarray, lengths: np.ndarray) -> Events:
    """Padding holds item 0, a missing rating and an unknown gap. A window's first event keeps its true gap."""
    return Events(
        item=np.where(where, data.histories.items[rows], 0).astype(np.int32),
        rating=np.where(where, data.unit_ratings(rows), MISSING_RATING).astype(np.float32),
        gap=np.where(where, gaps_at(data.histories, rows), UNKNOWN_GAP).astype(np.float32),
        length=lengths,
    )
