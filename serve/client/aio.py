"""The client for asyncio: the same calls as `serve.client.sync`, awaited.

async with AsyncRecommenderClient("127.0.0.1:50051") as client:
    answers = await asyncio.gather(*(client.recommend(user_id=user) for user in users))
"""

from collections.abc import Iterable
from typing import Self

from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client.connection import Connection
from serve.client.sync import recommend_request
from serve.pb.recommender_pb2 import (
    BatchRecommendRequest,
    DeleteUserRequest,
    DeleteUserResponse,
    Event,
    GetModelInfoRequest,
    GetModelInfoResponse,
    GetUserProfileRequest,
    GetUserProfileResponse,
    RecommendRequest,
    RecommendResponse,
    RecordEventsRequest,
    RecordEventsResponse,
    SimilarItemsRequest,
    SimilarItemsResponse,
    UserEvent,
)
from serve.pb.recommender_pb2_grpc import RecommenderStub


class AsyncRecommenderClient:
    """As `serve.client.sync.RecommenderClient`, with every call awaited. Close it, or use `async with`."""

    def __init__(self, server: str | Connection, timeout_s: float = 5.0) -> None:
        """Connects when first used, to HOST:PORT without encryption and with this deadline, or as `server` says."""
        connection = Connection(server, timeout_s) if isinstance(server, str) else server
        self.address = connection.address
        self._timeout_s, self._metadata = connection.timeout_s, connection.metadata
        self._channel = connection.async_channel()
        self._stub = RecommenderStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and the calls under way."""
        await self._channel.close(None)

    async def recommend(
        self,
        *,
        user_id: str | None = None,
        history: Iterable[Event] | None = None,
        k: int = 10,
        exclude_item_ids: Iterable[str] = (),
        request_time: int | None = None,
        explain: bool = False,
    ) -> RecommendResponse:
        """The best `k` items for a stored user or for a history, as `Recommender.Recommend`.

        Raises ValueError unless exactly one of `user_id` and `history` is given.
        """
        request = recommend_request(
            user_id=user_id,
            history=history,
            k=k,
            exclude_item_ids=exclude_item_ids,
            request_time=request_time,
            explain=explain,
        )
        return await self._stub.Recommend(request, timeout=self._timeout_s, metadata=self._metadata)

    async def batch_recommend(self, requests: Iterable[RecommendRequest]) -> list[RecommendResponse]:
        """The answers to several questions (`recommend_request`) in their order, as `Recommender.BatchRecommend`."""
        request = BatchRecommendRequest(requests=requests)
        response = await self._stub.BatchRecommend(request, timeout=self._timeout_s, metadata=self._metadata)
        return list(response.responses)

    async def record_events(self, events: Iterable[UserEvent]) -> RecordEventsResponse:
        """Stores events, as `Recommender.RecordEvents`; they are on disk when this returns."""
        request = RecordEventsRequest(events=events)
        return await self._stub.RecordEvents(request, timeout=self._timeout_s, metadata=self._metadata)

    async def get_user_profile(self, user_id: str, limit: int = 10) -> GetUserProfileResponse:
        """Watch list and genre preferences of a stored user, as `Recommender.GetUserProfile`."""
        request = GetUserProfileRequest(user_id=user_id, limit=limit)
        return await self._stub.GetUserProfile(request, timeout=self._timeout_s, metadata=self._metadata)

    async def delete_user(self, user_id: str) -> DeleteUserResponse:
        """Forgets a user, as `Recommender.DeleteUser`."""
        request = DeleteUserRequest(user_id=user_id)
        return await self._stub.DeleteUser(request, timeout=self._timeout_s, metadata=self._metadata)

    async def similar_items(self, item_id: str, k: int = 10) -> SimilarItemsResponse:
        """The `k` items most like one item, as `Recommender.SimilarItems`."""
        request = SimilarItemsRequest(item_id=item_id, k=k)
        return await self._stub.SimilarItems(request, timeout=self._timeout_s, metadata=self._metadata)

    async def get_model_info(self, model_version: str = "") -> GetModelInfoResponse:
        """Which model answers, or one of several that do, as `Recommender.GetModelInfo`."""
        request = GetModelInfoRequest(model_version=model_version)
        return await self._stub.GetModelInfo(request, timeout=self._timeout_s, metadata=self._metadata)

    async def is_serving(self) -> bool:
        """Whether the server says that it is healthy; raises `grpc.RpcError` when it cannot be reached."""
        response = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout_s)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
