"""The RPCs of `jaxrec.v1.Recommender`: decode, call, encode."""

import grpc

from serve.convert import (
    decode_query,
    decode_user_events,
    encode_answer,
    encode_model_info,
    encode_profile,
    encode_similar,
)
from serve.errors import UnknownUser, answers_errors
from serve.history import known_events
from serve.pb import recommender_pb2 as pb
from serve.pb import recommender_pb2_grpc
from serve.profile import genre_preferences
from serve.recommender import Recommender
from serve.store import EventStore
from serve.validate import check_id, checked_count


class RecommenderServicer(recommender_pb2_grpc.RecommenderServicer):
    """Answers with one model from one event store, from any number of threads."""

    def __init__(self, model: Recommender, store: EventStore) -> None:
        self._model = model
        self._store = store

    @answers_errors
    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendResponse:
        query = decode_query(request, self._model.info.rating_scale, self._store.history)
        (answer,) = self._model.recommend([query])
        return encode_answer(answer, self._model)

    @answers_errors
    def RecordEvents(self, request: pb.RecordEventsRequest, context: grpc.ServicerContext) -> pb.RecordEventsResponse:
        events = decode_user_events(request, self._model.info.rating_scale)
        recorded = self._store.record(events)
        unknown = [new for new in recorded if new.event.item_id not in self._model.catalog.index]
        return pb.RecordEventsResponse(
            recorded_count=len(recorded),
            duplicate_count=len(events) - len(recorded),
            unknown_item_count=len(unknown),
        )

    @answers_errors
    def GetUserProfile(
        self, request: pb.GetUserProfileRequest, context: grpc.ServicerContext
    ) -> pb.GetUserProfileResponse:
        check_id("user_id", request.user_id)
        limit = checked_count("limit", request.limit)
        events = self._store.history(request.user_id)
        if not events:
            raise UnknownUser(f"no event of the user {request.user_id!r} is stored")
        preferences = genre_preferences(known_events(events, self._model.catalog), self._model.catalog)
        return encode_profile(events, limit, preferences, self._model)

    @answers_errors
    def SimilarItems(self, request: pb.SimilarItemsRequest, context: grpc.ServicerContext) -> pb.SimilarItemsResponse:
        check_id("item_id", request.item_id)
        ranking = self._model.similar(request.item_id, checked_count("k", request.k))
        return encode_similar(ranking, self._model)

    @answers_errors
    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext) -> pb.GetModelInfoResponse:
        return encode_model_info(self._model)
