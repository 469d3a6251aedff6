"""The RPCs of `jaxrec.v1.Recommender`: decode, call, encode; note what was shown, and count."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

import grpc
import numpy as np
from numpy.typing import NDArray

from serve.convert import (
    decode_batch,
    decode_query,
    decode_user_events,
    encode_answer,
    encode_model_info,
    encode_profile,
    encode_similar,
)
from serve.errors import UnknownModel, UnknownUser
from serve.exploration import Exploration
from serve.history import known_events
from serve.loaded import LoadedModels, Models
from serve.metrics import Metrics
from serve.pb import recommender_pb2 as pb
from serve.pb import recommender_pb2_grpc
from serve.profile import genre_preferences
from serve.recommender import POPULARITY, Answer, Query, Recommender
from serve.store import EventStore, Shown
from serve.validate import check_id, checked_count


class OneModel:
    """One model for all."""

    def __init__(self, model: Recommender) -> None:
        self._model = model

    def for_user(self, user_id: str | None) -> Recommender:
        return self._model

    def version(self, model_version: str) -> Recommender:
        loaded = self._model.info.model_version
        if model_version not in ("", loaded):
            raise UnknownModel(f"the version {model_version!r} is not loaded, {loaded!r} is")
        return self._model

    def versions(self) -> Sequence[str]:
        return [self._model.info.model_version]


class RecommenderServicer(recommender_pb2_grpc.RecommenderServicer):
    """Answers with the loaded models from one event store, from any number of threads."""

    def __init__(
        self,
        models: Models,
        store: EventStore,
        metrics: Metrics,
        exploration: Exploration | None = None,
        loaded: LoadedModels | None = None,
    ) -> None:
        self._models = models
        self._store = store
        self._metrics = metrics
        self._exploration = exploration
        self._loaded = loaded or LoadedModels(models, store)

    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendResponse:
        user_id = request.user_id or None
        loaded = self._loaded.for_user(user_id)
        query = decode_query(request, loaded.model.info.rating_scale, self._store.history)
        answer = loaded.batcher.recommend(self._wider(query), context.time_remaining(), lambda: not context.is_active())
        return self._response(loaded.model, user_id, query, answer)

    def BatchRecommend(
        self, request: pb.BatchRecommendRequest, context: grpc.ServicerContext
    ) -> pb.BatchRecommendResponse:
        users = [single.user_id or None for single in request.requests]
        models = [self._loaded.for_user(user_id) for user_id in users]
        scales = [loaded.model.info.rating_scale for loaded in models]
        queries = decode_batch(request, scales, self._store.history)
        responses: dict[int, pb.RecommendResponse] = {}
        for loaded in {id(loaded): loaded for loaded in models}.values():
            places = [at for at, one in enumerate(models) if one is loaded]
            answers = loaded.recommend([self._wider(queries[at]) for at in places])
            for at, answer in zip(places, answers, strict=True):
                responses[at] = self._response(loaded.model, users[at], queries[at], answer)
        return pb.BatchRecommendResponse(responses=[responses[at] for at in range(len(queries))])

    def _response(self, model: Recommender, user_id: str | None, query: Query, answer: Answer) -> pb.RecommendResponse:
        """Encodes an answer, and notes that it was given."""
        if self._exploration is not None:
            answer = self._explored(model, self._exploration, query, answer)
        response = encode_answer(answer, model, uuid.uuid4().hex)
        item_ids = model.catalog.item_ids
        self._store.log_shown(
            Shown(
                recommendation_id=response.recommendation_id,
                user_id=user_id,
                item_ids=tuple([item_ids[item] for item in answer.items.tolist()]),
                propensity=math.exp(response.log_propensity),
                policy=answer.policy,
                model_version=model.info.model_version,
                timestamp=int(time.time()),
            )
        )
        self._metrics.answered(answer.policy, answer.items, answer.known_event_count, answer.ignored_event_count)
        return response

    def _wider(self, query: Query) -> Query:
        """What the model is asked: for more items, when some of them are to be drawn."""
        if self._exploration is None:
            return query
        return query._replace(k=max(query.k, self._exploration.pool), explain=False)

    @staticmethod
    def _explored(model: Recommender, exploration: Exploration, query: Query, answer: Answer) -> Answer:
        """An answer whose items were drawn from more; what is popular is not drawn."""
        if answer.policy == POPULARITY:
            places: NDArray[np.intp] = np.arange(len(answer.items))[: query.k]
            log_propensities: tuple[float, ...] = ()
        else:
            slate = exploration.draw(answer.scores, query.k)
            places, log_propensities = slate.places, tuple(slate.log_propensities.tolist())
        items = answer.items[places]
        return replace(
            answer,
            items=items,
            scores=answer.scores[places],
            explanations=model.explain(query, items) if query.explain else (),
            log_propensities=log_propensities,
        )

    def RecordEvents(self, request: pb.RecordEventsRequest, context: grpc.ServicerContext) -> pb.RecordEventsResponse:
        model = self._models.version("")
        events = decode_user_events(request, model.info.rating_scale)
        recorded = self._store.record(events)
        unknown = sum(new.event.item_id not in model.catalog.index for new in recorded)
        feedback = sum(new.recommendation_id is not None for new in recorded)
        self._metrics.recorded(len(recorded), len(events) - len(recorded), unknown, feedback)
        return pb.RecordEventsResponse(
            recorded_count=len(recorded),
            duplicate_count=len(events) - len(recorded),
            unknown_item_count=unknown,
        )

    def GetUserProfile(
        self, request: pb.GetUserProfileRequest, context: grpc.ServicerContext
    ) -> pb.GetUserProfileResponse:
        check_id("user_id", request.user_id)
        limit = checked_count("limit", request.limit)
        events = self._store.history(request.user_id)
        if not events:
            raise UnknownUser(f"no event of the user {request.user_id!r} is stored")
        model = self._models.for_user(request.user_id)
        preferences = genre_preferences(known_events(events, model.catalog), model.catalog)
        return encode_profile(events, limit, preferences, model)

    def DeleteUser(self, request: pb.DeleteUserRequest, context: grpc.ServicerContext) -> pb.DeleteUserResponse:
        check_id("user_id", request.user_id)
        deleted = self._store.delete_user(request.user_id)
        self._loaded.forget(request.user_id)
        return pb.DeleteUserResponse(
            deleted_event_count=deleted.event_count, deleted_recommendation_count=deleted.shown_count
        )

    def SimilarItems(self, request: pb.SimilarItemsRequest, context: grpc.ServicerContext) -> pb.SimilarItemsResponse:
        check_id("item_id", request.item_id)
        k = checked_count("k", request.k)
        model = self._models.version("")
        return encode_similar(model.similar(request.item_id, k), model)

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext) -> pb.GetModelInfoResponse:
        temperature = 0.0 if self._exploration is None else self._exploration.temperature
        return encode_model_info(self._models.version(request.model_version), temperature)
