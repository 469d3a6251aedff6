"""`--processes N`: several processes that start, answer, count and end as one server."""

import json
import os
import resource
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.model_versions import add_version
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from serve.pb.model_admin_pb2 import (
    ListModelsRequest,
    LoadModelRequest,
    RollBackRequest,
    SetTrafficRequest,
    TrafficShare,
)
from serve.pb.model_admin_pb2_grpc import ModelAdminStub
from serve.pb.recommender_pb2 import GetModelInfoRequest, RecommendRequest, RecordEventsRequest, UserEvent
from serve.pb.recommender_pb2_grpc import RecommenderStub
from tests.serve.process import ServerProcess, running_server

PATIENCE_S = 60.0
POLL_S = 0.02
# Connections until both processes have one: the kernel chooses, so that fewer are enough nearly always.
MOST_CONNECTIONS = 200


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(POLL_S)


def read_to_end(reading: int) -> str:
    """What is in a pipe, once all others have closed it."""
    text, end = b"", time.monotonic() + PATIENCE_S
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        assert ready, "the pipe stays open"
        part = os.read(reading, 65_536)
        if not part:
            return text.decode()
        text += part


@dataclass
class Several:
    """A server of two processes, with its log."""

    server: ServerProcess
    log: Path

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def metric(self, name: str, **labels: str) -> float:
        (address,) = {line["address"] for line in self.lines() if "address" in line}
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_S) as response:
            families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples]
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    def said(self, start: str) -> list[tuple[int, str]]:
        """The processes and messages of the lines of the log that begin so."""
        lines = [(int(str(line["process"])), str(line["message"])) for line in self.lines()]
        return [(process, message) for process, message in lines if message.startswith(start)]

    def children(self) -> set[int]:
        """Those that loaded a model."""
        return {process for process, _ in self.said("loaded the model")}

    def replace(self, process_id: int, restarts: int = 1) -> int:
        """Kills a process; the one that came in its place, once both answer."""
        before = self.children()
        os.kill(process_id, signal.SIGKILL)
        wait_for(
            lambda: self.metric("jaxrec_process_restarts_total") == restarts and self.metric("jaxrec_processes") == 2
        )
        (new,) = self.children() - before
        return new


@contextmanager
def several(model: Path, folder: Path, *options: str) -> Iterator[Several]:
    log = folder / "log"
    options = ("--processes", "2", "--metrics", "127.0.0.1:0", *options)
    with (
        log.open("w") as stream,
        running_server(model, folder / "s", provider="cpu", options=options, stderr=stream) as server,
    ):
        yield Several(server, log)


def channels_to_both(stack: ExitStack, address: str) -> Sequence[grpc.Channel]:
    """A connection to each process: the first part of a call's id tells them apart."""
    found: dict[str, grpc.Channel] = {}
    for _ in range(MOST_CONNECTIONS):
        channel = stack.enter_context(grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]))
        _, call = RecommenderStub(channel).GetModelInfo.with_call(GetModelInfoRequest(), timeout=PATIENCE_S)
        found.setdefault(dict(call.trailing_metadata())["x-request-id"].split("-")[0], channel)
        if len(found) == 2:
            return list(found.values())
    raise AssertionError("all connections were to the same process")


def event(number: int, item_id: str) -> UserEvent:
    timestamp = 86_400 * number
    return UserEvent(event_id=str(number), user_id="ada", item_id=item_id, rating=4.0, timestamp=timestamp)


