"""Loaded models for tests that need one, without a model library."""

from collections.abc import Sequence

from serve.model.exploration import Exploration
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.serving.errors import UnknownModel
from serve.serving.loaded import LoadedModel
from serve.serving.reranker import Reranker
from serve.stores.base import EventStore


class OneModel:
    """One model for all users."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def for_user(self, user_id: str | None) -> LoadedModel:
        return self._loaded

    def version(self, model_version: str) -> LoadedModel:
        version = self._loaded.model.info.model_version
        if model_version not in ("", version):
            raise UnknownModel(f"the loaded versions are {version!r}; {model_version!r} is not loaded")
        return self._loaded

    def versions(self) -> Sequence[str]:
        return [self._loaded.model.info.model_version]

    def forget(self, user_id: str) -> None:
        self._loaded.states.forget(user_id)


def one_model(
    model: Recommender,
    store: EventStore,
    metrics: Metrics | None = None,
    exploration: Exploration | None = None,
    reranker: Reranker | None = None,
) -> OneModel:
    """All users are answered by one model."""
    return OneModel(LoadedModel(model, store, metrics or Metrics(), exploration, reranker))
