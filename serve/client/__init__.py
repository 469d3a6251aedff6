"""Clients of the recommender service, for threads and for asyncio.

    from serve.client import Event, RecommenderClient

    with RecommenderClient("127.0.0.1:50051") as client:
        history = [Event(item_id="1", rating=4.0, timestamp=964982703)]
        for item in client.recommend(history=history, k=5).recommendations:
            print(item.title, item.score)

`RecommenderClient(Connection("recommender.example:443", tls=True, token=...))` encrypts and says who calls. Every call
has a deadline, and is repeated with backoff while the server is unavailable or overloaded. A call that fails raises
`grpc.RpcError`, with the status in `code()` and the reason in `details()`. In place of an answer of `batch_recommend`
there may be a `Status`, which says why there is none.
"""

from serve.client.aio import AsyncRecommenderClient
from serve.client.connection import Connection
from serve.client.requests import recommend_request
from serve.client.sync import RecommenderClient
from serve.pb.recommender_pb2 import (
    AppliedRule,
    Boost,
    Event,
    Impression,
    Item,
    ItemFilter,
    Part,
    Pin,
    Rules,
    Status,
    TrendWindow,
    UserEvent,
)

__all__ = [
    "AppliedRule",
    "AsyncRecommenderClient",
    "Boost",
    "Connection",
    "Event",
    "Impression",
    "Item",
    "ItemFilter",
    "Part",
    "Pin",
    "RecommenderClient",
    "Rules",
    "Status",
    "TrendWindow",
    "UserEvent",
    "recommend_request",
]
