"""The RPCs of `jaxrec.v1.Recommender`: decode, call, encode."""

from typing import Any

from serve.api.codec import (
    check_answer,
    decode_batch,
    decode_impressions,
    decode_query,
    decode_user_events,
    encode_answer,
    encode_events,
    encode_model_info,
    encode_profile,
    encode_similar,
)
from serve.api.errors import InvalidRequest
from serve.api.event_types import BUILT_IN, EventTypes
from serve.api.filters import decode_filter
from serve.api.items import decode_items, encode_item, encode_items
from serve.api.pages import checked_page_size, decode_item_page_token, decode_page_token, page_token
from serve.api.rules import MAX_DELETED_EVENTS, MAX_UPSERTED_ITEMS, check_id, checked_count, checked_ids
from serve.api.service import RecommenderService
from serve.api.trending import answer_trending
from serve.pb import recommender_pb2 as pb
from serve.pb import recommender_pb2_grpc


class RecommenderServicer(recommender_pb2_grpc.RecommenderServicer):
    """The service behind gRPC's messages."""

    def __init__(self, service: RecommenderService, event_types: EventTypes = BUILT_IN) -> None:
        self._service = service
        self._event_types = event_types
        self._models = service.models

    def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendResponse:
        loaded = self._models.for_user(request.user_id or None)
        query = decode_query(request, loaded.model, self._event_types)
        answer = self._service.recommend(loaded, query, context.time_remaining(), lambda: not context.is_active())
        response = encode_answer(answer, with_metadata=request.with_metadata)
        if request.explain:
            check_answer("k", response)
        return response

    def BatchRecommend(self, request: pb.BatchRecommendRequest, context: Any) -> pb.BatchRecommendResponse:
        loaded = [self._models.for_user(single.user_id or None) for single in request.requests]
        queries = decode_batch(request, [one.model for one in loaded], self._event_types)
        answers = self._service.recommend_all(loaded, queries, context.time_remaining, lambda: not context.is_active())
        response = pb.BatchRecommendResponse(
            responses=[
                encode_answer(answer, with_metadata=single.with_metadata)
                for single, answer in zip(request.requests, answers, strict=True)
            ]
        )
        check_answer("requests", response)
        return response

    def RecordEvents(self, request: pb.RecordEventsRequest, context: Any) -> pb.RecordEventsResponse:
        scale = self._models.version("").model.info.rating_scale
        events = decode_user_events(request, scale, self._event_types)
        return pb.RecordEventsResponse(**self._service.record(events)._asdict())

    def RecordImpressions(self, request: pb.RecordImpressionsRequest, context: Any) -> pb.RecordImpressionsResponse:
        items = decode_impressions(request)
        recorded = self._service.record_shown(items)
        return pb.RecordImpressionsResponse(recorded_count=recorded, duplicate_count=len(items) - recorded)

    def GetUserProfile(self, request: pb.GetUserProfileRequest, context: Any) -> pb.GetUserProfileResponse:
        check_id("user_id", request.user_id)
        limit = checked_count("limit", request.limit)
        return encode_profile(self._service.profile(request.user_id), limit)

    def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        check_id("user_id", request.user_id)
        deleted = self._service.delete_user(request.user_id)
        return pb.DeleteUserResponse(
            deleted_event_count=deleted.event_count, deleted_recommendation_count=deleted.slate_count
        )

    def ListEvents(self, request: pb.ListEventsRequest, context: Any) -> pb.ListEventsResponse:
        user_id = request.user_id
        check_id("user_id", user_id)
        size = checked_page_size("page_size", request.page_size)
        page = self._service.events(user_id, size, decode_page_token("page_token", request.page_token, user_id))
        return encode_events(page.events, "" if page.last is None else page_token(user_id, *page.last))

    def DeleteEvents(self, request: pb.DeleteEventsRequest, context: Any) -> pb.DeleteEventsResponse:
        check_id("user_id", request.user_id)
        event_ids = checked_ids("event_ids", request.event_ids, MAX_DELETED_EVENTS)
        return pb.DeleteEventsResponse(deleted_event_count=self._service.delete_events(request.user_id, event_ids))

    def MergeUsers(self, request: pb.MergeUsersRequest, context: Any) -> pb.MergeUsersResponse:
        check_id("source_user_id", request.source_user_id)
        check_id("target_user_id", request.target_user_id)
        if request.source_user_id == request.target_user_id:
            raise InvalidRequest("target_user_id", "another user than source_user_id", "the same")
        merged = self._service.merge_users(request.source_user_id, request.target_user_id)
        return pb.MergeUsersResponse(
            merged_event_count=merged.event_count, merged_recommendation_count=merged.slate_count
        )

    def SimilarItems(self, request: pb.SimilarItemsRequest, context: Any) -> pb.SimilarItemsResponse:
        check_id("item_id", request.item_id)
        k = checked_count("k", request.k)
        model = self._models.version("").model
        item_filter = decode_filter(request, model)
        withheld = model.live.withheld()
        ranking = model.similar(request.item_id, k, request.exclude_item_ids, item_filter, withheld)
        return encode_similar(ranking, model, with_metadata=request.with_metadata)

    def Trending(self, request: pb.TrendingRequest, context: Any) -> pb.TrendingResponse:
        response = answer_trending(request, self._models.version("").model)
        check_answer("k", response)
        return response

    def UpsertItems(self, request: pb.UpsertItemsRequest, context: Any) -> pb.UpsertItemsResponse:
        items = decode_items(request)
        created = self._service.upsert_items(items)
        return pb.UpsertItemsResponse(created_count=created, replaced_count=len(items) - created)

    def DeleteItems(self, request: pb.DeleteItemsRequest, context: Any) -> pb.DeleteItemsResponse:
        ids = checked_ids("item_ids", request.item_ids, MAX_UPSERTED_ITEMS)
        return pb.DeleteItemsResponse(deleted_count=self._service.delete_items(ids))

    def GetItem(self, request: pb.GetItemRequest, context: Any) -> pb.GetItemResponse:
        check_id("item_id", request.item_id)
        entry, model = self._service.item(request.item_id)
        return pb.GetItemResponse(item=encode_item(entry), model_version=model.info.model_version)

    def ListItems(self, request: pb.ListItemsRequest, context: Any) -> pb.ListItemsResponse:
        size = checked_page_size("page_size", request.page_size)
        after = decode_item_page_token("page_token", request.page_token)
        page = self._service.items(after, size, stored_only=request.stored_only)
        return encode_items(page.items, more=page.more, model_version=page.model.info.model_version)

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        loaded = self._models.version(request.model_version)
        return encode_model_info(loaded.model, loaded.temperature or 0.0, self._event_types)
