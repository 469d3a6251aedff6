"""Reads the CSV files of an offline run, and says file, line and field of what is wrong with them."""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from serve.api.rules import InvalidRequest, check_id, check_rating, check_time
from serve.model.artifact import RatingScale
from serve.model.events import Event

HISTORY_COLUMNS = ("userId", "movieId", "rating", "timestamp")
REQUEST_COLUMNS = ("userId", "timestamp")


class TableError(ValueError):
    """A CSV file breaks a rule; the message starts with the file and the line."""


class Request(NamedTuple):
    """For whom to recommend; `timestamp` in seconds, None = not known."""

    user_id: str
    timestamp: int | None


def read_history(path: Path, scale: RatingScale | None) -> Mapping[str, Sequence[Event]]:
    """Events by user id, users and events in the order of the file; raises TableError and OSError."""
    events: dict[str, list[Event]] = defaultdict(list)
    for line, (user_id, item_id, rating_text, timestamp_text) in _rows(path, HISTORY_COLUMNS):
        try:
            check_id("userId", user_id)
            check_id("movieId", item_id)
            rating = None
            if rating_text:
                rating = _number("rating", rating_text)
                check_rating("rating", rating, scale)
            events[user_id].append(Event(sys.intern(item_id), rating, _time(timestamp_text)))
        except InvalidRequest as error:
            raise TableError(f"{path}:{line}: {error}") from error
    return events


def read_requests(path: Path) -> list[Request]:
    """The requests in the order of the file; raises TableError and OSError."""
    requests = []
    for line, (user_id, timestamp_text) in _rows(path, REQUEST_COLUMNS):
        try:
            check_id("userId", user_id)
            requests.append(Request(user_id, _time(timestamp_text)))
        except InvalidRequest as error:
            raise TableError(f"{path}:{line}: {error}") from error
    return requests


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the given columns of each row; other columns and empty lines are skipped."""
    with path.open("rb") as file:
        reader = csv.reader(_decoded_lines(path, file), strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise TableError(f"{path}:1: expected the columns {','.join(columns)}, came an empty file")
            missing = [column for column in columns if column not in header]
            if missing:
                raise TableError(
                    f"{path}:1: expected the columns {','.join(columns)}, came {','.join(header)}"
                    f" (missing: {','.join(missing)})"
                )
            places = [header.index(column) for column in columns]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise TableError(f"{path}:{reader.line_num}: expected {len(header)} fields, came {len(row)}")
                yield reader.line_num, [row[place] for place in places]
        except csv.Error as error:
            raise TableError(f"{path}:{reader.line_num}: expected CSV: {error}") from error


def _decoded_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Line by line: a decoder of the whole file reads ahead and cannot tell where it failed."""
    for line, encoded in enumerate(file, start=1):
        try:
            yield encoded.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TableError(f"{path}:{line}: expected UTF-8: {error}") from error


def _number(field: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRequest(field, "a number", repr(text)) from error


def _time(text: str) -> int:
    if not (text.isascii() and text.removeprefix("-").isdecimal()):
        raise InvalidRequest("timestamp", "a whole number of seconds", repr(text))
    timestamp = int(text)
    check_time("timestamp", timestamp)
    return timestamp
