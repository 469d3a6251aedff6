"""Training windows and evaluation batches in a few fixed shapes, so that each compiles once and padding stays small."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxrec.histories import Histories
from jaxrec.models.features import Events
from jaxrec.prepare import PreparedData
from jaxrec.schema import MISSING_RATING, UNKNOWN_GAP
from jaxrec.split import Cases


class TrainBatch(NamedTuple):
    """`events` [batch, length]; `target` [batch, length] int32 is the next item (0 where there is none) and
    `target_gap` [batch, length] float32 the seconds until it."""

    events: Events
    target: np.ndarray
    target_gap: np.ndarray


class CaseBatch(NamedTuple):
    """`events` [batch, length] before each target, `request_gap` [batch] float32 seconds until it, `target` [batch]
    int32, `exclude` [batch, width] int32: all items of the history (0 = padding), `time` [batch] int64: when."""

    events: Events
    request_gap: np.ndarray
    target: np.ndarray
    exclude: np.ndarray
    time: np.ndarray


def shape_lengths(max_length: int) -> tuple[int, ...]:
    """The lengths that windows are padded to."""
    lengths = sorted({max(1, max_length // 4), max(1, max_length // 2), max_length})
    return tuple(lengths)


def training_windows(counts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts users' first `counts` events into windows: (user, start, length), each [windows] int64.

    A window of n positions spans n + 1 events; neighbours share one event, so that each event but a user's first is
    a target exactly once. The most recent window is full, the oldest holds the rest.
    """
    windows = [
        (user, max(0, stop - max_length), min(stop, max_length))
        for user, count in enumerate(counts)
        for stop in range(int(count) - 1, 0, -max_length)
    ]
    columns = np.asarray(windows, np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


class TrainingData:
    """The training part of prepared data, cut into windows of at most `max_length` positions."""

    def __init__(self, data: PreparedData, max_length: int) -> None:
        self._histories = data.histories
        self._ratings = data.unit_ratings()
        self._gaps = data.histories.gaps()
        self.max_length = max_length
        users, starts, self.lengths = training_windows(data.split.train_counts, max_length)
        self._starts = data.histories.offsets[users] + starts

    @property
    def window_count(self) -> int:
        return len(self.lengths)

    @property
    def target_count(self) -> int:
        return int(self.lengths.sum())

    def steps_per_epoch(self, batch_tokens: int, multiple_of: int = 1) -> int:
        """How many batches `epoch` yields."""
        return len(self._batches(batch_tokens, multiple_of, np.random.default_rng(0)))

    def padding_share(self, batch_tokens: int) -> float:
        """The share of positions in an epoch's batches that hold no event."""
        batches = self._batches(batch_tokens, 1, np.random.default_rng(0))
        slots = sum(length * _batch_size(length, batch_tokens, 1) for length, _ in batches)
        return 1.0 - self.target_count / slots

    def epoch(self, seed: int, epoch: int, batch_tokens: int, multiple_of: int = 1) -> Iterator[TrainBatch]:
        """Every window once, in an order that follows from (seed, epoch). Batch sizes are a multiple of `multiple_of`;
        the last batch of a length is filled with empty rows."""
        for length, windows in self._batches(batch_tokens, multiple_of, np.random.default_rng((seed, epoch))):
            yield self._batch(windows, length, _batch_size(length, batch_tokens, multiple_of))

    def _batches(self, batch_tokens: int, multiple_of: int, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        batches = []
        shortest = 0
        for length in shape_lengths(self.max_length):
            chosen = np.flatnonzero((self.lengths > shortest) & (self.lengths <= length))
            shortest = length
            size = _batch_size(length, batch_tokens, multiple_of)
            shuffled = rng.permutation(chosen)
            batches += [(length, shuffled[i : i + size]) for i in range(0, len(shuffled), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _batch(self, windows: np.ndarray, length: int, size: int) -> TrainBatch:
        starts = np.zeros(size, np.int64)
        lengths = np.zeros(size, np.int32)
        starts[: len(windows)] = self._starts[windows]
        lengths[: len(windows)] = self.lengths[windows]
        where = np.arange(length) < lengths[:, None]
        rows = np.where(where, starts[:, None] + np.arange(length), 0)
        events = _events(self._histories, self._ratings, self._gaps, rows, where, lengths)
        following = np.minimum(rows + 1, self._histories.event_count - 1)
        target = np.where(where, self._histories.items[following], 0).astype(np.int32)
        return TrainBatch(events, target, np.where(where, self._gaps[following], UNKNOWN_GAP).astype(np.float32))


def case_batches(data: PreparedData, cases: Cases, max_length: int, size: int = 64) -> Iterator[CaseBatch]:
    """Evaluation cases in order; the last batch is filled with repeats of its last case.

    The model reads the last `max_length` events; the whole history is excluded from the answer.
    """
    histories, ratings, gaps = data.histories, data.unit_ratings(), data.histories.gaps()
    first_rows = histories.offsets[cases.users]
    width = int((cases.rows - first_rows).max(initial=1))
    for start in range(0, len(cases), size):
        chosen = np.minimum(np.arange(start, start + size), len(cases) - 1)
        targets, firsts = cases.rows[chosen], first_rows[chosen]
        lengths = np.minimum(targets - firsts, max_length).astype(np.int32)
        where = np.arange(max_length) < lengths[:, None]
        rows = np.where(where, (targets - lengths)[:, None] + np.arange(max_length), 0)
        excluded = firsts[:, None] + np.arange(width)
        inside = excluded < targets[:, None]
        exclude = np.where(inside, histories.items[np.where(inside, excluded, 0)], 0)
        yield CaseBatch(
            _events(histories, ratings, gaps, rows, where, lengths),
            gaps[targets],
            histories.items[targets],
            exclude.astype(np.int32),
            histories.times[targets],
        )


def _batch_size(length: int, batch_tokens: int, multiple_of: int) -> int:
    return max(1, round(batch_tokens / length / multiple_of)) * multiple_of


def _events(
    histories: Histories,
    ratings: np.ndarray,
    gaps: np.ndarray,
    rows: np.ndarray,
    where: np.ndarray,
    lengths: np.ndarray,
) -> Events:
    """Padding holds item 0, a missing rating and an unknown gap. A window's first event keeps its true gap."""
    return Events(
        item=np.where(where, histories.items[rows], 0).astype(np.int32),
        rating=np.where(where, ratings[rows], MISSING_RATING).astype(np.float32),
        gap=np.where(where, gaps[rows], UNKNOWN_GAP).astype(np.float32),
        length=lengths,
    )
