"""What belongs to each model in service: its queue, and the states of its users."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from serve.batching import DEFAULT_CAPACITY, LARGEST_BATCH, Batcher, Run
from serve.recommender import Answer, Query, Recommender
from serve.states import DEFAULT_CAPACITY as DEFAULT_CACHED_USERS
from serve.states import StateCache
from serve.store import EventStore


class Models(Protocol):
    """The models that are loaded."""

    def for_user(self, user_id: str | None) -> Recommender:
        """The model that answers a user, always the same while the traffic stays; None: nobody in particular."""

    def version(self, model_version: str) -> Recommender:
        """One loaded version, or with "" the one that answers most; raises UnknownModel."""

    def versions(self) -> Sequence[str]:
        """The loaded versions, the one that answers most first."""


class LoadedModel(NamedTuple):
    """A model with its users' states and its queue."""

    model: Recommender
    states: StateCache
    batcher: Batcher

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Answers many queries of one caller beside the queue, which gets its turns between the runs."""
        answers: list[Answer] = []
        for start in range(0, len(queries), LARGEST_BATCH):
            answers += self.states.recommend(queries[start : start + LARGEST_BATCH])
        return answers


class LoadedModels:
    """A `LoadedModel` for each of the models, made when it first answers and dropped some time after it left."""

    def __init__(
        self,
        models: Models,
        store: EventStore,
        *,
        capacity: int = DEFAULT_CAPACITY,
        cached_users: int = DEFAULT_CACHED_USERS,
        on_run: Callable[[Run], None] | None = None,
    ) -> None:
        """`capacity` requests may wait for each model, `cached_users` states are kept in memory for each."""
        self._models = models
        self._store = store
        self._capacity = capacity
        self._cached_users = cached_users
        self._on_run = on_run
        self._loaded: dict[str, LoadedModel] = {}
        self._lock = threading.Lock()

    def for_user(self, user_id: str | None) -> LoadedModel:
        """As `Models.for_user`."""
        return self.of(self._models.for_user(user_id))

    def of(self, model: Recommender) -> LoadedModel:
        """What belongs to a loaded model."""
        loaded = self._loaded.get(model.info.model_version)
        if loaded is None or loaded.model is not model:
            with self._lock:
                loaded = self._loaded.get(model.info.model_version)
                if loaded is None or loaded.model is not model:
                    loaded = self._load(model)
        return loaded

    def forget(self, user_id: str) -> None:
        """Drops what is kept of a user who was deleted from the store."""
        for loaded in list(self._loaded.values()):
            loaded.states.forget(user_id)

    def spill(self) -> None:
        """Hands the states of all users to the store, for the next start; no call may be under way."""
        for loaded in list(self._loaded.values()):
            loaded.states.spill()

    def _load(self, model: Recommender) -> LoadedModel:
        # In a new dictionary, since others read the old one meanwhile.
        staying = set(self._models.versions())
        kept = {version: loaded for version, loaded in self._loaded.items() if version in staying}
        states = StateCache(model, self._store, self._cached_users)
        batcher = Batcher(states.recommend, self._capacity, on_run=self._on_run)
        loaded = kept[model.info.model_version] = LoadedModel(model, states, batcher)
        self._loaded = kept
        return loaded
