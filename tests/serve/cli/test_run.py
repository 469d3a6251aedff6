"""`python -m serve run`: which addresses beyond loopback it refuses, and how many threads it has."""

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest

from serve.api.event_types import BUILT_IN
from serve.cli import run
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import RecordEventsRequest, UserEvent
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.settings import Settings
from serve.stores import open_store
from tests.serve.one_model import one_model

DEADLINE_S = 30.0
BEYOND = "127.1:0"  # loopback in a form that the guard takes for the name of another machine


def said_by(folder: Path, *options: str) -> str:
    """What a server without a model says, which opens its metrics before it looks for the model."""
    command = [sys.executable, "-m", "serve", "run", str(folder / "nowhere"), "--log-format", "text"]
    ended = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("metrics_only", "all_ports", "calls", "metrics", "exposed"),
    [
        (False, False, "127.0.0.1:0", BEYOND, True),
        (True, False, "127.0.0.1:0", BEYOND, False),
        (True, False, BEYOND, "127.0.0.1:0", True),
        (False, True, "127.0.0.1:0", BEYOND, False),
    ],
)
def test_metrics_for_other_machines_do_not_open_the_port_of_calls(
    metrics_only: bool, all_ports: bool, calls: str, metrics: str, exposed: bool, tmp_path: Path
) -> None:
    flags = ["--allow-insecure-metrics"] * metrics_only + ["--allow-insecure"] * all_ports
    said = said_by(tmp_path, "--address", calls, "--metrics", metrics, *flags)
    guard = f"Error: {BEYOND} can be reached from other machines, and there is no TLS and tokens or client certificates"
    assert said.startswith(guard if exposed else f"Error: {tmp_path}/nowhere: cannot be read")


def test_calls_that_wait_for_the_store_have_as_many_threads_as_are_set(model: Recommender, tmp_path: Path) -> None:
    settings, metrics, calls = Settings(tmp_path, "127.0.0.1:0", store_threads=2), Metrics(), 4
    with (
        open_store(tmp_path / "events") as store,
        closing(sqlite3.connect(tmp_path / "events", isolation_level=None)) as other,
        ExitStack() as stack,
    ):
        known = one_model(model, store)
        server, where = run._opened(settings, run._listener(settings), known, store, BUILT_IN, metrics, print, stack)
        stack.callback(server.drain)
        server.start()
        of_others = threading.enumerate()
        with grpc.insecure_channel(where) as channel:
            record = RecommenderStub(channel).RecordEvents
            other.execute("BEGIN IMMEDIATE")
            events = [UserEvent(event_id=str(at), user_id="u", item_id="1007", timestamp=1) for at in range(calls)]
            futures = [record.future(RecordEventsRequest(events=[one]), timeout=DEADLINE_S) for one in events]
            end = time.monotonic() + DEADLINE_S
            while metrics.registry.get_sample_value("jaxrec_rpcs_under_way") != calls:
                assert time.monotonic() < end
            names = [one.name for one in threading.enumerate() if one not in of_others and "grpc-pool" in one.name]
            other.execute("ROLLBACK")
            assert len(names) == settings.store_threads
            assert sum(future.result().recorded_count for future in futures) == calls


def test_a_signal_at_any_moment_of_a_wait_ends_it() -> None:
    """Thousands of them in a process of its own, since a wait that a signal locks never ends."""
    program = """
import signal
from serve.cli.run import Stop
for _ in range(3_000):
    stop = Stop()
    signal.signal(signal.SIGALRM, lambda *_: stop.set())
    signal.setitimer(signal.ITIMER_REAL, 2e-4)
    while not stop.wait(1e-6):
        pass
    assert stop.wait(0.0) and stop.is_set()
print("ended")
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ended.stdout, ended.stderr) == ("ended\n", "")