def test_processes_answer_and_count_as_one_server(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    ids = model.catalog.item_ids
    http = ("--http", "127.0.0.1:0")
    with several(model_directory, tmp_path, *http) as one, ExitStack() as stack:
        version, address = model.info.model_version, one.server.address
        _, _, rest = one.server.line.partition(f"serving {version} on {address} and ")
        url, _, how = rest.partition(" ")
        assert how == "(provider CPUExecutionProvider, search exact, 2 processes)"
        stubs = [RecommenderStub(channel) for channel in channels_to_both(stack, address)]
        # What one of them records is in the next answer of the other.
        for number in range(1, 11):
            writer, reader = stubs if number % 2 else reversed(stubs)
            writer.RecordEvents(RecordEventsRequest(events=[event(number, ids[number])]), timeout=PATIENCE_S)
            answer = reader.Recommend(RecommendRequest(user_id="ada", k=5), timeout=PATIENCE_S)
            history = [Event(ids[one], 4.0, 86_400 * one) for one in range(1, number + 1)]
            (expected,) = model.recommend([Query(history, 5)])
            assert [item.item_id for item in answer.recommendations] == [ids[item] for item in expected.items]
        method = {"method": "/jaxrec.v1.Recommender/Recommend"}
        assert one.metric("jaxrec_rpc_seconds_count", **method) == 10
        assert one.metric("jaxrec_rpc_seconds_bucket", le="+Inf", **method) == 10
        assert one.metric("jaxrec_recorded_events_total", result="recorded") == 10
        assert one.metric("jaxrec_processes") == 2
        assert one.metric("jaxrec_model_info") == 1
        request = urllib.request.Request(
            f"{url}/jaxrec.v1.Recommender/GetModelInfo", b"{}", {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            assert json.load(response)["modelVersion"] == version


def test_a_process_that_is_killed_is_replaced_and_what_it_counted_stays(model_directory: Path, tmp_path: Path) -> None:
    with several(model_directory, tmp_path) as one, ExitStack() as stack:
        for channel in channels_to_both(stack, one.server.address):
            RecommenderStub(channel).Recommend(RecommendRequest(user_id="ada"), timeout=PATIENCE_S)
        method = {"method": "/jaxrec.v1.Recommender/Recommend", "code": "OK"}
        assert one.metric("jaxrec_rpc_seconds_count", **method) == 2
        first = one.children()
        assert len(first) == 2
        # Recording waits for this writer: a call is under way in each.
        other_writer = sqlite3.connect(tmp_path / "s", isolation_level=None)
        stack.callback(other_writer.close)
        stubs = [RecommenderStub(channel) for channel in channels_to_both(stack, one.server.address)]
        other_writer.execute("BEGIN IMMEDIATE")
        recordings = [
            stub.RecordEvents.future(RecordEventsRequest(events=[event(at, "1007")]), timeout=PATIENCE_S)
            for at, stub in enumerate(stubs, 1)
        ]
        wait_for(lambda: one.metric("jaxrec_rpcs_under_way") == 2)
        os.kill(min(first), signal.SIGKILL)
        wait_for(lambda: any(recording.done() for recording in recordings))
        other_writer.execute("ROLLBACK")
        codes = {recording.exception(PATIENCE_S) and recording.code() for recording in recordings}
        assert codes == {None, grpc.StatusCode.UNAVAILABLE}
        wait_for(lambda: one.metric("jaxrec_process_restarts_total") == 1)
        assert one.metric("jaxrec_rpc_seconds_count", **method) == 2
        wait_for(lambda: one.metric("jaxrec_processes") == 2)
        assert len(one.children() - first) == 1
        channels_to_both(stack, one.server.address)
        assert any("ended with SIGKILL, another starts in 0.2 s" in str(line["message"]) for line in one.lines())


def test_no_process_outlives_a_supervisor_that_is_killed(model_directory: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        server = running_server(
            model_directory, tmp_path / "s", provider="cpu", options=["--processes", "2"], stderr=stream
        )
        started = server.__enter__()
    started.process.kill()
    # All of them have the other end of their log open, and nobody else has.
    assert "serving" in read_to_end(reading)
    os.close(reading)
    server.__exit__(None, None, None)
    host, _, port = started.address.rpartition(":")
    with socket.socket() as after:
        after.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        after.bind((host, int(port)))


@pytest.mark.parametrize(
    ("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_a_signal_ends_all_once_the_calls_under_way_are_answered(
    model_directory: Path, tmp_path: Path, number: signal.Signals, to_all: bool
) -> None:
    """To the supervisor, or as from systemd to all processes."""
    with several(model_directory, tmp_path) as one, ExitStack() as stack:
        # Recording waits for this writer, so the calls are under way until it is done.
        other_writer = sqlite3.connect(tmp_path / "s", isolation_level=None)
        stack.callback(other_writer.close)
        stubs = [RecommenderStub(channel) for channel in channels_to_both(stack, one.server.address)]
        other_writer.execute("BEGIN IMMEDIATE")
        recordings = [
            stub.RecordEvents.future(RecordEventsRequest(events=[event(at, "1007")]), timeout=PATIENCE_S)
            for at, stub in enumerate(stubs, 1)
        ]
        wait_for(lambda: one.metric("jaxrec_rpcs_under_way") == 2)
        for process_id in (*(one.children() if to_all else ()), one.server.process.pid):
            os.kill(process_id, number)
        other_writer.execute("ROLLBACK")
        assert [recording.result(PATIENCE_S).recorded_count for recording in recordings] == [1, 1]
        assert one.server.process.wait(PATIENCE_S) == 0


def test_a_process_that_cannot_start_ends_all_with_its_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", "run", str(tmp_path / "nowhere"), "--address", "127.0.0.1:0"]
    command += ["--processes", "2", "--store", str(tmp_path / "s")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == f"Error: {tmp_path}/nowhere: cannot be read: No such file or directory\n"


def test_a_signal_during_the_start_ends_all(model_directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", "run", str(model_directory), "--address", "127.0.0.1:0"]
    command += ["--processes", "2", "--store", str(tmp_path / "s"), "--metrics", "127.0.0.1:0"]
    reading, writing = os.pipe()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writing) as process:
        os.close(writing)
        ready, _, _ = select.select([reading], [], [], PATIENCE_S)
        # The first line, of the supervisor's metrics, comes before any process.
        assert ready
        process.send_signal(signal.SIGTERM)
        read_to_end(reading)
        assert process.wait(PATIENCE_S) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(reading)


def test_while_others_serve_a_process_that_cannot_load_is_tried_again(model_directory: Path, tmp_path: Path) -> None:
    versions, away = tmp_path / "versions", tmp_path / "away"
    add_version(versions, model_directory, "1")
    with several(versions, tmp_path, "--watch", "0") as one, ExitStack() as stack:
        versions.rename(away)
        os.kill(min(one.children()), signal.SIGKILL)
        why = f": {versions}: cannot be read: No such file or directory"
        wait_for(lambda: any(message.endswith(why) for _, message in one.said("a server process ended with exit")))
        channel = stack.enter_context(grpc.insecure_channel(one.server.address))
        # A connection that the ended process had in its queue is refused, and made again.
        assert (
            RecommenderStub(channel)
            .GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S, wait_for_ready=True)
            .model_version
            == "1"
        )
        away.rename(versions)
        wait_for(lambda: one.metric("jaxrec_processes") == 2)


def test_while_others_serve_a_process_that_the_system_has_no_room_for_is_tried_again(
    model_directory: Path, tmp_path: Path
) -> None:
    with several(model_directory, tmp_path) as one:
        supervisor = one.server.process.pid
        limits = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        # No file can be opened: those that are there have numbers up to this.
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(min(one.children()), signal.SIGKILL)
        wait_for(lambda: len(one.said("a server process cannot be started, it is tried again in")) >= 2)
        assert one.server.process.poll() is None
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limits)
        wait_for(lambda: one.metric("jaxrec_processes") == 2)


def test_a_port_that_another_server_has_is_not_shared_with_it(model_directory: Path, tmp_path: Path) -> None:
    with several(model_directory, tmp_path) as one:
        command = [sys.executable, "-m", "serve", "run", str(model_directory), "--address", one.server.address]
        command += ["--processes", "2", "--store", str(tmp_path / "s")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.stderr == f"Error: cannot listen on {one.server.address}: Address already in use\n"


def test_what_is_set_by_hand_holds_for_all_processes_and_for_later_ones(model_directory: Path, tmp_path: Path) -> None:
    versions = tmp_path / "versions"
    for name in ("1", "2"):
        add_version(versions, model_directory, name)
    shares = [TrafficShare(model_version="1", share=0.25), TrafficShare(model_version="2", share=0.75)]
    with several(versions, tmp_path) as one, ExitStack() as stack:
        first, second = (ModelAdminStub(channel) for channel in channels_to_both(stack, one.server.address))

        def shares_of(admin: ModelAdminStub) -> dict[str, float]:
            models = admin.ListModels(ListModelsRequest(), timeout=PATIENCE_S).models
            return {model.model_version: model.traffic_share for model in models if model.traffic_share}

        first.SetTraffic(SetTrafficRequest(shares=shares), timeout=PATIENCE_S)
        wait_for(lambda: shares_of(second) == {"1": 0.25, "2": 0.75})
        second.SetTraffic(SetTrafficRequest(shares=[TrafficShare(model_version="1", share=1.0)]), timeout=PATIENCE_S)
        wait_for(lambda: shares_of(first) == {"1": 1.0})
        assert first.RollBack(RollBackRequest(), timeout=PATIENCE_S).model_version == "2"
        wait_for(lambda: shares_of(second) == {"2": 1.0})
        first.SetTraffic(SetTrafficRequest(shares=shares), timeout=PATIENCE_S)
        wait_for(lambda: shares_of(second) == {"1": 0.25, "2": 0.75})
        one.replace(min(one.children()))
        for channel in channels_to_both(stack, one.server.address):
            assert shares_of(ModelAdminStub(channel)) == {"1": 0.25, "2": 0.75}


def test_later_processes_roll_back_as_the_others_and_load_what_is_set(model_directory: Path, tmp_path: Path) -> None:
    """A version that the others left behind by themselves, and no newer one before that which was set by hand."""
    versions = tmp_path / "versions"
    add_version(versions, model_directory, "1")
    with several(versions, tmp_path, "--watch", "0.2") as one, ExitStack() as stack:
        add_version(versions, model_directory, "2")
        wait_for(lambda: len(one.said("serving 2 ")) == 2)
        for restarts, process in enumerate(sorted(one.children()), 1):
            one.replace(process, restarts)
        # None of those that are there has served version 1.
        first, second = channels_to_both(stack, one.server.address)
        assert ModelAdminStub(first).RollBack(RollBackRequest(), timeout=PATIENCE_S).model_version == "1"
        stub = RecommenderStub(second)
        wait_for(lambda: stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S).model_version == "1")
        last = one.replace(max(one.children()), 3)
        assert [message for process, message in one.said("loaded the model") if process == last] == [
            "loaded the model 1"
        ]


def test_a_version_that_followed_a_change_is_not_left_by_a_later_process(model_directory: Path, tmp_path: Path) -> None:
    """The directory was followed again by hand, and a newer version came later."""
    versions = tmp_path / "versions"
    add_version(versions, model_directory, "1")
    with several(versions, tmp_path, "--watch", "0.2") as one, ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(one.server.address))
        ModelAdminStub(channel).LoadModel(LoadModelRequest(), timeout=PATIENCE_S)
        add_version(versions, model_directory, "2")
        wait_for(lambda: len(one.said("serving 2 ")) == 2)
        one.replace(min(one.children()))
        for stub in map(ModelAdminStub, channels_to_both(stack, one.server.address)):
            listed = stub.ListModels(ListModelsRequest(), timeout=PATIENCE_S)
            assert listed.automatic_reload
            assert {model.model_version for model in listed.models if model.traffic_share} == {"2"}
