"""Recommendations for a log of any form by the processes of one machine, as CSV."""

import contextlib
import csv
import functools
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxrec.config import MEMORY_GB, PrepareConfig, Repeats
from jaxrec.data.histories import EventLog, open_log
from jaxrec.data.ids import IdMap, open_ids, write_ids
from jaxrec.data.reading.bad_rows import QUARANTINE_FILE, OnBadRows, bad_rows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.read import input_counts, open_workspace, read_log
from jaxrec.errors import DataError
from jaxrec.files import new_file, sync
from jaxrec.runs.batch.job import Job, open_job, states
from jaxrec.runs.batch.requests import Requests, all_users, read_requests
from jaxrec.runs.batch.scoring import (
    OUTPUT_COLUMNS,
    ModelSource,
    Scoring,
    answers,
    forget_opened,
    notes,
    opened,
    parts_of,
    rating_scale,
    text_ids,
)
from serve.model.recommender import Recommender


class Part(NamedTuple):
    """Requests first:stop, to be answered into a file."""

    first: int
    stop: int
    file: Path


def recommend_log(
    source: ModelSource,
    history: Path | Sequence[Path],
    out: Path,
    *,
    requests: Path | None = None,
    k: int = 10,
    options: ReadOptions = ReadOptions(),
    repeats: Repeats = Repeats.AUTO,
    on_bad_rows: OnBadRows = OnBadRows.FAIL,
    memory_gb: float = MEMORY_GB,
    workers: int = 1,
) -> dict[str, Any]:
    """Writes the best `k` items of each request, or of each user of the log, as CSV.

    Items of the user's history are not recommended, unless the model was trained to repeat. A user without an event
    that the model knows gets the most popular items, by training events and, where the model has them, recent counts.

    A call that was interrupted, by whatever, is continued by the same call: neither the log nor a finished part is read
    or answered again. `memory_gb`, `workers` and the threads of `source` may differ.

    Args:
        source: What answers.
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
        workers: Processes that answer; the result does not depend on it. Each has the model, and a part in memory.

    Returns:
        What was read: counts and notes (`jaxrec.data.reading.read.input_counts`).

    Raises:
        DataError: For bad rows, naming file and line; the rating scale is the model's. Where a worker died.
        OSError: Where `out` cannot be written.
    """
    _refuse_inputs(out, history, requests)
    paths = [Path(history)] if isinstance(history, Path | str) else [Path(path) for path in history]
    version = source.version()
    settings = {
        "model": version,
        "engine": [source.provider, source.search],
        "history": states(paths),
        "requests": None if requests is None else states([requests]),
        "k": k,
        "reading": [repr(options), repeats, on_bad_rows],
    }
    with _caches_of_one_call(), open_job(out, settings) as job:
        scoring = Scoring(source, version, job.moment, k)
        try:
            model = opened(scoring)
            counts = job.counts() or _read(job, model, paths, requests, options, repeats, on_bad_rows, memory_gb)
        except DataError:
            if job.counts() is None:
                job.remove()
            raise
        del model
        _answer(scoring, job, workers)
        _join(job, out)
        _keep_quarantine(job.input / QUARANTINE_FILE, quarantine_file(out))
        job.remove()
    return counts


@contextlib.contextmanager
def _caches_of_one_call() -> Iterator[None]:
    """Frees the model and the log at the end, however the call ends."""
    try:
        yield
    finally:
        _open_input.cache_clear()
        forget_opened()


def quarantine_file(out: Path) -> Path:
    """Where rows that were set aside lie: `top.quarantine.csv` beside `top.csv`."""
    return out.with_name(f"{out.stem}.quarantine.csv")


def _refuse_inputs(out: Path, history: Path | str | Sequence[Path | str], requests: Path | None) -> None:
    """Raises DataError where what is written would replace what is read, or a folder."""
    if out.is_dir():
        raise DataError(f"{out} is a folder; expected the name of a CSV file")
    read = [history] if isinstance(history, Path | str) else [*history]
    for path in (*read, *([] if requests is None else [requests])):
        for written in (out, quarantine_file(out)):
            if written.resolve().is_relative_to(Path(path).resolve()):
                raise DataError(f"{written} would be written, and {path} is read; choose another --out")


