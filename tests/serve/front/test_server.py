"""The server around the servicer: health, reflection, start, shutdown, and what a client learns of a failure."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from serve.api import recommender
from serve.api.errors import status_of
from serve.api.recommender import RecommenderServicer
from serve.api.service import RecommenderService
from serve.client import Event, RecommenderClient, UserEvent, recommend_request
from serve.front.server import SERVICE, SERVICES, AddressError, create_server
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb.model_admin_pb2 import ListModelsRequest, LoadModelRequest
from serve.pb.model_admin_pb2_grpc import ModelAdminStub
from serve.pb.open_inference_pb2 import (
    ModelInferRequest,
    ModelMetadataRequest,
    ServerLiveRequest,
    ServerReadyRequest,
)
from serve.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from serve.pb.recommender_pb2 import GetModelInfoRequest, RecommendRequest, RecordEventsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.loaded import LoadedModel
from serve.serving.loading import ModelLoader, open_models
from serve.stores import open_store
from serve.stores.base import EventStore
from tests.serve.one_model import one_model
from tests.serve.process import StartError, running_server

TIMEOUT_S = 30
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ONE_EVENT = RecordEventsRequest(events=[UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1)])


def test_model_info(client: RecommenderClient, model: Recommender) -> None:
    info = client.get_model_info()
    assert info.model_version == model.info.model_version
    assert info.policy == "reinforce"
    assert info.created_time == datetime.fromisoformat(model.info.created).timestamp() > 0
    assert info.item_count == len(model.catalog)
    assert (info.rating_scale.minimum, info.rating_scale.maximum) == (0.5, 5.0)
    assert tuple(info.genres) == model.info.genres
    assert info.execution_provider == "CPUExecutionProvider"
    assert (info.max_history, info.limits.max_k) == (50, 1000)


def test_health(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            response = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as failure:
            health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=TIMEOUT_S)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_watchers_are_notified_of_the_end(model: Recommender, store: EventStore) -> None:
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        draining = threading.Thread(target=server.drain, args=[0.1])
        draining.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        draining.join(TIMEOUT_S)
        assert not draining.is_alive()


def test_reflection(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "jaxrec.v1.Recommender",
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        file = database.FindFileContainingSymbol(SERVICE)
        inference = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    assert file.package == "jaxrec.v1"
    methods = {method.name for service in file.service for method in service.method}
    assert methods == {
        "Recommend",
        "BatchRecommend",
        "RecordEvents",
        "RecordImpressions",
        "GetUserProfile",
        "ListEvents",
        "DeleteUser",
        "DeleteEvents",
        "MergeUsers",
        "SimilarItems",
        "Trending",
        "GetModelInfo",
        "UpsertItems",
        "DeleteItems",
        "GetItem",
        "ListItems",
    }
    assert {method.name for service in inference.service for method in service.method} == {
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelInfer",
    }


def test_a_port_in_use_is_refused(model: Recommender, store: EventStore, address: str) -> None:
    with pytest.raises(AddressError, match=f"cannot listen on {address}"):
        create_server(one_model(model, store), store, address)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x", "127.0.0.1:-1"])
def test_bad_address(model: Recommender, store: EventStore, address: str) -> None:
    with pytest.raises(AddressError, match=f"expected HOST:PORT with a port in 0..65535, came {address}"):
        create_server(one_model(model, store), store, address)


def wait_until_under_way(log: Path) -> None:
    """Returns when the server's metrics, whose address is in its log, say that a call is being answered."""
    address = next(line["address"] for line in map(json.loads, log.read_text().splitlines()) if "address" in line)
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as response:
            if "\njaxrec_rpcs_under_way 1.0\n" in response.read().decode():
                return
    raise AssertionError("no call is under way")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_server_once_the_calls_under_way_are_answered(
    model_directory: Path, model: Recommender, tmp_path: Path, number: signal.Signals
) -> None:
    log, options = tmp_path / "log", ["--metrics", "127.0.0.1:0"]
    with (
        log.open("w") as stream,
        running_server(model_directory, tmp_path / "s", provider="cpu", options=options, stderr=stream) as server,
    ):
        assert server.line == (
            f"serving {model.info.model_version} on {server.address} (provider CPUExecutionProvider, search exact)"
        )
        # Recording waits for this writer, so the call is under way until it is done.
        other_writer = sqlite3.connect(tmp_path / "s", isolation_level=None)
        other_writer.execute("BEGIN IMMEDIATE")
        with grpc.insecure_channel(server.address) as channel:
            stub = RecommenderStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            recording = stub.RecordEvents.future(ONE_EVENT, timeout=TIMEOUT_S)
            wait_until_under_way(log)
            server.process.send_signal(number)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            assert not recording.done()
            other_writer.execute("ROLLBACK")
            assert recording.result(TIMEOUT_S).recorded_count == 1
        other_writer.close()
        assert server.process.wait(TIMEOUT_S) == 0


