"""`python -m serve recommend`: answers for many users at once, from CSV to CSV, without a server."""

import csv
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import click
from tqdm import tqdm

from serve.api.errors import InvalidRequest
from serve.api.rules import check_id, check_rating, check_time
from serve.cli.options import FILE, setting_option
from serve.model.directory import read_artifact
from serve.model.events import Event, RatingScale
from serve.model.graphs import ProviderError
from serve.model.manifest import ArtifactError
from serve.model.recommender import Answer, Query, Recommender
from serve.settings import Provider, SearchBy

HISTORY_COLUMNS = ("userId", "movieId", "rating", "timestamp")
REQUEST_COLUMNS = ("userId", "timestamp")
OUTPUT_COLUMNS = ("userId", "rank", "movieId", "score")
USERS_AT_ONCE = 64
# Requests of so many batches are sorted by length before they are batched, so that little is padding.
BATCHES_AT_ONCE = 32


class TableError(ValueError):
    """A CSV file breaks a rule; the message starts with the file and the line."""


class Request(NamedTuple):
    """For whom to recommend; `timestamp` in seconds, None = not known."""

    user_id: str
    timestamp: int | None


@click.command("recommend")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
@click.option(
    "--history",
    type=click.Path(path_type=Path),
    required=True,
    metavar="CSV",
    help="Past events with the columns userId,movieId,rating,timestamp, as in MovieLens ratings.csv. An empty"
    " rating is no rating.",
)
@click.option(
    "--requests",
    type=click.Path(path_type=Path),
    metavar="CSV",
    help="Users to recommend for and when, with the columns userId,timestamp; only events up to the timestamp"
    " (seconds since 1970) are used.  [default: every user of the history, at no known time]",
)
@click.option("--k", type=click.IntRange(1), default=10, show_default=True, help="Items for each request.")
@click.option(
    "--out",
    type=FILE,
    required=True,
    metavar="CSV",
    help="Where to write userId,rank,movieId,score, in the order of the requests. Replaced as a whole or not at all.",
)
@setting_option("provider")
@setting_option("threads")
@setting_option("search")
def command(
    model: Path,
    history: Path,
    requests: Path | None,
    k: int,
    out: Path,
    provider: Provider | None,
    threads: int | None,
    search: SearchBy | None,
) -> None:
    """Recommend for many users at once with the model directory MODEL, without a server.

    Items of the user's history are not recommended. A user without history gets the most popular items, with
    their number of training events as the score.
    """
    try:
        recommender = Recommender(read_artifact(model), provider or "auto", threads or 1, search or "auto")
        recommend_file(recommender, history, requests, k, out)
    except (ArtifactError, ProviderError, TableError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


def recommend_file(model: Recommender, history: Path, requests: Path | None, k: int, out: Path) -> None:
    """Writes the best k items for each request, or for each user of the history, to `out`.

    `out` is replaced when all is written, and untouched when anything fails. Raises TableError, OSError.
    """
    events = read_history(history, model.info.rating_scale)
    asked = [Request(user_id, None) for user_id in events] if requests is None else read_requests(requests)
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(OUTPUT_COLUMNS)
            for request, answer in zip(asked, _answers(model, asked, events, k), strict=True):
                item_ids = (model.catalog.item_ids[item] for item in answer.items)
                for rank, (item_id, score) in enumerate(zip(item_ids, answer.scores, strict=True), start=1):
                    # Nine digits give a float32 back exactly.
                    writer.writerow((request.user_id, rank, item_id, f"{score:.9g}"))
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; the result has the rights of any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, out)
    except BaseException:
        Path(name).unlink()
        raise


def _answers(
    model: Recommender, asked: Sequence[Request], events: Mapping[str, Sequence[Event]], k: int
) -> Iterator[Answer]:
    with tqdm(total=len(asked), unit="request", desc="recommend") as progress:
        for start in range(0, len(asked), USERS_AT_ONCE * BATCHES_AT_ONCE):
            queries = [
                _query(request, events.get(request.user_id, ()), k)
                for request in asked[start : start + USERS_AT_ONCE * BATCHES_AT_ONCE]
            ]
            answers: dict[int, Answer] = {}
            by_length = sorted(range(len(queries)), key=lambda at: len(queries[at].events))
            for first in range(0, len(queries), USERS_AT_ONCE):
                batch = by_length[first : first + USERS_AT_ONCE]
                answers.update(zip(batch, model.recommend([queries[at] for at in batch]), strict=True))
                progress.update(len(batch))
            yield from (answers[at] for at in range(len(queries)))


def _query(request: Request, events: Sequence[Event], k: int) -> Query:
    if request.timestamp is not None:
        events = [event for event in events if event.timestamp <= request.timestamp]
    return Query(events, k, request_time=request.timestamp)


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