def _read(
    job: Job,
    model: Recommender,
    history: Sequence[Path],
    requests: Path | None,
    options: ReadOptions,
    repeats: Repeats,
    on_bad_rows: OnBadRows,
    memory_gb: float,
) -> dict[str, Any]:
    """Sorts the log into the job's input, with the requests; returns what was read."""
    folder = job.new_input()
    config = PrepareConfig(rating_scale=rating_scale(model), repeats=repeats)
    with open_workspace(history, options=options, memory_gb=memory_gb, parent=folder) as work:
        with bad_rows(on_bad_rows, folder) as bad:
            loaded, found = read_log(work, options, config, bad, folder / "log")
        if requests is not None:
            _write_requests(read_requests(requests, found.log, options), folder / "requests")
        counts = input_counts(work, loaded, found, bad, notes(model, found.log.items.raw_ids))
    job.finish_input(counts)
    return counts


def _write_requests(asked: Requests, folder: Path) -> None:
    folder.mkdir()
    write_ids(IdMap(asked.users, distinct=True), folder / "users.npy")  # in their order; none is looked up
    assert asked.times is not None
    np.save(folder / "rows.npy", np.stack([asked.first, asked.stop, asked.times]), allow_pickle=False)


@functools.lru_cache(maxsize=1)
def _open_input(folder: Path) -> tuple[EventLog, list[str], Requests]:
    """The log, `text_ids` of its items, and the requests."""
    log = open_log(folder / "log")
    asked = all_users(log)
    if (folder / "requests").is_dir():
        asked = Requests(open_ids(folder / "requests/users.npy").raw_ids, *np.load(folder / "requests/rows.npy"))
    return log, text_ids(log), asked


def _answer(scoring: Scoring, job: Job, workers: int) -> None:
    """Answers the parts that are not finished."""
    _, _, asked = _open_input(job.input)
    parts = [Part(first, stop, job.parts / f"{first:012d}.csv") for first, stop in parts_of(asked)]
    todo = [part for part in parts if not part.file.is_file()]
    left = sum(part.stop - part.first for part in todo)
    with tqdm(total=len(asked.users), initial=len(asked.users) - left, unit="request", desc="recommend") as progress:
        for count in _by_workers(scoring, job.input, todo, workers):
            progress.update(count)


def _by_workers(scoring: Scoring, folder: Path, todo: Sequence[Part], workers: int) -> Iterator[int]:
    """How many requests each finished part has, as they come."""
    if workers == 1:
        for part in todo:
            yield _answer_part(scoring, folder, part)
        return
    forget_opened()  # the workers have models of their own
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
            futures = [pool.submit(_answer_part, scoring, folder, part) for part in todo]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was ended from outside, perhaps for want of memory; the same command continues"
        ) from error


def _end_with_parent() -> None:
    """A worker outlives neither a kill of its parent, nor does it end by an interrupt before its part is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _answer_part(scoring: Scoring, folder: Path, part: Part) -> int:
    """Writes the part's answers, and returns how many there are."""
    model, (log, item_ids, asked) = opened(scoring), _open_input(folder)
    found = answers(model, asked, part.first, part.stop, log, item_ids, scoring.k)
    with new_file(part.file) as new, open(new, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for user, answer in zip(asked.users[part.first : part.stop], found, strict=True):
            names = (model.catalog.item_ids[item] for item in answer.items)
            for rank, (name, score) in enumerate(zip(names, answer.scores, strict=True), start=1):
                # Nine digits give a float32 back exactly.
                writer.writerow((user, rank, name, f"{score:.9g}"))
    return len(found)


def _join(job: Job, out: Path) -> None:
    """Makes the result of the parts. A kill leaves nothing of it outside the job."""
    with open(job.joined, "wb") as file:
        file.write((",".join(OUTPUT_COLUMNS) + "\n").encode())
        for part in sorted(job.parts.glob("*.csv")):
            with open(part, "rb") as one:
                shutil.copyfileobj(one, file)
    sync(job.joined)
    job.joined.replace(out)
    sync(out.parent)


def _keep_quarantine(found: Path, kept: Path) -> None:
    """Puts the rows of this run beside the result; those of a run before are not there afterwards."""
    if not found.is_file():
        kept.unlink(missing_ok=True)
        return
    with new_file(kept) as new:
        shutil.copyfile(found, new)
