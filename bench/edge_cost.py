"""What stands around every call costs, in microseconds: decoding apart, as that is paid with or without it.

    python bench/edge_cost.py

Medians of several rounds in one process without a network: the wrapper of `serve.front.calls` (request id, metrics,
status) beside the bare handler, the check of a token among ten, the counters of an answer, and a draw of ten items from
a hundred.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np

from serve.front.auth import TokenInterceptor, Tokens
from serve.front.calls import Calls
from serve.model.exploration import Exploration
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import RecommendRequest, RecommendResponse

ROUNDS, CALLS = 15, 10_000


class Context:
    """What the wrapper asks of gRPC's context."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("user-agent", "grpc-python/1.85.1 grpc-c/54.0.0 (linux; chttp2)"),)

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    def code(self) -> None:
        return None


def microseconds(call: Callable[[], object]) -> float:
    """Median over the rounds of the mean of a call."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(rounds)


def main() -> None:
    metrics, context = Metrics(), Context()
    message = RecommendRequest(user_id="u", k=10).SerializeToString()
    answer = RecommendResponse()
    bare = grpc.unary_unary_rpc_method_handler(
        lambda request, context: answer, RecommendRequest.FromString, RecommendResponse.SerializeToString
    )
    calls = Calls(metrics)
    details: Any = SimpleNamespace(method="/jaxrec.v1.Recommender/Recommend", invocation_metadata=())
    wrapped = calls.intercept_service(lambda _: bare, details)
    assert bare.unary_unary is not None
    assert wrapped is not None
    assert wrapped.unary_unary is not None
    without = microseconds(lambda: bare.unary_unary(RecommendRequest.FromString(message), context))
    with_calls = microseconds(
        lambda: calls.intercept_service(lambda _: bare, details).unary_unary(message, context)  # type: ignore[union-attr,misc]
    )
    tokens = {f"token-number-{number:05}": ["read"] for number in range(10)}
    asked: Any = SimpleNamespace(
        method=details.method, invocation_metadata=(("authorization", "Bearer token-number-00007"),)
    )
    security = TokenInterceptor(Tokens(tokens), metrics)
    items = np.arange(1, 11, dtype=np.int32)
    metrics.serving([("v", "reinforce", 0.0, 10_000)])
    scores = np.linspace(3, 0, 100, dtype=np.float32)
    exploration = Exploration(0.5)
    rows = {
        "around every call: request id, metrics, status": with_calls - without,
        "counters of an answer": microseconds(lambda: metrics.answered("reinforce", items)),
        "token, one of ten (where tokens are asked for)": microseconds(
            lambda: security.intercept_service(lambda _: bare, asked)
        ),
        "draw of 10 from 100 (where the server explores)": microseconds(lambda: exploration.draw(scores, 10)),
    }
    for name, cost in rows.items():
        print(f"{name:<50} {cost:6.1f} µs")


if __name__ == "__main__":
    main()
