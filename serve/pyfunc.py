"""A model directory as a model of MLflow: what `mlflow.pyfunc.load_model` calls for one by `jaxrec export --mlflow`.

Needs `jaxrec[mlflow,serve-cpu]`, `index` for a model that has one, and neither JAX nor the package `jaxrec` beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from serve.api.errors import InvalidRequest
from serve.api.rules import (
    DEFAULT_K,
    MAX_HISTORY_EVENTS,
    check_event_time,
    check_id,
    check_length,
    check_rating,
    checked_count,
    latest_time,
)
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender

COLUMNS = ("user_id", "rank", "item_id", "title", "score")
ANSWERED_AT_ONCE = 64


class PyfuncModel:
    """Answers histories as the server answers them when they are sent along."""

    def __init__(self, model: Recommender) -> None:
        self._model = model

    def predict(self, events: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The best items for each user.

        Args:
            events: One row per event: user_id, item_id, timestamp (seconds) and, if known, rating (NaN: none). The rows
                of a user are put in the order of their timestamps.
            params: `k`, the number of items, 10 if it is not there.

        Returns:
            COLUMNS, one row per recommended item; users in the order of their first rows, rank from 1.

        Raises:
            InvalidRequest: A row or `k` breaks a rule of the server; the message names it, such as `events[3].rating`
                for the fourth row.
        """
        k = checked_count("k", int((params or {}).get("k", DEFAULT_K)))
        ratings = events["rating"] if "rating" in events else [None] * len(events)
        latest, histories = latest_time(), dict[str, list[Event]]()
        rows = zip(events["user_id"], events["item_id"], ratings, events["timestamp"], strict=True)
        for at, (user, item, rating, timestamp) in enumerate(rows):
            try:
                _check_text("user_id", user)
                histories.setdefault(user, []).append(self._event(item, rating, timestamp, latest))
            except InvalidRequest as error:
                raise error.within(f"events[{at}]") from error
        for user, history in histories.items():
            check_length(f"the events of the user {user!r}", history, MAX_HISTORY_EVENTS)
        queries = [Query(history, k) for history in histories.values()]
        catalog, batches = self._model.catalog, range(0, len(queries), ANSWERED_AT_ONCE)
        found = [one for at in batches for one in self._model.recommend(queries[at : at + ANSWERED_AT_ONCE])]
        answers = [
            (user, rank, catalog.item_ids[item], catalog.titles[item], float(score))
            for user, answer in zip(histories, found, strict=True)
            for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1)
        ]
        return pd.DataFrame(answers, columns=list(COLUMNS))

    def _event(self, item: Any, rating: Any, timestamp: Any, latest: int) -> Event:
        _check_text("item_id", item)
        known = None if pd.isna(rating) else float(rating)
        if known is not None:
            check_rating("rating", known, self._model.info.rating_scale)
        check_event_time("timestamp", 0 if pd.isna(timestamp) else int(timestamp), latest)
        return Event(item, known, int(timestamp))


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        missing = pd.api.types.is_scalar(value) and pd.isna(value)
        raise InvalidRequest(field, "a string", "none" if missing else repr(value))
    check_id(field, value)


def _load_pyfunc(path: str) -> PyfuncModel:
    """Loads a model directory; MLflow looks for this name. Raises ArtifactError where it breaks the contract."""
    return PyfuncModel(Recommender(read_artifact(Path(path))))
