"""Recommends for many users at once, from CSV to CSV."""

import csv
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from serve.cli.tables import Request, read_history, read_requests
from serve.model.events import Event
from serve.model.recommender import Answer, Query, Recommender

OUTPUT_COLUMNS = ("userId", "rank", "movieId", "score")
BATCH = 64
# Requests of so many batches are sorted by length before they are batched, so that little is padding.
BATCHES_AT_ONCE = 32


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
        for start in range(0, len(asked), BATCH * BATCHES_AT_ONCE):
            queries = [
                _query(request, events.get(request.user_id, ()), k)
                for request in asked[start : start + BATCH * BATCHES_AT_ONCE]
            ]
            answers: dict[int, Answer] = {}
            by_length = sorted(range(len(queries)), key=lambda at: len(queries[at].events))
            for first in range(0, len(queries), BATCH):
                batch = by_length[first : first + BATCH]
                answers.update(zip(batch, model.recommend([queries[at] for at in batch]), strict=True))
                progress.update(len(batch))
            yield from (answers[at] for at in range(len(queries)))


def _query(request: Request, events: Sequence[Event], k: int) -> Query:
    if request.timestamp is not None:
        events = [event for event in events if event.timestamp <= request.timestamp]
    return Query(events, k, request_time=request.timestamp)
