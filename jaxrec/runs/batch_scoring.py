"""Recommendations for many users at once from an exported model, without a server: a log in, CSV out.

The log is read by the code of `jaxrec prepare`, and answered by the engine of `serve`.
"""

import csv
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrec.config import MEMORY_GB, PrepareConfig, RatingScale, Repeats
from jaxrec.data.histories import EventLog, user_blocks
from jaxrec.data.reading.bad_rows import QUARANTINE_FILE, BadRows, OnBadRows, bad_rows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.read import input_counts, open_workspace, read_log
from jaxrec.errors import DataError
from jaxrec.files import new_file
from jaxrec.runs.requests import Requests, all_users, read_requests
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.graphs import ProviderError
from serve.model.manifest import ArtifactError
from serve.model.recommender import Answer, Query, Recommender
from serve.settings import Provider, SearchBy

OUTPUT_COLUMNS = ("userId", "rank", "movieId", "score")
ANSWERED_AT_ONCE = 64
# Queries of so many batches are sorted by length before they are batched, so that little is padding.
BATCHES_AT_ONCE = 32
EVENTS_AT_ONCE = 500_000  # of these queries in memory; a longer history is a block of its own
FEW_ITEMS = 0.5  # share of a log's items in the catalogue below which the model is perhaps that of another log
# A model without ratings does not look at those of a log: every number will do.
ANY_RATING = RatingScale(-3e38, 3e38)


def open_model(
    directory: Path, provider: Provider = "auto", threads: int = 1, search: SearchBy = "auto"
) -> Recommender:
    """Loads a model directory, as the server does. Raises DataError where it breaks the contract or cannot run."""
    try:
        return Recommender(read_artifact(directory), provider, threads, search)
    except (ArtifactError, ProviderError) as error:
        raise DataError(str(error)) from error


