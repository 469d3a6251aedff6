"""Recommendations of a server's log, in columns; one is made into an object when it is asked for.

A user's events are held once, however many recommendations they are history of. So a log takes about as much memory as
its numbers: an object of each recommendation with a history of its own would take many times as much.
"""

import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np

NO_REQUEST_TIME = np.iinfo(np.int64).min
SCALARS = {
    **{"user": np.int32, "time": np.int64, "version": np.int32, "temperature": np.float64},
    **{"request_time": np.int64, "first": np.int64, "stop": np.int64},
}
ROWS = {
    **{"slate": np.int32, "log_propensities": np.float64, "responses": np.int32, "response_ratings": np.float32},
    **{"excluded": np.int32, "left_out": np.int64},
}


class History(NamedTuple):
    """Events in order: `items` int32, `ratings` float32 (raw, NaN = none), `times` int64, each [events]."""

    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray


class Recommendation(NamedTuple):
    """A slate as it was shown: `slate` [k] int32, best first, `log_propensities` [k] float64, each given the items
    above it, at the exploration's `temperature`, by the model `version` (of `ServedLog.versions`). `time`: seconds;
    `request_time`: as the request gave it, None where it did not. `excluded` [excluded] int32: items that the request
    excluded. `responses` [responses] int32 are the items of the events that respond to it, in their order (0: not in
    the catalogue), `response_ratings` [responses] float32 (raw, NaN = none)."""

    user: int
    time: int
    history: History
    slate: np.ndarray
    log_propensities: np.ndarray
    responses: np.ndarray
    response_ratings: np.ndarray
    version: int
    temperature: float
    request_time: int | None
    excluded: np.ndarray


class Rows(NamedTuple):
    """Rows of different lengths: `values` [all] one after the other, of which row i ends before `ends`[i + 1], where
    the next one starts; `ends` [rows + 1] int64."""

    values: np.ndarray
    ends: np.ndarray

    def row(self, number: int) -> np.ndarray:
        """The values of one row."""
        return self.values[self.ends[number] : self.ends[number + 1]]


@dataclasses.dataclass(frozen=True, eq=False)
class Recommendations(Sequence[Recommendation]):
    """A sequence of `Recommendation`.

    `events` of all users, one user's after the other's; `scalars` [recommendations] and `rows`, by name. The history of
    a recommendation is the events `first` to `stop` but those `left_out`, which count from `first`.
    """

    events: History
    scalars: Mapping[str, np.ndarray]
    rows: Mapping[str, Rows]

    def __len__(self) -> int:
        return len(self.scalars["user"])

    @overload
    def __getitem__(self, at: int) -> Recommendation: ...
    @overload
    def __getitem__(self, at: slice) -> list[Recommendation]: ...
    def __getitem__(self, at: int | slice) -> Recommendation | list[Recommendation]:
        if isinstance(at, slice):
            return [self[number] for number in range(len(self))[at]]
        at = range(len(self))[at]
        scalars = {name: column[at].item() for name, column in self.scalars.items()}
        rows = {name: column.row(at) for name, column in self.rows.items()}
        first, stop, left_out = scalars.pop("first"), scalars.pop("stop"), rows.pop("left_out")
        history = History(*(np.delete(column[first:stop], left_out) for column in self.events))
        if scalars["request_time"] == NO_REQUEST_TIME:
            scalars["request_time"] = None
        return Recommendation(history=history, **scalars, **rows)

    def with_response(self) -> int:
        """How many have a response."""
        return int(np.count_nonzero(np.diff(self.rows["responses"].ends)))


class RecommendationsWriter:
    """Collects `Recommendations`, one user after the other."""

    def __init__(self) -> None:
        self._events = [_empty(dtype) for dtype in (np.int32, np.float32, np.int64)]
        self._scalars = {name: _empty(dtype) for name, dtype in SCALARS.items()}
        self._rows = {name: (_empty(dtype), array("q", [0])) for name, dtype in ROWS.items()}

    def add_events(self, events: History) -> int:
        """The events of the next user; returns the place of the first."""
        first = len(self._events[0])
        for column, new in zip(self._events, events, strict=True):
            column.frombytes(np.ascontiguousarray(new, column.typecode).tobytes())
        return first

    def add(self, values: Mapping[str, int | float | np.ndarray]) -> None:
        """A recommendation: a value for each of SCALARS and of ROWS."""
        for name, column in self._scalars.items():
            column.append(values[name])
        for name, (of_rows, ends) in self._rows.items():
            of_rows.frombytes(np.ascontiguousarray(values[name], of_rows.typecode).tobytes())
            ends.append(len(of_rows))

    def finish(self) -> Recommendations:
        """What was added; nothing can be added from now on."""
        return Recommendations(
            History(*(_frozen(column) for column in self._events)),
            {name: _frozen(column) for name, column in self._scalars.items()},
            {name: Rows(_frozen(values), _frozen(ends)) for name, (values, ends) in self._rows.items()},
        )


def _empty(dtype: type[np.generic]) -> array:
    """An array that grows, by a share of its length at a time."""
    return array({np.int32: "i", np.int64: "q", np.float32: "f", np.float64: "d"}[dtype])


def _frozen(column: array) -> np.ndarray:
    """The same memory."""
    return np.asarray(memoryview(column))
