"""The RPCs of `jaxrec.v1.Recommender`: decode, call, encode; note what was shown, and count."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

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
from serve.metrics import Metrics
from serve.pb import recommender_pb2 as pb
from serve.pb import recommender_pb2_grpc
from serve.profile import genre_preferences
from serve.recommender import POPULARITY, Answer, Query, Recommender
from serve.store import EventStore, Shown
from serve.validate import check_id, checked_count


class Models(Protocol):
    """The models that are loaded."""

    def for_user(self, user_id: str | None) -> Recommender:
        """The model that answers a user, always the same while the traffic stays; None: nobody in particular."""

    def version(self, model_version: str) -> Recommender:
        """One loaded version, or with "" the one that answers most; raises UnknownModel."""

    def versions(self) -> Sequence[str]:
        """The loaded versions, the one that answers most first."""


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


class _Asked(NamedTuple):
    """A query with its user ("" for a history that was sent along) and the model that answers it."""

    user_id: str
    query: Query
    model: Recommender


class RecommenderServicer(recommender_pb2_grpc.RecommenderServicer):
    """Answers with the loaded models from one event store, from any number of threads."""

    def __init__(
        self, models: Models, store: EventStore, metrics: Metrics, exploration: Exploration | None = None
    ) -> None:
        self._models = models
        self._store = store
        self._metrics = metrics
        self._exploration = exploration

    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendResponse:
        model = self._models.for_user(request.user_id or None)
        query = decode_query(request, model.info.rating_scale, self._store.history)
        (response,) = self._answer(model, [_Asked(request.user_id, query, model)])
        return response

    def BatchRecommend(
        self, request: pb.BatchRecommendRequest, context: grpc.ServicerContext
    ) -> pb.BatchRecommendResponse:
        models = [self._models.for_user(single.user_id or None) for single in request.requests]
        queries = decode_batch(request, [model.info.rating_scale for model in models], self._store.history)
        asked = [
            _Asked(single.user_id, query, model)
            for single, query, model in zip(request.requests, queries, models, strict=True)
        ]
        responses: dict[int, pb.RecommendResponse] = {}
        for model in {id(model): model for model in models}.values():
            places = [at for at, one in enumerate(asked) if one.model is model]
            responses.update(zip(places, self._answer(model, [asked[at] for at in places]), strict=True))
        return pb.BatchRecommendResponse(responses=[responses[at] for at in range(len(asked))])

    def _answer(self, model: Recommender, asked: Sequence[_Asked]) -> list[pb.RecommendResponse]:
        if self._exploration is None:
            answers = model.recommend([one.query for one in asked])
        else:
            answers = self._explored(model, self._exploration, [one.query for one in asked])
        now = int(time.time())
        responses = []
        for one, answer in zip(asked, answers, strict=True):
            response = encode_answer(answer, model, uuid.uuid4().hex)
            self._store.log_shown(
                Shown(
                    recommendation_id=response.recommendation_id,
                    user_id=one.user_id or None,
                    item_ids=tuple([model.catalog.item_ids[item] for item in answer.items.tolist()]),
                    propensity=math.exp(response.log_propensity),
                    policy=answer.policy,
                    model_version=model.info.model_version,
                    timestamp=now,
                )
            )
            self._metrics.answered(
                answer.policy,
                answer.items,
                len(one.query.events) - answer.ignored_event_count,
                answer.ignored_event_count,
            )
            responses.append(response)
        return responses

    @staticmethod
    def _explored(model: Recommender, exploration: Exploration, queries: Sequence[Query]) -> list[Answer]:
        """Answers whose items were drawn from more; what is popular is not drawn."""
        wider = [replace(query, k=max(query.k, exploration.pool), explain=False) for query in queries]
        answers = []
        for query, answer in zip(queries, model.recommend(wider), strict=True):
            if answer.policy == POPULARITY:
                places: NDArray[np.intp] = np.arange(len(answer.items))[: query.k]
                log_propensities: tuple[float, ...] = ()
            else:
                slate = exploration.draw(answer.scores, query.k)
                places, log_propensities = slate.places, tuple(slate.log_propensities.tolist())
            items = answer.items[places]
            answers.append(
                replace(
                    answer,
                    items=items,
                    scores=answer.scores[places],
                    explanations=model.explain(query, items) if query.explain else (),
                    log_propensities=log_propensities,
                )
            )
        return answers

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
