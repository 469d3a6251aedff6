"""Makes a loaded model of a model directory: verified, and asked once so that its first user does not wait."""

import logging
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from serve.model.artifact import ArtifactError, read_artifact
from serve.model.engine import Provider, Ranking, SearchBy, Step
from serve.model.events import KnownEvent, features
from serve.model.exploration import Exploration
from serve.model.profile import SECONDS_PER_DAY
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.serving.loaded import LoadedModel
from serve.serving.versions import WATCH_S, ModelLibrary
from serve.stores.base import EventStore, StoreError

logger = logging.getLogger(__name__)

K = 10
# States to forget in one transaction, and the pause after it.
DROPPED_AT_ONCE = 1000
PAUSE_S = 0.05
# Of the largest score; parity of the graphs is held much closer when they are exported.
TOLERANCE = 1e-3


def load_model(
    directory: Path,
    store: EventStore,
    metrics: Metrics,
    *,
    provider: Provider = "auto",
    threads: int = 1,
    search_by: SearchBy = "auto",
    exploration: Exploration | None = None,
) -> LoadedModel:
    """Raises ArtifactError for a directory that cannot be served, and ProviderError."""
    model = Recommender(read_artifact(directory), provider, threads, search_by)
    warm_up(model)
    return LoadedModel(model, store, metrics, exploration)


def open_models(
    directory: Path,
    store: EventStore,
    metrics: Metrics,
    *,
    provider: Provider = "auto",
    threads: int = 1,
    search_by: SearchBy = "auto",
    exploration: Exploration | None = None,
    watch_s: float = WATCH_S,
    load_now: bool = True,
) -> ModelLibrary:
    """The versions of a directory, with their attempts and what serves in the metrics; raises as `ModelLibrary`."""
    sweeper = StateSweeper(store)

    def tell(models: Sequence[LoadedModel]) -> None:
        infos = [loaded.model.info for loaded in models]
        sweeper.keep([info.model_version for info in infos])
        metrics.serving([(info.model_version, info.policy, _seconds(info.created), info.item_count) for info in infos])

    return ModelLibrary(
        directory,
        lambda path: load_model(
            path, store, metrics, provider=provider, threads=threads, search_by=search_by, exploration=exploration
        ),
        watch_s=watch_s,
        on_attempt=metrics.reloaded,
        on_change=tell,
        on_close=sweeper.close,
        load_now=load_now,
    )


class StateSweeper:
    """Forgets the states of versions that left, in a thread of its own: a million of them takes a minute.

    Such a version is rarely asked again, and its states can be rebuilt.
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._versions: Sequence[str] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="state-sweeper", daemon=True)
        self._thread.start()

    def keep(self, versions: Sequence[str]) -> None:
        """All states but those of these versions go; returns at once."""
        with self._changed:
            self._versions = versions
            self._changed.notify()

    def close(self) -> None:
        """Stops, wherever it is: what is left goes after the next start."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._versions is not None)
                versions, self._versions = self._versions, None
            while not self._closed and versions is not None:
                try:
                    if not self._store.drop_states(versions, DROPPED_AT_ONCE):
                        break
                except StoreError as error:
                    logger.error("the states of earlier versions stay in the store", exc_info=error)
                    break
                with self._changed:
                    # Between two parts others write.
                    self._changed.wait_for(lambda: self._closed or self._versions is not None, PAUSE_S)
                    versions, self._versions = self._versions or versions, None
            if self._closed:
                return


def warm_up(model: Recommender) -> None:
    """Asks a model about histories of one event, of two and of the longest; raises ArtifactError when it fails.

    That tells what checksums cannot: a graph that was written as it is, and fails or gives nonsense.
    """
    info, engine = model.info, model.engine
    indices = [1 + at % info.item_count for at in range(info.max_history)]
    events = [KnownEvent(item, None, SECONDS_PER_DAY * at) for at, item in enumerate(indices)]
    rows = [features(events[:length], None, (), info) for length in (1, 2, len(events))]
    try:
        (_, state), (of_two, _), _ = answers = engine.replay(rows, K)
        stepped = of_two
        if info.max_history > 1:
            last = rows[1]
            step = Step(state, last.item[-1:], last.rating[-1:], last.gap[-1:], -1.0, last.exclude[None])
            ((stepped, _),) = engine.step([step], K)
        for ranking in (*(ranking for ranking, _ in answers), stepped):
            _check(ranking, info.item_count)
        if stepped.scores.shape != of_two.scores.shape or np.abs(stepped.scores - of_two.scores).max(initial=0) > (
            TOLERANCE * (1 + np.abs(of_two.scores).max(initial=0))
        ):
            raise ValueError("step.onnx and sequence.onnx answer the same history differently")
    # ONNX Runtime's exceptions have no common base and no public names.
    except Exception as error:
        raise ArtifactError(f"the model {info.model_version} fails when it is asked: {error}") from error


def _check(ranking: Ranking, item_count: int) -> None:
    if not np.isfinite(ranking.scores).all():
        raise ValueError("scores that are not finite")
    if ranking.items.min(initial=1) < 1 or ranking.items.max(initial=1) > item_count:
        raise ValueError(f"expected items in 1..{item_count}, came {ranking.items.min()}..{ranking.items.max()}")


def _seconds(created: str) -> float:
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return 0.0
