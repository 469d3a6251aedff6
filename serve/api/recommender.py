"""The RPCs of `jaxrec.v1.Recommender`: decode, call, encode."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from serve.api.codec import (
    answer_bytes,
    check_answer,
    check_batch,
    check_version,
    check_view,
    decode_impressions,
    decode_query,
    decode_user_events,
    encode_answer,
    encode_events,
    encode_model_info,
    encode_profile,
    encode_similar,
)
from serve.api.context import Context
from serve.api.errors import OF_THE_SERVER, InvalidRequest, Violations, status_of
from serve.api.event_types import BUILT_IN, EventTypes
from serve.api.filters import decode_filter
from serve.api.items import decode_items, encode_item, encode_items
from serve.api.pages import DEFAULT_PAGE_SIZE, checked_page_size, decode_item_page_token, decode_page_token
from serve.api.rules import DEFAULT_K, MAX_DELETED_EVENTS, MAX_UPSERTED_ITEMS, check_id, checked_count, checked_ids
from serve.api.service import Recommendation, RecommenderService, check_wanted
from serve.api.trending import answer_trending
from serve.model.recommender import Query
from serve.pb import recommender_pb2 as pb
from serve.pb import recommender_pb2_grpc
from serve.serving.batching import OnDone
from serve.serving.loaded import LoadedModel


class Answered(NamedTuple):
    """An answer to Recommend."""

    response: bytes
    """The message, serialized."""
    log: Callable[[], None]
    """Counts the answer and puts it into the log of slates; to be called once, by the front."""


class Begun(NamedTuple):
    """A Recommend under way."""

    loaded: LoadedModel
    """The model that is to run for it."""
    answer: Callable[[], Answered]
    """Its answer, after the run; raises what the call fails with."""


class RecommenderServicer(recommender_pb2_grpc.RecommenderServicer):
    """The service behind gRPC's messages."""

    def __init__(self, service: RecommenderService, event_types: EventTypes = BUILT_IN) -> None:
        self._service = service
        self._event_types = event_types
        self._models = service.models

    def _loaded(self, request: pb.RecommendRequest | pb.SimilarItemsRequest) -> LoadedModel:
        """The model that answers; raises UnknownModel."""
        if request.model_version:
            return self._models.version(request.model_version)
        user_id = request.user_id if isinstance(request, pb.RecommendRequest) else ""
        return self._models.for_user(user_id or request.bucket_key or None)

    def Recommend(self, request: pb.RecommendRequest, context: Context) -> pb.RecommendResponse:
        loaded = self._loaded(request)
        query = decode_query(request, loaded.model, self._event_types)
        answer = self._service.recommend(loaded, query, context.time_remaining(), lambda: not context.is_active())
        return self._logged(request, answer)

    def start_recommend(self, request: pb.RecommendRequest, context: Context, on_done: OnDone) -> Begun:
        """As `Recommend`, for a request that is not `slow`, without waiting.

        Args:
            request: What is asked.
            context: The call.
            on_done: See `serve.serving.batching.OnDone`; called when the request can be answered.

        Returns:
            The model that is to run, and what answers then.

        Raises:
            QueueFull: Too many wait.
        """
        loaded = self._loaded(request)
        query = decode_query(request, loaded.model, self._event_types)
        remaining = context.time_remaining()
        ranked = self._service.start(loaded, query, remaining, lambda: not context.is_active(), on_done)

        def answer() -> Answered:
            recommendation = ranked()
            return Answered(answer_bytes(recommendation, request.view), partial(self._service.log, recommendation))

        return Begun(loaded, answer)

    def is_slow(self, request: pb.RecommendRequest) -> bool:
        """Whether a request needs reasons, the candidates of rules or of the server's own re-ranker, what was
        recommended lately, a history as of an earlier time, or the stored one with events that are sent along: many
        rows for the model, and reads of the store."""
        user_id = request.user_id
        both = user_id and request.HasField("history")
        if both or request.explain or request.HasField("rules") or request.not_shown_within > 0:
            return True
        loaded = self._loaded(request)
        if loaded.has_reranker:
            return True
        if not (user_id and request.HasField("request_time")):
            return False
        return loaded.asks_for_the_past(user_id, request.request_time)

    def _logged(self, request: pb.RecommendRequest, answer: Recommendation) -> pb.RecommendResponse:
        """The response, once it is known that it can be sent and the answer is in the log."""
        response = self._encoded(request, answer)
        self._service.log(answer)
        return response

    def _encoded(self, request: pb.RecommendRequest, answer: Recommendation) -> pb.RecommendResponse:
        response = encode_answer(answer, request.view)
        check_answer("k", response)
        return response

    def BatchRecommend(self, request: pb.BatchRecommendRequest, context: Context) -> pb.BatchRecommendResponse:
        check_batch(request, is_reranked=self._models.version("").has_reranker)
        results: dict[int, pb.RecommendResult] = {}
        asked: dict[int, tuple[LoadedModel, Query]] = {}
        names: dict[str, int] = {}
        for at, single in enumerate(request.requests):
            check_wanted(context.time_remaining, lambda: not context.is_active())
            try:
                loaded = self._loaded(single)
                query = decode_query(single, loaded.model, self._event_types)
                first = names.setdefault(query.recommendation_id, at) if query.recommendation_id else at
                if first != at:
                    raise InvalidRequest("request_id", "each once for a user", f"that of requests[{first}]")
            except Exception as error:
                results[at] = self._failed(error)
            else:
                asked[at] = (loaded, query)
        answers = self._service.recommend_all(
            list(asked.values()), context.time_remaining, lambda: not context.is_active()
        )
        sent: list[Recommendation] = []
        for at, answer in zip(asked, answers, strict=True):
            try:
                if isinstance(answer, Exception):
                    raise answer
                results[at] = pb.RecommendResult(response=self._encoded(request.requests[at], answer))
                sent.append(answer)
            except Exception as error:
                results[at] = self._failed(error)
        response = pb.BatchRecommendResponse(results=[results[at] for at in range(len(results))])
        check_answer("requests", response)
        for answer in sent:
            self._service.log(answer)
        return response

    def _failed(self, error: Exception) -> pb.RecommendResult:
        """What became of one request of a batch; raises an error that concerns the server, and so the whole call."""
        if isinstance(error, OF_THE_SERVER):
            raise error
        status = status_of(error)
        self._service.failed_in_batch(status.code.name)
        return pb.RecommendResult(error=pb.Status.FromString(status.details))

    def RecordEvents(self, request: pb.RecordEventsRequest, context: Context) -> pb.RecordEventsResponse:
        scale = self._models.version("").model.info.rating_scale
        events = decode_user_events(request, scale, self._event_types)
        return pb.RecordEventsResponse(**self._service.record(events)._asdict())

    def RecordImpressions(self, request: pb.RecordImpressionsRequest, context: Context) -> pb.RecordImpressionsResponse:
        items = decode_impressions(request)
        recorded = self._service.record_shown(items)
        return pb.RecordImpressionsResponse(recorded_count=recorded, duplicate_count=len(items) - recorded)

    def GetUserProfile(self, request: pb.GetUserProfileRequest, context: Context) -> pb.GetUserProfileResponse:
        found, user_id = Violations(), request.user_id
        found.check(check_id, "user_id", user_id)
        size = found.check(checked_page_size, "page_size", request.page_size) or DEFAULT_PAGE_SIZE
        before = found.check(decode_page_token, "page_token", request.page_token, user_id)
        found.raise_any()
        return encode_profile(user_id, self._service.profile(user_id, size, before))

    def DeleteUser(self, request: pb.DeleteUserRequest, context: Context) -> pb.DeleteUserResponse:
        check_id("user_id", request.user_id)
        deleted = self._service.delete_user(request.user_id)
        return pb.DeleteUserResponse(
            deleted_event_count=deleted.event_count, deleted_recommendation_count=deleted.slate_count
        )

    def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsResponse:
        found, user_id = Violations(), request.user_id
        found.check(check_id, "user_id", user_id)
        size = found.check(checked_page_size, "page_size", request.page_size) or DEFAULT_PAGE_SIZE
        before = found.check(decode_page_token, "page_token", request.page_token, user_id)
        found.raise_any()
        return encode_events(user_id, self._service.events(user_id, size, before))

    def DeleteEvents(self, request: pb.DeleteEventsRequest, context: Context) -> pb.DeleteEventsResponse:
        found = Violations()
        found.check(check_id, "user_id", request.user_id)
        event_ids = found.check(checked_ids, "event_ids", request.event_ids, MAX_DELETED_EVENTS) or []
        found.raise_any()
        return pb.DeleteEventsResponse(deleted_event_count=self._service.delete_events(request.user_id, event_ids))

    def MergeUsers(self, request: pb.MergeUsersRequest, context: Context) -> pb.MergeUsersResponse:
        found = Violations()
        found.check(check_id, "source_user_id", request.source_user_id)
        found.check(check_id, "target_user_id", request.target_user_id)
        if request.source_user_id == request.target_user_id:
            found.add("target_user_id", "another user than source_user_id", "the same")
        found.raise_any()
        merged = self._service.merge_users(request.source_user_id, request.target_user_id)
        return pb.MergeUsersResponse(
            merged_event_count=merged.event_count, merged_recommendation_count=merged.slate_count
        )

    def SimilarItems(self, request: pb.SimilarItemsRequest, context: Context) -> pb.SimilarItemsResponse:
        model, found = self._loaded(request).model, Violations()
        live = model.live
        found.check(check_id, "item_id", request.item_id)
        k = found.check(checked_count, "k", request.k) or DEFAULT_K
        item_filter = found.check(decode_filter, request, model, live)
        found.check(check_version, request)
        found.check(check_view, request.view)
        found.raise_any()
        ranking = model.similar(request.item_id, k, live, request.exclude_item_ids, item_filter)
        response = encode_similar(ranking, model, live, request.view)
        check_answer("k", response)
        return response

    def Trending(self, request: pb.TrendingRequest, context: Context) -> pb.TrendingResponse:
        response = answer_trending(request, self._models.version("").model)
        check_answer("k", response)
        return response

    def UpsertItems(self, request: pb.UpsertItemsRequest, context: Context) -> pb.UpsertItemsResponse:
        items = decode_items(request)
        created = self._service.upsert_items(items)
        return pb.UpsertItemsResponse(created_count=created, replaced_count=len(items) - created)

    def DeleteItems(self, request: pb.DeleteItemsRequest, context: Context) -> pb.DeleteItemsResponse:
        ids = checked_ids("item_ids", request.item_ids, MAX_UPSERTED_ITEMS)
        return pb.DeleteItemsResponse(deleted_count=self._service.delete_items(ids))

    def GetItem(self, request: pb.GetItemRequest, context: Context) -> pb.GetItemResponse:
        check_id("item_id", request.item_id)
        entry, model = self._service.item(request.item_id)
        return pb.GetItemResponse(item=encode_item(entry), model_version=model.info.model_version)

    def ListItems(self, request: pb.ListItemsRequest, context: Context) -> pb.ListItemsResponse:
        found = Violations()
        size = found.check(checked_page_size, "page_size", request.page_size) or DEFAULT_PAGE_SIZE
        after = found.check(decode_item_page_token, "page_token", request.page_token) or ""
        found.raise_any()
        page = self._service.items(after, size, stored_only=request.stored_only)
        return encode_items(page.items, more=page.more, model_version=page.model.info.model_version)

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        loaded = self._models.version(request.model_version)
        return encode_model_info(loaded.model, loaded.temperature or 0.0, self._event_types)
