"""The client for asyncio, whose calls are awaited.

async with AsyncRecommenderClient("127.0.0.1:50051") as client:
    answers = await asyncio.gather(*(client.recommend(user_id=user) for user in users))
"""

from collections.abc import Awaitable, Iterable
from typing import Any, Self

from serve.client.connection import Connection
from serve.client.requests import Requests, is_serving, unpacked
from serve.pb import recommender_pb2 as pb


class AsyncRecommenderClient(
    Requests[
        Awaitable[pb.RecommendResponse],
        Awaitable[pb.RecordEventsResponse],
        Awaitable[pb.GetUserProfileResponse],
        Awaitable[pb.DeleteUserResponse],
        Awaitable[pb.SimilarItemsResponse],
        Awaitable[pb.GetModelInfoResponse],
        Awaitable[pb.ListEventsResponse],
        Awaitable[pb.DeleteEventsResponse],
        Awaitable[pb.MergeUsersResponse],
        Awaitable[pb.RecordImpressionsResponse],
        Awaitable[pb.UpsertItemsResponse],
        Awaitable[pb.DeleteItemsResponse],
        Awaitable[pb.GetItemResponse],
        Awaitable[pb.ListItemsResponse],
        Awaitable[pb.TrendingResponse],
    ]
):
    """As `RecommenderClient`, with every call awaited. Close it, or use `async with`."""

    def _open(self, connection: Connection) -> Any:
        return connection.async_channel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and the calls under way."""
        await self._channel.close(None)

    async def batch_recommend(self, requests: Iterable[pb.RecommendRequest]) -> list[pb.RecommendResponse | pb.Status]:
        """The answers to several questions (`recommend_request`, at most 256) in their order; in place of an
        answer, why there is none."""
        return unpacked(await self._batch(requests))

    async def is_serving(self) -> bool:
        """Whether the server says that it is ready; raises `grpc.RpcError` when it cannot be reached."""
        return is_serving(await self._check())