def test_no_server_from_a_broken_model(model_directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", "run", str(tmp_path / "nowhere"), "--address", "127.0.0.1:0"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == f"Error: {tmp_path}/nowhere: cannot be read: No such file or directory\n"
    with pytest.raises(StartError), running_server(tmp_path / "nowhere", tmp_path / "s"):
        pass


def test_broken_store_is_unavailable_and_hides_its_path(stub: RecommenderStub, store: EventStore) -> None:
    """Another writer holds the file for longer than the store waits. `stub` does not repeat a call."""
    store._writer.execute("PRAGMA busy_timeout = 100")
    other = sqlite3.connect(store._path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(grpc.RpcError) as failure:
        stub.RecordEvents(ONE_EVENT, timeout=TIMEOUT_S)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert failure.value.details().startswith("the event store is not available, logged as ")
    other.execute("ROLLBACK")
    other.close()
    assert stub.RecordEvents(ONE_EVENT, timeout=TIMEOUT_S).recorded_count == 1


def test_unexpected_error_is_logged_under_an_id_and_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    status = status_of(KeyError("/secret/path"))
    assert status.code is grpc.StatusCode.INTERNAL
    text, log_id = status.message.rsplit(" ", 1)
    assert text == "internal error, logged as"
    (record,) = caplog.records
    assert log_id in record.getMessage()
    assert record.exc_info is not None
    assert "/secret/path" in str(record.exc_info[1])


def test_more_calls_than_may_wait_are_turned_away_at_once(model: Recommender, store: EventStore) -> None:
    server = create_server(one_model(model, store), store, "127.0.0.1:0", workers=1, max_calls=2)
    server.start()
    goes_on = threading.Event()
    record = store.record

    def slow_record(events: Sequence[Any]) -> Any:
        assert goes_on.wait(TIMEOUT_S)
        return record(events)

    store.record = slow_record  # type: ignore[method-assign]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = RecommenderStub(channel)
        calls = [stub.RecordEvents.future(ONE_EVENT, timeout=TIMEOUT_S) for _ in range(6)]
        ended = threading.Semaphore(0)
        for call in calls:
            call.add_done_callback(lambda _: ended.release())
        # One runs and one waits; the others know before the first has moved.
        for _ in range(4):
            assert ended.acquire(timeout=TIMEOUT_S)
        assert {call.code() for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        taken = [call for call in calls if not call.done()]
        goes_on.set()
        assert sorted(call.result(TIMEOUT_S).recorded_count for call in taken) == [0, 1]
    server.drain()


def test_the_port_is_open_before_the_model_is_loaded(
    model_directory: Path, model: Recommender, store: EventStore
) -> None:
    states = health_pb2.HealthCheckResponse
    with open_models(model_directory, ModelLoader(store, Metrics(), "cpu"), watch_s=0, load_now=False) as models:
        server = create_server(models, store, "127.0.0.1:0")
        server.listen()
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health_stub, stub = health_pb2_grpc.HealthStub(channel), RecommenderStub(channel)
            assert health_stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status == states.NOT_SERVING
            ready = GRPCInferenceServiceStub(channel).ServerReady(ServerReadyRequest(), timeout=TIMEOUT_S)
            assert not ready.ready
            request = RecommendRequest(user_id="u")
            with pytest.raises(grpc.RpcError) as failure:
                stub.Recommend(request, timeout=TIMEOUT_S)
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
            assert failure.value.details() == "the model is being loaded, try again"
            status, info = rpc_status.from_call(failure.value), error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert info.reason == "NOT_SERVING"
            models.open()
            server.start()
            assert health_stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status == states.SERVING
            answer = stub.Recommend(request, timeout=TIMEOUT_S)
            assert answer.model_version == model.info.model_version
        server.drain()


def test_a_call_that_would_end_its_thread_is_internal_and_the_server_lives_on(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(*_: object) -> None:
        raise SystemExit

    server = create_server(one_model(model, store), store, "127.0.0.1:0", workers=1)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = RecommenderStub(channel)
        # One in a thread of the pool, one in the loop.
        for target, call in (
            (store, lambda: stub.RecordEvents(ONE_EVENT, timeout=TIMEOUT_S)),
            (LoadedModel, lambda: stub.Recommend(RecommendRequest(user_id="u"), timeout=TIMEOUT_S)),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(target, "record" if target is store else "start", leave)
                with pytest.raises(grpc.RpcError) as failure:
                    call()
            assert failure.value.code() is grpc.StatusCode.INTERNAL
            assert "logged as" in failure.value.details()
            assert call() is not None
    server.drain()
    assert [record.levelname for record in caplog.records] == ["CRITICAL", "ERROR"] * 2


LOOPLESS = """
import sys
from serve.front import server
from serve.front.loop import shared_loop
from serve.cli.main import main

class Deadly(server.InferenceServicer):
    def ServerLive(self, request, context):
        shared_loop().loop.call_soon(sys.exit)
        return super().ServerLive(request, context)

server.InferenceServicer = Deadly
main()
"""


def test_a_server_whose_loop_fails_ends(model_directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOOPLESS, "run", str(model_directory), "--address", "127.0.0.1:0", "--drain", "5"]
    command += ["--store", str(tmp_path / "s"), "--provider", "cpu"]
    log = tmp_path / "log"
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().split(" on ")[1].split()[0]
        with grpc.insecure_channel(address) as channel:
            assert RecommenderStub(channel).RecordEvents(ONE_EVENT, timeout=TIMEOUT_S).recorded_count == 1
            live = GRPCInferenceServiceStub(channel).ServerLive.future(ServerLiveRequest(), timeout=TIMEOUT_S)
            assert process.wait(TIMEOUT_S) == 1
            live.cancel()
    critical = [line for line in map(json.loads, log.read_text().splitlines()) if line["level"] == "CRITICAL"]
    assert ["no call is answered any more" in line["message"] for line in critical] == [True]
    with open_store(tmp_path / "s") as store:
        assert len(store.history(ONE_EVENT.events[0].user_id)) == 1


def test_slow_calls_are_recognized_by_their_message(model: Recommender, store: EventStore) -> None:
    models = one_model(model, store)
    servicer = RecommenderServicer(RecommenderService(models, store, Metrics()))
    explained = recommend_request(user_id="u", explain=True)
    not_shown = recommend_request(user_id="u", not_shown_within=1)
    past = recommend_request(user_id="u", request_time=1)
    # As few write it, but protobuf reads it: another number for true, and more bytes than needed for it.
    odd = [recommend_request(user_id="u").SerializeToString() + field for field in (b"\x30\x02", b"\xb0\x00\x81\x00")]
    now = recommend_request(user_id="u", request_time=int(time.time()))
    assert not any(servicer.is_slow(one) for one in (RecommendRequest(), recommend_request(user_id="u"), now))
    assert all(servicer.is_slow(one) for one in (explained, not_shown, past, *map(RecommendRequest.FromString, odd)))


@pytest.mark.parametrize("count", [200, 2_000])
def test_a_long_history_is_decoded_in_a_thread(
    model: Recommender, store: EventStore, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    decode = recommender.decode_query

    def decoded(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return decode(*arguments)

    monkeypatch.setattr(recommender, "decode_query", decoded)
    item = model.catalog.item_ids[1]
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}") as client:
        client.recommend(history=[Event(item_id=item, timestamp=10**9 + at) for at in range(count)], k=3)
    server.drain()
    assert [name.startswith("grpc-slow") for name in threads] == [count > 1_000]


def test_a_history_as_of_an_earlier_time_is_not_read_by_the_loop(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    read = store.history

    def history(user_id: str, until: int | None = None):  # type: ignore[no-untyped-def]
        readers.append(threading.current_thread().name)
        return read(user_id, until)

    monkeypatch.setattr(store, "history", history)
    items = model.catalog.item_ids[1:9]
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}") as client:
        client.record_events(
            [UserEvent(event_id=item, user_id="u", item_id=item, timestamp=at) for at, item in enumerate(items, 100)]
        )
        for _ in range(3):
            # The state is right as of now, and takes no history.
            client.recommend(user_id="u", k=3)
        assert readers == []
        past = [client.recommend(user_id="u", k=3, request_time=102).recommendations for _ in range(5)]
        assert len(readers) == 5
        assert all(reader.startswith("grpc-slow") for reader in readers)
        sent = [Event(item_id=item, timestamp=at) for at, item in enumerate(items[:3], 100)]
        along = client.recommend(history=sent, k=3, request_time=102).recommendations
        assert [one.item_id for one in past[0]] == [one.item_id for one in along]
        # As of the newest event or later the state will do.
        client.recommend(user_id="u", k=3, request_time=107)
        client.recommend(user_id="u", k=3, request_time=int(time.time()))
        assert len(readers) == 5
    server.drain()


def test_a_server_on_a_unix_socket(model_directory: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/grpc.sock"
    with (
        running_server(model_directory, tmp_path / "s", address=address, provider="cpu") as server,
        grpc.insecure_channel(address) as channel,
    ):
        assert f" on {address} (" in server.line
        assert RecommenderStub(channel).RecordEvents(ONE_EVENT, timeout=TIMEOUT_S).recorded_count == 1


@pytest.mark.parametrize("value", ["x" * 20_000, "é" * 20_000])
def test_a_long_name_in_an_error_is_cut_and_the_status_stays(
    model_directory: Path, store: EventStore, value: str
) -> None:
    with open_models(model_directory, ModelLoader(store, Metrics(), "cpu"), watch_s=0) as models:
        server = create_server(models, store, "127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            inference = GRPCInferenceServiceStub(channel)
            calls: list[tuple[Any, Any, grpc.StatusCode]] = [
                (RecommenderStub(channel).GetModelInfo, GetModelInfoRequest(model_version=value), NOT_FOUND),
                (ModelAdminStub(channel).LoadModel, LoadModelRequest(model_version=value), NOT_FOUND),
                (inference.ModelInfer, ModelInferRequest(model_name=value), NOT_FOUND),
                (inference.ModelMetadata, ModelMetadataRequest(name=value), NOT_FOUND),
                (
                    inference.ModelInfer,
                    ModelInferRequest(
                        model_name="jaxrec", outputs=[ModelInferRequest.InferRequestedOutputTensor(name=value)]
                    ),
                    grpc.StatusCode.INVALID_ARGUMENT,
                ),
            ]
            for call, request, code in calls:
                with pytest.raises(grpc.RpcError) as failure:
                    call(request, timeout=TIMEOUT_S)
                assert failure.value.code() is code
                assert len(failure.value.details()) < 600
        server.drain()


def test_a_model_directory_that_is_gone_is_unavailable_to_admins(
    model_directory: Path, store: EventStore, tmp_path: Path
) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    with open_models(tmp_path / "model", ModelLoader(store, Metrics(), "cpu"), watch_s=0) as models:
        server = create_server(models, store, "127.0.0.1:0")
        server.start()
        shutil.rmtree(tmp_path / "model")
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(grpc.RpcError) as failure:
                ModelAdminStub(channel).ListModels(ListModelsRequest(), timeout=TIMEOUT_S)
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
            assert str(tmp_path) not in failure.value.details()
            # What is loaded is still served.
            assert RecommenderStub(channel).Recommend(RecommendRequest(user_id="u"), timeout=TIMEOUT_S).recommendations
        server.drain()
