"""Makes a loaded model of a model directory: verified, and run once so that its first user does not wait."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serve.model.directory import read_artifact
from serve.model.events import KnownEvent
from serve.model.exploration import Exploration
from serve.model.features import features
from serve.model.manifest import ArtifactError
from serve.model.profile import SECONDS_PER_DAY
from serve.model.ranking.engine import Ranking, Step
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.serving.catalogue import REFRESH_S as CATALOGUE_REFRESH_S
from serve.serving.catalogue import CatalogueRefresher
from serve.serving.loaded import LoadedModel
from serve.serving.reranker import Reranker
from serve.serving.states import STATES_CAPACITY
from serve.serving.sweeper import StateSweeper
from serve.serving.trend import REFRESH_S, TrendRefresher
from serve.serving.versions import WATCH_S, ModelLibrary
from serve.settings import Provider, SearchBy
from serve.stores.base import EventStore

K = 10
# Of the largest score; parity of the graphs is held much closer when they are exported.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ModelLoader:
    """How model directories become loaded models."""

    store: EventStore
    metrics: Metrics
    provider: Provider = "auto"
    threads: int = 1
    search: SearchBy = "auto"
    exploration: Exploration | None = None
    reranker: Reranker | None = None
    states: int = STATES_CAPACITY

    def load(self, directory: Path, verified: Callable[[], None] = lambda: None) -> LoadedModel:
        """Raises ArtifactError for a directory that cannot be served, and ProviderError.

        Args:
            directory: The model directory.
            verified: Called once its files are what its manifest says, before they are loaded.
        """
        artifact = read_artifact(directory)
        verified()
        model = Recommender(artifact, self.provider, self.threads, self.search)
        warm_up(model)
        return LoadedModel(model, self.store, self.metrics, self.exploration, self.reranker, self.states)


def open_models(
    directory: Path,
    loader: ModelLoader,
    *,
    watch_s: float = WATCH_S,
    trend_refresh_s: float = REFRESH_S,
    keep_previous: bool = True,
    load_now: bool = True,
) -> ModelLibrary:
    """The versions of a directory, with their attempts and what serves in the metrics; raises as `ModelLibrary`.

    Every second their catalogue gets the items of the store that changed. Every `trend_refresh_s` seconds their trend
    is that of the store; 0: their trend is that of their exports, which decays.
    """
    sweeper = StateSweeper(loader.store)
    refresher = TrendRefresher(loader.store if trend_refresh_s else None, trend_refresh_s or REFRESH_S)
    if trend_refresh_s:
        loader.metrics.age_of_trend(refresher.age_s)

    catalogue = CatalogueRefresher(loader.store, CATALOGUE_REFRESH_S, loader.metrics.catalogue_failed)
    loader.metrics.watch_catalogue(catalogue.item_count, catalogue.withheld_count, catalogue.age_s)

    def load(directory: Path, verified: Callable[[], None]) -> LoadedModel:
        loaded = loader.load(directory, verified)
        catalogue.prepare(loaded.model)
        refresher.prepare(loaded.model)
        return loaded

    def resident(models: Sequence[LoadedModel]) -> None:
        sweeper.keep([loaded.model.info.model_version for loaded in models])
        refresher.keep([loaded.model for loaded in models])
        catalogue.keep([loaded.model for loaded in models])

    def changed(models: Sequence[LoadedModel]) -> None:
        infos = [loaded.model.info for loaded in models]
        loader.metrics.serving(
            [(info.model_version, info.policy, info.created_time, info.item_count) for info in infos]
        )

    def close() -> None:
        sweeper.close()
        refresher.close()
        catalogue.close()

    return ModelLibrary(
        *(directory, load),
        watch_s=watch_s,
        on_attempt=loader.metrics.reloaded,
        on_change=changed,
        on_resident=resident,
        keep_previous=keep_previous,
        on_close=close,
        load_now=load_now,
    )


def warm_up(model: Recommender) -> None:
    """Runs a model on histories of one event, of two and of the longest; raises ArtifactError when it fails.

    This finds what checksums cannot: a graph that was exported broken.
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
            exclude = np.append(last.exclude, np.int32(0))[None]
            step = Step(state, last.item[-1:], last.rating[-1:], last.gap[-1:], -1.0, exclude, last.seen)
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
