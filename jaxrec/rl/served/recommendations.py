"""Recommendations of a server's log, in columns; one is made into an object when it is asked for.

A user's events are held once, however many recommendations they are history of. So a log takes about as much memory as
its numbers: an object of each recommendation with a history of its own would take many times as much.
"""

import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

NO_REQUEST_TIME = np.iinfo(np.int64).min
# Type codes of `array`: i int32, q int64, f float32, d float64.
EVENTS = ("i", "f", "q")
SCALARS = {
    "user": "i",
    "time": "q",
    "version": "i",
    "temperature": "d",
    "request_time": "q",
    "moment": "i",
    "answered": "i",
    "first": "q",
    "stop": "q",
}
ROWS = {
    "slate": "i",
    "log_propensities": "d",
    "responses": "i",
    "response_ratings": "f",
    "response_weights": "f",
    "excluded": "i",
    "left_out": "q",
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
    the catalogue), `response_ratings` [responses] float32 (raw, NaN = none), `response_weights` [responses] float32
    (what they count, above 0). `answered`: how many items the answer had, of which `slate` may be only those
    that were shown. `moment` counts `ServedLog.moments` from 1 on (0: it was ranked without a trend)."""

    user: int
    time: int
    history: History
    slate: np.ndarray
    log_propensities: np.ndarray
    responses: np.ndarray
    response_ratings: np.ndarray
    response_weights: np.ndarray
    version: int
    temperature: float
    request_time: int | None
    excluded: np.ndarray
    answered: int
    moment: int = 0


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
        values: dict[str, Any] = {name: column[at].item() for name, column in self.scalars.items()}
        values |= {name: column.row(at) for name, column in self.rows.items()}
        first, stop, left_out = (values.pop(name) for name in ("first", "stop", "left_out"))
        history = History(*(np.delete(column[first:stop], left_out) for column in self.events))
        if values["request_time"] == NO_REQUEST_TIME:
            values["request_time"] = None
        return Recommendation(history=history, **values)

    def with_response(self) -> int:
        """How many have a response."""
        return int(np.count_nonzero(np.diff(self.rows["responses"].ends)))


class RecommendationsWriter:
    """Collects `Recommendations`, one user after the other."""

    def __init__(self) -> None:
        self._events = [array(code) for code in EVENTS]
        self._scalars = {name: array(code) for name, code in SCALARS.items()}
        self._rows = {name: (array(code), array("q", [0])) for name, code in ROWS.items()}

    def add_events(self, events: History) -> int:
        """The events of the next user; returns the place of the first."""
        first = len(self._events[0])
        for column, new in zip(self._events, events, strict=True):
            column.frombytes(np.ascontiguousarray(new, column.typecode).tobytes())
        return first

    def add(self, values: Mapping[str, Any]) -> None:
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


def _frozen(column: array) -> np.ndarray:
    """The same memory."""
    return np.asarray(memoryview(column))
