"""The calls of both clients: which request each sends. How its answer comes is up to the channel."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar

from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client.connection import Connection
from serve.pb.recommender_pb2 import (
    BatchRecommendRequest,
    BatchRecommendResponse,
    DeleteEventsRequest,
    DeleteItemsRequest,
    DeleteUserRequest,
    Event,
    GetItemRequest,
    GetModelInfoRequest,
    GetUserProfileRequest,
    History,
    Impression,
    Item,
    ItemFilter,
    ListEventsRequest,
    ListItemsRequest,
    MergeUsersRequest,
    RecommendRequest,
    RecommendResponse,
    RecordEventsRequest,
    RecordImpressionsRequest,
    Rules,
    Seen,
    SimilarItemsRequest,
    Status,
    TrendingRequest,
    TrendWindow,
    UpsertItemsRequest,
    UserEvent,
    View,
)
from serve.pb.recommender_pb2_grpc import RecommenderStub

ViewName = Literal["ids", "basic", "full"]
VIEWS: Mapping[ViewName, View.ValueType] = {"ids": View.VIEW_IDS, "basic": View.VIEW_BASIC, "full": View.VIEW_FULL}
SEEN = {None: Seen.SEEN_UNSPECIFIED, True: Seen.SEEN_ALLOW, False: Seen.SEEN_EXCLUDE}

Recommended = TypeVar("Recommended")
Recorded = TypeVar("Recorded")
Profile = TypeVar("Profile")
Deleted = TypeVar("Deleted")
Similar = TypeVar("Similar")
Trended = TypeVar("Trended")
Info = TypeVar("Info")
Listed = TypeVar("Listed")
DeletedEvents = TypeVar("DeletedEvents")
Merged = TypeVar("Merged")
Shown = TypeVar("Shown")
Upserted = TypeVar("Upserted")
DeletedItems = TypeVar("DeletedItems")
GotItem = TypeVar("GotItem")
ListedItems = TypeVar("ListedItems")


def recommend_request(
    *,
    user_id: str | None = None,
    history: Iterable[Event] | None = None,
    k: int = 10,
    exclude_item_ids: Iterable[str] = (),
    request_time: int | None = None,
    explain: bool = False,
    filter: ItemFilter | None = None,
    allow_seen: bool | None = None,
    new_item_slots: int = 0,
    not_shown_within: int = 0,
    view: ViewName = "basic",
    bucket_key: str = "",
    model_version: str = "",
    request_id: str = "",
    rules: Rules | None = None,
) -> RecommendRequest:
    """The message for one question.

    Args:
        user_id: A user whose events the server has stored.
        history: Events that the server has not stored: all of the user, or with `user_id` those to be added.
        k: Number of items, 1 to 1000.
        exclude_item_ids: Items not to recommend.
        request_time: When the user asks, in seconds since 1970; None: not known. Later stored events are ignored.
        explain: Whether to say why each item is recommended.
        filter: Which items may be recommended; None: every item.
        allow_seen: Whether items of the history may be recommended; None: the model decides.
        new_item_slots: Number of the `k` places that are reserved for items that the model was not trained on.
        not_shown_within: What was recommended to the user within so many seconds is left out; 0: it is not.
        view: "ids": the answer has ids, scores and propensities alone; "basic": titles and genres too; "full": and the
            metadata that was stored.
        bucket_key: Without `user_id`: which model version answers, as for a user with this id; "": the main one.
        model_version: The model version that is to answer; "": that of the user or of `bucket_key`.
        request_id: Repeated calls with the same id are one entry of the server's log; "": each call is one.
        rules: What is done to the answer after the model; None: nothing.

    Raises:
        ValueError: None of `user_id` and `history` is given.
    """
    if user_id is None and history is None:
        raise ValueError("expected user_id, history or both")
    request = RecommendRequest(
        k=k,
        exclude_item_ids=exclude_item_ids,
        request_time=request_time,
        explain=explain,
        filter=filter,
        seen=SEEN[allow_seen],
        new_item_slots=new_item_slots,
        not_shown_within=not_shown_within,
        view=VIEWS[view],
        bucket_key=bucket_key,
        model_version=model_version,
        request_id=request_id,
        rules=rules,
    )
    if user_id is not None:
        request.user_id = user_id
    if history is not None:
        request.history.CopyFrom(History(events=history))
    return request


class Requests(
    ABC,
    Generic[
        Recommended,
        Recorded,
        Profile,
        Deleted,
        Similar,
        Info,
        Listed,
        DeletedEvents,
        Merged,
        Shown,
        Upserted,
        DeletedItems,
        GotItem,
        ListedItems,
        Trended,
    ],
):
    """A connection to one server. The types are those of the answers, or of what is awaited for them."""

    def __init__(self, server: str | Connection, timeout_s: float = 5.0) -> None:
        """Connects when first used.

        Args:
            server: HOST:PORT for a connection without encryption, or a `Connection`.
            timeout_s: Deadline of a call in seconds; a `Connection` has its own.
        """
        connection = Connection(server, timeout_s) if isinstance(server, str) else server
        self.address = connection.address
        self._timeout_s, self._metadata = connection.timeout_s, connection.metadata
        self._channel = self._open(connection)
        self._stub: Any = RecommenderStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    @abstractmethod
    def _open(self, connection: Connection) -> Any:
        """A channel."""

    def recommend(
        self,
        *,
        user_id: str | None = None,
        history: Iterable[Event] | None = None,
        k: int = 10,
        exclude_item_ids: Iterable[str] = (),
        request_time: int | None = None,
        explain: bool = False,
        filter: ItemFilter | None = None,
        allow_seen: bool | None = None,
        new_item_slots: int = 0,
        not_shown_within: int = 0,
        view: ViewName = "basic",
        bucket_key: str = "",
        model_version: str = "",
        request_id: str = "",
        rules: Rules | None = None,
    ) -> Recommended:
        """The best `k` items for a stored user or for a history; arguments and errors as of `recommend_request`."""
        request = recommend_request(
            user_id=user_id,
            history=history,
            k=k,
            exclude_item_ids=exclude_item_ids,
            request_time=request_time,
            explain=explain,
            filter=filter,
            allow_seen=allow_seen,
            new_item_slots=new_item_slots,
            not_shown_within=not_shown_within,
            view=view,
            bucket_key=bucket_key,
            model_version=model_version,
            request_id=request_id,
            rules=rules,
        )
        return self._call(self._stub.Recommend, request)

    def record_events(self, events: Iterable[UserEvent]) -> Recorded:
        """Stores events; they are on the server's disk when the answer comes. Event ids that it knows are skipped."""
        return self._call(self._stub.RecordEvents, RecordEventsRequest(events=events))

    def record_impressions(self, impressions: Iterable[Impression]) -> Shown:
        """Notes which items of answers were really shown, at most 1,000. Those that the server knows are skipped."""
        return self._call(self._stub.RecordImpressions, RecordImpressionsRequest(impressions=impressions))

    def get_user_profile(self, user_id: str, page_size: int = 100, page_token: str = "") -> Profile:
        """The genre preferences of a stored user (on the first page), and a page of the positive events of the history;
        pages are as in `list_events`."""
        request = GetUserProfileRequest(user_id=user_id, page_size=page_size, page_token=page_token)
        return self._call(self._stub.GetUserProfile, request)

    def delete_user(self, user_id: str) -> Deleted:
        """Deletes all that is stored of a user."""
        return self._call(self._stub.DeleteUser, DeleteUserRequest(user_id=user_id))

    def list_events(self, user_id: str, page_size: int = 100, page_token: str = "") -> Listed:
        """A page of a user's events, newest first: at most `page_size` (1 to 1000), from where `page_token` says, the
        `next_page_token` of the page before ("": the first page)."""
        request = ListEventsRequest(user_id=user_id, page_size=page_size, page_token=page_token)
        return self._call(self._stub.ListEvents, request)

    def delete_events(self, user_id: str, event_ids: Iterable[str]) -> DeletedEvents:
        """Deletes those of a user's events that have these ids, 1 to 1000."""
        return self._call(self._stub.DeleteEvents, DeleteEventsRequest(user_id=user_id, event_ids=event_ids))

    def merge_users(self, source_user_id: str, target_user_id: str) -> Merged:
        """Makes all that is stored of the source the target's, as when a visitor logs in."""
        request = MergeUsersRequest(source_user_id=source_user_id, target_user_id=target_user_id)
        return self._call(self._stub.MergeUsers, request)

    def similar_items(
        self,
        item_id: str,
        k: int = 10,
        exclude_item_ids: Iterable[str] = (),
        filter: ItemFilter | None = None,
        view: ViewName = "basic",
        bucket_key: str = "",
        model_version: str = "",
    ) -> Similar:
        """The `k` items (1 to 1000) most similar to one item, without those of `exclude_item_ids`, of those that
        `filter` allows (None: of all). `view` is as of `recommend_request`. `bucket_key`, such as a user's id, or
        `model_version` says which model version answers ("": the main one)."""
        request = SimilarItemsRequest(
            item_id=item_id,
            k=k,
            exclude_item_ids=exclude_item_ids,
            filter=filter,
            view=VIEWS[view],
            bucket_key=bucket_key,
            model_version=model_version,
        )
        return self._call(self._stub.SimilarItems, request)

    def trending(
        self,
        k: int = 10,
        window: "TrendWindow.ValueType" = TrendWindow.TREND_WINDOW_DAY,
        exclude_item_ids: Iterable[str] = (),
        filter: ItemFilter | None = None,
        view: ViewName = "basic",
    ) -> Trended:
        """The `k` items (1 to 1000) that most users interact with now, without those of `exclude_item_ids`, of those
        that `filter` allows (None: of all), if asked for with their metadata. An event loses half of its weight in a
        `window`."""
        request = TrendingRequest(
            k=k, window=window, exclude_item_ids=exclude_item_ids, filter=filter, view=VIEWS[view]
        )
        return self._call(self._stub.Trending, request)

    def upsert_items(self, items: Iterable[Item]) -> Upserted:
        """Stores items, at most 1,000; they are on the server's disk when the answer comes. Each replaces the one with
        its id as a whole."""
        return self._call(self._stub.UpsertItems, UpsertItemsRequest(items=items))

    def delete_items(self, item_ids: Iterable[str]) -> DeletedItems:
        """Deletes what was stored of items, 1 to 1000."""
        return self._call(self._stub.DeleteItems, DeleteItemsRequest(item_ids=item_ids))

    def get_item(self, item_id: str) -> GotItem:
        """One item, as the store has it, or else as the model directory has it."""
        return self._call(self._stub.GetItem, GetItemRequest(item_id=item_id))

    def list_items(self, page_size: int = 100, page_token: str = "", stored_only: bool = False) -> ListedItems:
        """A page of the items of the store and of the model directory, by their ids: at most `page_size` (1 to 1000),
        from where `page_token` says, the `next_page_token` of the page before ("": the first page)."""
        request = ListItemsRequest(page_size=page_size, page_token=page_token, stored_only=stored_only)
        return self._call(self._stub.ListItems, request)

    def get_model_info(self, model_version: str = "") -> Info:
        """What the server says of a loaded model version; "": the one that answers most users."""
        return self._call(self._stub.GetModelInfo, GetModelInfoRequest(model_version=model_version))

    def _batch(self, requests: Iterable[RecommendRequest]) -> Any:
        return self._call(self._stub.BatchRecommend, BatchRecommendRequest(requests=requests))

    def _check(self) -> Any:
        return self._health.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout_s)

    def _call(self, method: Any, request: Any) -> Any:
        return method(request, timeout=self._timeout_s, metadata=self._metadata)


def unpacked(response: BatchRecommendResponse) -> list[RecommendResponse | Status]:
    """What became of each question."""
    return [one.error if one.HasField("error") else one.response for one in response.results]


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    """What a health check says."""
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
