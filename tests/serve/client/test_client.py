"""The client's own part: deadlines, repetitions, and no ambiguous question."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from serve.client import AsyncRecommenderClient, Item, RecommenderClient, UserEvent, recommend_request
from serve.pb import recommender_pb2_grpc
from serve.pb.recommender_pb2 import (
    GetModelInfoRequest,
    GetModelInfoResponse,
    RecordEventsRequest,
    RecordEventsResponse,
)
from tests.serve.answers import answered

TRIES_BEFORE_AVAILABLE = 2


class LateServicer(recommender_pb2_grpc.RecommenderServicer):
    """Unavailable for the first tries; counts them, and never answers a request for the model."""

    def __init__(self) -> None:
        self.tries = 0
        self.time_left_s: float | None = None

    def RecordEvents(self, request: RecordEventsRequest, context: grpc.ServicerContext) -> RecordEventsResponse:
        self.tries += 1
        if self.tries <= TRIES_BEFORE_AVAILABLE:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return RecordEventsResponse(recorded_count=len(request.events))

    def GetModelInfo(self, request: GetModelInfoRequest, context: grpc.ServicerContext) -> GetModelInfoResponse:
        self.time_left_s = context.time_remaining()
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no")


@pytest.fixture
def servicer() -> LateServicer:
    return LateServicer()


@pytest.fixture
def late_client(servicer: LateServicer) -> Iterator[RecommenderClient]:
    server = grpc.server(ThreadPoolExecutor(2))
    recommender_pb2_grpc.add_RecommenderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with RecommenderClient(f"127.0.0.1:{port}", timeout_s=20) as client:
        yield client
    server.stop(0).wait()


def test_unavailable_is_tried_again(late_client: RecommenderClient, servicer: LateServicer) -> None:
    event = UserEvent(event_id="1", user_id="u", item_id="i", timestamp=1)
    assert late_client.record_events([event]).recorded_count == 1
    assert servicer.tries == TRIES_BEFORE_AVAILABLE + 1


def test_other_errors_are_not_tried_again_and_every_call_has_a_deadline(
    late_client: RecommenderClient, servicer: LateServicer
) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        late_client.get_model_info()
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert servicer.time_left_s is not None
    # gRPC rounds what is left up, and reads more than one clock.
    assert 0 < servicer.time_left_s < 21


def test_no_server_listens() -> None:
    # Port 1 is reserved, and nothing answers there.
    with RecommenderClient("127.0.0.1:1", timeout_s=0.5) as client, pytest.raises(grpc.RpcError) as failure:
        client.get_model_info()
    assert failure.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


def test_a_question_is_for_somebody(client: RecommenderClient) -> None:
    with pytest.raises(ValueError, match="expected user_id, history or both"):
        client.recommend(k=3)


def test_the_async_client_asks_the_same(client: RecommenderClient, address: str) -> None:
    async def ask() -> None:
        async with AsyncRecommenderClient(address, timeout_s=30) as same:
            assert await same.is_serving()
            event = UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1)
            assert (await same.record_events([event])).recorded_count == 1
            assert (await same.get_user_profile("u")).event_count == 1
            assert await same.get_model_info() == client.get_model_info()
            assert await same.similar_items("1007", 3) == client.similar_items("1007", 3)
            answers = await asyncio.gather(*(same.recommend(user_id="u", k=1 + at) for at in range(20)))
            expected = [one.item_id for one in client.recommend(user_id="u", k=20).recommendations]
            for at, answer in enumerate(answers):
                assert [one.item_id for one in answer.recommendations] == expected[: 1 + at]
            (batched,) = answered(await same.batch_recommend([recommend_request(user_id="u", k=3)]))
            assert [one.item_id for one in batched.recommendations] == expected[:3]
            assert (await same.record_impressions([])).recorded_count == 0
            assert await same.list_events("u") == client.list_events("u")
            assert (await same.merge_users("u", "v")).merged_event_count == 1
            assert (await same.delete_events("v", ["1"])).deleted_event_count == 1
            assert (await same.record_events([event])).recorded_count == 1
            assert (await same.delete_user("u")).deleted_event_count == 1
            assert (await same.upsert_items([Item(item_id="1007")])).created_count == 1
            assert await same.get_item("1007") == client.get_item("1007")
            assert await same.list_items() == client.list_items()
            assert (await same.delete_items(["1007"])).deleted_count == 1
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await same.get_user_profile("u")
            assert failure.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(ask())


def test_the_async_client_tries_again_too(late_client: RecommenderClient, servicer: LateServicer) -> None:
    async def record() -> int:
        async with AsyncRecommenderClient(late_client.address, timeout_s=20) as same:
            event = UserEvent(event_id="1", user_id="u", item_id="i", timestamp=1)
            return (await same.record_events([event])).recorded_count

    assert asyncio.run(record()) == 1
    assert servicer.tries == TRIES_BEFORE_AVAILABLE + 1
