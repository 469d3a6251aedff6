"""A model directory as a model of MLflow: what `mlflow.pyfunc.load_model` calls for one by `jaxrec export --mlflow`.

Needs `jaxrec[mlflow,serve-cpu]`, and neither JAX nor the package `jaxrec` beside it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender

COLUMNS = ("user_id", "rank", "item_id", "title", "score")
K = 10
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
            ValueError: `k` is not positive.
        """
        k = int((params or {}).get("k", K))
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        users, queries = [], []
        for user, rows in events.groupby("user_id", sort=False):
            ratings = rows["rating"] if "rating" in rows else [math.nan] * len(rows)
            history = [
                Event(str(item), None if pd.isna(rating) else float(rating), int(timestamp))
                for item, rating, timestamp in zip(rows["item_id"], ratings, rows["timestamp"], strict=True)
            ]
            users.append(user)
            queries.append(Query(history, k))
        catalog, batches = self._model.catalog, range(0, len(queries), ANSWERED_AT_ONCE)
        found = [one for at in batches for one in self._model.recommend(queries[at : at + ANSWERED_AT_ONCE])]
        answers = [
            (user, rank, catalog.item_ids[item], catalog.titles[item], float(score))
            for user, answer in zip(users, found, strict=True)
            for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1)
        ]
        return pd.DataFrame(answers, columns=list(COLUMNS))


def _load_pyfunc(path: str) -> PyfuncModel:
    """Loads a model directory; MLflow looks for this name. Raises ArtifactError where it breaks the contract."""
    return PyfuncModel(Recommender(read_artifact(Path(path))))