def recommend_log(
    model: Recommender,
    history: Path | Sequence[Path],
    out: Path,
    *,
    requests: Path | None = None,
    k: int = 10,
    options: ReadOptions = ReadOptions(),
    repeats: Repeats = Repeats.AUTO,
    on_bad_rows: OnBadRows = OnBadRows.FAIL,
    memory_gb: float = MEMORY_GB,
) -> dict[str, Any]:
    """Writes the best `k` items of each request, or of each user of the log, as CSV.

    Items of the user's history are not recommended, unless the model was trained to repeat. A user without an event
    that the model knows gets the most popular items, with their number of training events as the score.

    Args:
        model: Answers.
        history: A log, one or several files, in any form that `jaxrec.prepare` reads. Only what it holds up to a
            request's time is used.
        out: Gets OUTPUT_COLUMNS, in the order of the requests, or of the user ids. Written whole or not at all.
        requests: CSV with users and times (`read_requests`); None: every user of the log, at no known time.
        k: Items of an answer, at least 1.
        options: How `history`, and the times of `requests`, are read, where that is not to be recognized.
        repeats: What happens to a row that repeats an earlier one.
        on_bad_rows: Whether bad rows of `history` are an error, or are set aside in `quarantine_file(out)`. A bad row
            of `requests` is an error.
        memory_gb: Gigabytes for the engine that sorts the log, which may be larger.

    Returns:
        What was read: counts and notes (`jaxrec.data.reading.read.input_counts`).

    Raises:
        DataError: For bad rows, naming file and line; the rating scale is the model's.
        OSError: Where `out` cannot be written.
    """
    _refuse_inputs(out, history, requests)
    scale = model.info.rating_scale
    config = PrepareConfig(
        rating_scale=ANY_RATING if scale is None else RatingScale(scale.minimum, scale.maximum), repeats=repeats
    )
    with (
        new_file(out) as new,
        open_workspace(history, options=options, memory_gb=memory_gb, parent=out.parent) as work,
    ):
        with bad_rows(on_bad_rows, work.scratch) as bad:
            loaded, found = read_log(work, options, config, bad, work.scratch / "log")
        asked = all_users(found.log) if requests is None else read_requests(requests, found.log, options)
        with open(new, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(OUTPUT_COLUMNS)
            for user, answer in zip(asked.users, _answers(model, asked, found.log, k), strict=True):
                item_ids = (model.catalog.item_ids[item] for item in answer.items)
                for rank, (item_id, score) in enumerate(zip(item_ids, answer.scores, strict=True), start=1):
                    # Nine digits give a float32 back exactly.
                    writer.writerow((user, rank, item_id, f"{score:.9g}"))
        _keep_quarantine(work.scratch / QUARANTINE_FILE, quarantine_file(out), bad)
    return input_counts(work, loaded, found, bad, _notes(model, found.log))


def _refuse_inputs(out: Path, history: Path | str | Sequence[Path | str], requests: Path | None) -> None:
    """Raises DataError where what is written would replace what is read."""
    read = [history] if isinstance(history, Path | str) else [*history]
    for path in (*read, *([] if requests is None else [requests])):
        for written in (out, quarantine_file(out)):
            if written.resolve().is_relative_to(Path(path).resolve()):
                raise DataError(f"{written} would be written, and {path} is read; choose another --out")


def quarantine_file(out: Path) -> Path:
    """Where rows that were set aside lie: `top.quarantine.csv` beside `top.csv`."""
    return out.with_name(f"{out.stem}.quarantine.csv")


def _notes(model: Recommender, log: EventLog) -> list[str]:
    known = sum(str(item) in model.catalog.index for item in log.items.raw_ids)
    if known >= FEW_ITEMS * len(log.items):
        return []
    share = f"{known} of the log's {len(log.items)} items, such as {log.items.raw_ids[0]}"
    return [f"the model knows {share}, and leaves events on others out; check that it is the model of these items"]


def _answers(model: Recommender, asked: Requests, log: EventLog, k: int) -> Iterator[Answer]:
    """The answers in the order of the requests. Only a block of histories is in memory at a time."""
    item_ids = [str(item) for item in log.items.raw_ids]
    bounds = np.concatenate([[0], np.cumsum(asked.stop - asked.first)])
    with tqdm(total=len(asked.users), unit="request", desc="recommend") as progress:
        for begin, end in user_blocks(bounds, EVENTS_AT_ONCE):
            for start in range(begin, end, ANSWERED_AT_ONCE * BATCHES_AT_ONCE):
                block = range(start, min(start + ANSWERED_AT_ONCE * BATCHES_AT_ONCE, end))
                queries = [_query(asked, at, log, item_ids, k) for at in block]
                answers: dict[int, Answer] = {}
                by_length = sorted(range(len(queries)), key=lambda at: len(queries[at].events))
                for at in range(0, len(queries), ANSWERED_AT_ONCE):
                    batch = by_length[at : at + ANSWERED_AT_ONCE]
                    answers.update(zip(batch, model.recommend([queries[one] for one in batch]), strict=True))
                    progress.update(len(batch))
                yield from (answers[at] for at in range(len(queries)))


def _query(asked: Requests, at: int, log: EventLog, item_ids: Sequence[str], k: int) -> Query:
    rows, events = slice(int(asked.first[at]), int(asked.stop[at])), log.events
    columns = (events.items[rows].tolist(), events.ratings[rows].tolist(), events.times[rows].tolist())
    history = [
        Event(item_ids[item - 1], None if math.isnan(rating) else rating, moment)
        for item, rating, moment in zip(*columns, strict=True)
    ]
    return Query(history, k, request_time=None if asked.times is None else int(asked.times[at]))


def _keep_quarantine(found: Path, kept: Path, bad: BadRows) -> None:
    """Puts the rows of this run beside the result; those of a run before are not there afterwards."""
    if not bad.count:
        kept.unlink(missing_ok=True)
        return
    with new_file(kept) as new:
        shutil.copyfile(found, new)
