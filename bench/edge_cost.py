"""What stands around every call costs, in microseconds: decoding apart, as that is paid with or without it.

    python bench/edge_cost.py

Medians of several rounds in one process without a network: the path of `serve.front.calls` (message, request id, gate,
metrics, status) beside the bare handler, the check of a token among ten, the counters of an answer, and a draw of ten
items from a hundred.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from serve.front.auth import Tokens
from serve.front.calls import Calls, Method
from serve.front.gate import Gate
from serve.model.exploration import Exploration
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import RecommendRequest, RecommendResponse

ROUNDS, CALLS = 15, 10_000
MESSAGE = RecommendRequest(user_id="u", k=10).SerializeToString()
ANSWER = RecommendResponse()


class Context:
    """What the path asks of gRPC's context."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("user-agent", "grpc-python/1.85.1 grpc-c/54.0.0 (linux; chttp2)"),)

    def time_remaining(self) -> float:
        return 10.0

    async def read(self) -> bytes:
        return MESSAGE

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        # At once: the client has its answer.
        callback(self)


def microseconds(call: Callable[[], object]) -> float:
    """Median over the rounds of the mean of a call."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(rounds)


async def around(metrics: Metrics) -> float:
    """Microseconds of a call on its path, with what it answers."""
    gate, context = Gate(), Context()
    gate.open()
    name = "/jaxrec.v1.Recommender/Recommend"
    method = Method(name, RecommendRequest.FromString, lambda *_: ANSWER, RecommendResponse.SerializeToString)
    details: Any = SimpleNamespace(method=name)
    answer: Any = Calls([method], gate, metrics).service(details).stream_unary
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            await answer(None, context)
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(rounds)


def main() -> None:
    metrics = Metrics()
    without = microseconds(lambda: (RecommendRequest.FromString(MESSAGE), ANSWER.SerializeToString()))
    with_calls = asyncio.run(around(metrics))
    tokens = Tokens({f"token-number-{number:05}": ["read"] for number in range(10)})
    metadata = (("authorization", "Bearer token-number-00007"),)
    items = np.arange(1, 11, dtype=np.int32)
    metrics.serving([("v", "reinforce", 0.0, 10_000)])
    scores = np.linspace(3, 0, 100, dtype=np.float32)
    exploration = Exploration(0.5)
    rows = {
        "around every call: message, gate, metrics, status": with_calls - without,
        "counters of an answer": microseconds(lambda: metrics.answered("reinforce", items)),
        "token, one of ten (where tokens are asked for)": microseconds(lambda: tokens.check("read", metadata)),
        "draw of 10 from 100 (where the server explores)": microseconds(lambda: exploration.draw(scores, 10)),
    }
    for name, cost in rows.items():
        print(f"{name:<50} {cost:6.1f} µs")


if __name__ == "__main__":
    main()
