"""A typed client. Every call has a deadline, and is repeated with backoff while the server is unavailable.

    with RecommenderClient("127.0.0.1:50051") as client:
        history = [Event(item_id="1", rating=4.0, timestamp=964982703)]
        for item in client.recommend(history=history, k=5).recommendations:
            print(item.title, item.score)

A call that fails raises `grpc.RpcError`, with the status in `code()` and the reason in `details()`.
"""

import json
from collections.abc import Iterable
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.pb.recommender_pb2 import (
    Event,
    GetModelInfoRequest,
    GetModelInfoResponse,
    GetUserProfileRequest,
    GetUserProfileResponse,
    History,
    RecommendRequest,
    RecommendResponse,
    RecordEventsRequest,
    RecordEventsResponse,
    SimilarItemsRequest,
    SimilarItemsResponse,
    UserEvent,
)
from serve.pb.recommender_pb2_grpc import RecommenderStub

__all__ = ["Event", "RecommenderClient", "UserEvent"]

# Each call can be repeated: RecordEvents counts an event id once, and the others change nothing.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "jaxrec.v1.Recommender"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


class RecommenderClient:
    """A connection to one server, to be shared between threads. Close it, or use it in a `with` statement."""

    def __init__(self, address: str, timeout_s: float = 5.0) -> None:
        """Connects when first used. `timeout_s` seconds is the deadline of a call with its repetitions."""
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=[("grpc.service_config", SERVICE_CONFIG)])
        self._stub = RecommenderStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and the calls under way."""
        self._channel.close()

    def recommend(
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
        if (user_id is None) == (history is None):
            raise ValueError("expected user_id or history, and not both")
        request = RecommendRequest(k=k, exclude_item_ids=exclude_item_ids, request_time=request_time, explain=explain)
        if user_id is not None:
            request.user_id = user_id
        else:
            request.history.CopyFrom(History(events=history))
        return self._stub.Recommend(request, timeout=self._timeout_s)

    def record_events(self, events: Iterable[UserEvent]) -> RecordEventsResponse:
        """Stores events, as `Recommender.RecordEvents`; they are on disk when this returns."""
        return self._stub.RecordEvents(RecordEventsRequest(events=events), timeout=self._timeout_s)

    def get_user_profile(self, user_id: str, limit: int = 10) -> GetUserProfileResponse:
        """Watch list and genre preferences of a stored user, as `Recommender.GetUserProfile`."""
        request = GetUserProfileRequest(user_id=user_id, limit=limit)
        return self._stub.GetUserProfile(request, timeout=self._timeout_s)

    def similar_items(self, item_id: str, k: int = 10) -> SimilarItemsResponse:
        """The `k` items most like one item, as `Recommender.SimilarItems`."""
        return self._stub.SimilarItems(SimilarItemsRequest(item_id=item_id, k=k), timeout=self._timeout_s)

    def get_model_info(self) -> GetModelInfoResponse:
        """Which model answers, as `Recommender.GetModelInfo`."""
        return self._stub.GetModelInfo(GetModelInfoRequest(), timeout=self._timeout_s)

    def is_serving(self) -> bool:
        """Whether the server says that it is healthy; raises `grpc.RpcError` when it cannot be reached."""
        response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout_s)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
