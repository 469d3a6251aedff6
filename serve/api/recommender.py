"""The RPCs of `jaxrec.v1.Recommender`: decode, call, encode; note what was shown, and count."""

import os
import time
from typing import Any

from serve.api.codec import (
    decode_batch,
    decode_query,
    decode_user_events,
    encode_answer,
    encode_model_info,
    encode_profile,
    encode_similar,
)
from serve.api.errors import UnknownUser
from serve.api.rules import check_id, checked_count
from serve.model.events import known_events
from serve.model.profile import genre_preferences
from serve.model.recommender import Answer, Query
from serve.observability.metrics import Metrics
from serve.pb import recommender_pb2 as pb
from serve.pb import recommender_pb2_grpc
from serve.serving.loaded import LoadedModel, Models
from serve.stores.base import EventStore, Shown


class RecommenderServicer(recommender_pb2_grpc.RecommenderServicer):
    """Answers with the loaded models from one event store, from any number of threads."""

    def __init__(self, models: Models, store: EventStore, metrics: Metrics) -> None:
        self._models = models
        self._store = store
        self._metrics = metrics

    def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendResponse:
        loaded = self._models.for_user(request.user_id or None)
        query = decode_query(request, loaded.model.info.rating_scale)
        answer = loaded.recommend(query, context.time_remaining(), lambda: not context.is_active())
        return self._shown(loaded, query, answer)

    def BatchRecommend(self, request: pb.BatchRecommendRequest, context: Any) -> pb.BatchRecommendResponse:
        loaded = [self._models.for_user(single.user_id or None) for single in request.requests]
        queries = decode_batch(request, [one.model.info.rating_scale for one in loaded])
        answers: dict[int, Answer] = {}
        for model in set(loaded):
            places = [at for at, one in enumerate(loaded) if one is model]
            found = model.recommend_all(
                [queries[at] for at in places], context.time_remaining(), lambda: not context.is_active()
            )
            answers.update(zip(places, found, strict=True))
        responses = [self._shown(one, queries[at], answers[at]) for at, one in enumerate(loaded)]
        return pb.BatchRecommendResponse(responses=responses)

    def _shown(self, loaded: LoadedModel, query: Query, answer: Answer) -> pb.RecommendResponse:
        """The message for an answer, noted and counted."""
        model, now = loaded.model, time.time()
        # The time first: an index of ids in their order grows at one end, which costs half of one in no order.
        recommendation_id = f"{int(now * 1e3):012x}{os.urandom(10).hex()}"
        item_ids = model.catalog.item_ids
        excluded = dict.fromkeys(model.indices(query.exclude_item_ids))
        self._store.log_shown(
            Shown(
                recommendation_id=recommendation_id,
                user_id=query.user_id,
                item_ids=tuple([item_ids[item] for item in answer.items.tolist()]),
                log_propensities=answer.log_propensities,
                policy=answer.policy,
                model_version=model.info.model_version,
                timestamp=int(now),
                temperature=loaded.temperature if answer.log_propensities else None,
                request_time=query.request_time,
                excluded_item_ids=tuple([item_ids[item] for item in excluded]),
            ),
            started=query.started,
        )
        self._metrics.answered(answer.policy, answer.items)
        if query.events:
            self._metrics.events(len(query.events) - answer.ignored_event_count, answer.ignored_event_count)
        return encode_answer(answer, model, recommendation_id)

    def RecordEvents(self, request: pb.RecordEventsRequest, context: Any) -> pb.RecordEventsResponse:
        model = self._models.version("").model
        events = decode_user_events(request, model.info.rating_scale)
        recorded = self._store.record(events)
        unknown = sum(new.event.item_id not in model.catalog.index for new in recorded)
        feedback = sum(new.recommendation_id is not None for new in recorded)
        self._metrics.recorded(len(recorded), len(events) - len(recorded), feedback)
        self._metrics.events(len(recorded) - unknown, unknown)
        return pb.RecordEventsResponse(
            recorded_count=len(recorded),
            duplicate_count=len(events) - len(recorded),
            unknown_item_count=unknown,
        )

    def GetUserProfile(self, request: pb.GetUserProfileRequest, context: Any) -> pb.GetUserProfileResponse:
        check_id("user_id", request.user_id)
        limit = checked_count("limit", request.limit)
        events = self._store.history(request.user_id)
        if not events:
            raise UnknownUser(f"no event of the user {request.user_id!r} is stored")
        model = self._models.for_user(request.user_id).model
        preferences = genre_preferences(known_events(events, model.catalog), model.catalog)
        return encode_profile(events, limit, preferences, model)

    def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        check_id("user_id", request.user_id)
        deleted = self._store.delete_user(request.user_id)
        self._models.forget(request.user_id)
        return pb.DeleteUserResponse(
            deleted_event_count=deleted.event_count, deleted_recommendation_count=deleted.shown_count
        )

    def SimilarItems(self, request: pb.SimilarItemsRequest, context: Any) -> pb.SimilarItemsResponse:
        check_id("item_id", request.item_id)
        k = checked_count("k", request.k)
        model = self._models.version("").model
        return encode_similar(model.similar(request.item_id, k), model)

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        loaded = self._models.version(request.model_version)
        return encode_model_info(loaded.model, loaded.temperature or 0.0)
