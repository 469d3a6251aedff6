"""A server that ends under load: a client that repeats what was UNAVAILABLE sees no failure."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client import RecommenderClient, UserEvent
from serve.front.server import create_server
from serve.model.recommender import Recommender
from serve.pb.recommender_pb2 import GetModelInfoRequest, RecommendRequest, RecordEventsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.stores.base import EventStore
from tests.ports import reserved_port
from tests.serve.one_model import one_model
from tests.serve.process import running_server

DEADLINE_S = 30.0
CALLERS = 6


def event(caller: int, number: int) -> UserEvent:
    return UserEvent(event_id=f"{caller}-{number}", user_id=str(caller), item_id="1007", timestamp=number + 1)


def repeated_while_unavailable(call: Callable[..., object], request: object) -> None:
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            call(request, timeout=DEADLINE_S)
            return
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                raise
            if "failed to connect" in error.details():
                # Nobody is there: leave the processor to the server that starts.
                threading.Event().wait(0.05)


def call_until_failure(call: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        call()


def test_no_call_fails_over_a_restart(model_directory: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    done = [0] * CALLERS

    def call(address: str, caller: int) -> None:
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = RecommenderStub(channel)
            while not stop.is_set():
                number = done[caller]
                repeated_while_unavailable(stub.RecordEvents, RecordEventsRequest(events=[event(caller, number)]))
                repeated_while_unavailable(stub.Recommend, RecommendRequest(user_id=str(caller)))
                done[caller] += 1

    def wait_for_more(count: int) -> None:
        goals = [so_far + count for so_far in done]
        end = time.monotonic() + DEADLINE_S
        while any(so_far < goal for so_far, goal in zip(done, goals, strict=True)):
            assert time.monotonic() < end, "the calls don't get on"
            assert not any(caller.done() for caller in callers), [caller.exception() for caller in callers]
            time.sleep(0.01)

    options = ["--drain", "300"]
    address = "127.0.0.1:0"
    callers = []
    with ThreadPoolExecutor(CALLERS) as threads:
        try:
            for _ in range(2):
                with running_server(
                    model_directory, tmp_path / "s", address=address, provider="cpu", options=options
                ) as server:
                    if not callers:
                        address = server.address
                        callers = [threads.submit(call, address, caller) for caller in range(CALLERS)]
                    wait_for_more(10)
                    with grpc.insecure_channel(address) as channel:
                        # A stream that stays open must not keep the server from ending.
                        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
                        server.process.send_signal(signal.SIGTERM)
                        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
                        assert server.process.wait(DEADLINE_S) == 0
            with running_server(model_directory, tmp_path / "s", address=address, provider="cpu") as server:
                wait_for_more(5)
                stop.set()
                for caller in callers:
                    caller.result(DEADLINE_S)
                with RecommenderClient(address) as client:
                    for caller, count in enumerate(done):
                        assert client.get_user_profile(str(caller)).event_count == count
        finally:
            stop.set()


def test_a_server_that_is_to_end_while_it_loads_never_serves(model_directory: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    manifest = model / "manifest.json"
    manifest.rename(tmp_path / "manifest.json")
    # Whoever reads it waits until somebody writes.
    os.mkfifo(manifest)
    command = [sys.executable, "-m", "serve", "run", str(model), "--store", str(tmp_path / "s"), "--provider", "cpu"]
    with (
        reserved_port() as port,
        subprocess.Popen([*command, "--address", f"127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True) as process,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        try:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=2 * DEADLINE_S
            )
            statuses = [next(watch).status]
            process.send_signal(signal.SIGTERM)
            with manifest.open("wb") as waited_for:
                waited_for.write((tmp_path / "manifest.json").read_bytes())
                (tmp_path / "manifest.json").rename(manifest)
            with pytest.raises(grpc.RpcError):
                statuses += [answer.status for answer in watch]
            assert set(statuses) == {health_pb2.HealthCheckResponse.NOT_SERVING}
            assert process.stdout is not None
            assert (process.wait(DEADLINE_S), process.stdout.read()) == (0, "")
        finally:
            process.kill()


def test_new_calls_are_turned_away_while_those_under_way_finish(model: Recommender, store: EventStore) -> None:
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    begun, goes_on = threading.Event(), threading.Event()
    record = store.record

    def slow_record(events: object) -> object:
        begun.set()
        assert goes_on.wait(DEADLINE_S)
        return record(events)  # type: ignore[arg-type]

    store.record = slow_record  # type: ignore[method-assign, assignment]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = RecommenderStub(channel)
        under_way = stub.RecordEvents.future(RecordEventsRequest(events=[event(0, 0)]), timeout=DEADLINE_S)
        assert begun.wait(DEADLINE_S)
        finishing = threading.Thread(target=server.finish_calls)
        finishing.start()
        health = health_pb2_grpc.HealthStub(channel)
        end = time.monotonic() + DEADLINE_S
        while health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < end
        with pytest.raises(grpc.RpcError) as failure:
            call_until_failure(lambda: stub.GetModelInfo(GetModelInfoRequest(), timeout=DEADLINE_S))
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in failure.value.details()
        assert finishing.is_alive()
        goes_on.set()
        assert under_way.result(DEADLINE_S).recorded_count == 1
        finishing.join(DEADLINE_S)
        assert not finishing.is_alive()
    server.drain()


def test_a_call_that_takes_too_long_does_not_hold_the_end(model: Recommender, store: EventStore) -> None:
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    begun, goes_on = threading.Event(), threading.Event()

    def stuck_record(events: object) -> object:
        begun.set()
        assert goes_on.wait(DEADLINE_S)
        return []

    store.record = stuck_record  # type: ignore[method-assign, assignment]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        under_way = RecommenderStub(channel).RecordEvents.future(
            RecordEventsRequest(events=[event(0, 0)]), timeout=DEADLINE_S
        )
        assert begun.wait(DEADLINE_S)
        assert not server.finish_calls(timeout_s=0.1)
        assert not under_way.done()
        goes_on.set()
        server.drain()


def test_the_end_writes_the_log_and_the_spans_and_waits_for_no_exit_handler_of_others() -> None:
    program = """
import atexit, logging, sys, threading
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from serve.front.lifecycle import leave_process
from serve.observability.logs import start_logging
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
atexit.register(threading.Event().wait)
start_logging(logging.Formatter("%(message)s"))
with trace.get_tracer("test").start_as_current_span("the last span"):
    logging.info("the last line")
leave_process(3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (ended.returncode, ended.stderr) == (3, "the last line\n")
    assert "the last span" in ended.stdout


def test_an_exporter_that_fails_does_not_hold_the_end() -> None:
    program = """
import logging, threading
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from serve.front.lifecycle import leave_process
from serve.observability.logs import start_logging
class Fails(SpanProcessor):
    def shutdown(self):
        raise OSError("no collector")
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(Fails())
threading.Thread(target=threading.Event().wait).start()
start_logging(logging.Formatter("%(message)s"))
print("the last output")
leave_process()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (ended.returncode, ended.stdout) == (0, "the last output\n")
    assert ended.stderr.startswith("the last spans could not be exported\nTraceback")
    assert ended.stderr.endswith("OSError: no collector\n")
