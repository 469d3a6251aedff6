"""The client whose calls return answers."""

from collections.abc import Iterable
from typing import Any, Self

from serve.client.connection import Connection
from serve.client.requests import Requests, is_serving, unpacked
from serve.pb import recommender_pb2 as pb


class RecommenderClient(
    Requests[
        pb.RecommendResponse,
        pb.RecordEventsResponse,
        pb.GetUserProfileResponse,
        pb.DeleteUserResponse,
        pb.SimilarItemsResponse,
        pb.GetModelInfoResponse,
        pb.ListEventsResponse,
        pb.DeleteEventsResponse,
        pb.MergeUsersResponse,
        pb.RecordImpressionsResponse,
        pb.UpsertItemsResponse,
        pb.DeleteItemsResponse,
        pb.GetItemResponse,
        pb.ListItemsResponse,
        pb.TrendingResponse,
    ]
):
    """A connection to one server, to be shared between threads. Close it, or use it in a `with` statement.

    Its calls raise `grpc.RpcError`.
    """

    def _open(self, connection: Connection) -> Any:
        return connection.channel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and the calls under way."""
        self._channel.close()

    def batch_recommend(self, requests: Iterable[pb.RecommendRequest]) -> list[pb.RecommendResponse | pb.Status]:
        """The answers to several questions (`recommend_request`, at most 256) in their order; in place of an
        answer, why there is none."""
        return unpacked(self._batch(requests))

    def is_serving(self) -> bool:
        """Whether the server says that it is ready; raises `grpc.RpcError` when it cannot be reached."""
        return is_serving(self._check())
