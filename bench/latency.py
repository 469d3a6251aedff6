"""Latency of the real server beside its floor: the graph alone, and gRPC alone.

    python bench/latency.py MODEL

Starts `python -m serve run MODEL` and an empty echo server of the same kind, each in a process of its own, and drives
them from this one at several concurrencies, in interleaved rounds so that a busy moment of the machine hits all alike.
`session.run` is one run of `sequence.onnx` on one thread, in this process while the servers are idle. Every answer is
checked; a call that fails, or an answer that is not the model's with all its items, ends the benchmark.

Prints medians over the rounds, with the lowest and highest round in brackets.
"""

import asyncio
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc
import numpy as np
import onnxruntime

from serve.client import Event, RecommenderClient, UserEvent
from serve.pb.recommender_pb2 import History, RecommendRequest, RecommendResponse
from serve.process import running_server

ECHO_METHOD = "/bench.Echo/Echo"
RECOMMEND_METHOD = "/jaxrec.v1.Recommender/Recommend"
HISTORIES = 256
START = 1_600_000_000
DAY = 86_400
DEADLINE_S = 30.0
WARM_UP_CALLS = 20


class Target(NamedTuple):
    """What calls are sent to: `check` raises for an answer that is not right."""

    name: str
    address: str
    method: str
    requests: Sequence[bytes]
    check: Callable[[bytes], None]


@dataclass(frozen=True)
class Sample:
    """One round of one target: percentiles in ms, and requests per second."""

    p50: float
    p95: float
    p99: float
    rate: float


def sample(latencies_s: Sequence[float], elapsed_s: float) -> Sample:
    p50, p95, p99 = np.percentile(latencies_s, [50, 95, 99]) * 1e3
    return Sample(float(p50), float(p95), float(p99), len(latencies_s) / elapsed_s)


async def drive(target: Target, concurrency: int, seconds: float) -> Sample:
    """Sends calls for so long, each of `concurrency` callers waiting for its answer before it sends the next."""
    latencies: list[float] = []
    async with grpc.aio.insecure_channel(target.address) as channel:
        call = channel.unary_unary(target.method, None, None)

        async def answered(number: int) -> float:
            start = time.perf_counter()
            response = await call(target.requests[number % len(target.requests)], timeout=DEADLINE_S)
            latency = time.perf_counter() - start
            target.check(response)
            return latency

        async def caller(first: int) -> None:
            number = first
            while time.perf_counter() < end:
                latencies.append(await answered(number))
                number += concurrency

        for number in range(WARM_UP_CALLS):
            await answered(number)
        start = time.perf_counter()
        end = start + seconds
        await asyncio.gather(*(caller(first) for first in range(concurrency)))
        return sample(latencies, time.perf_counter() - start)


def run_graph(session: onnxruntime.InferenceSession, feeds: Sequence[dict[str, Any]], seconds: float) -> Sample:
    """Runs the graph on one request after the other."""
    latencies: list[float] = []
    for feed in feeds[:WARM_UP_CALLS]:
        session.run(["items", "scores"], feed)
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        feed = feeds[len(latencies) % len(feeds)]
        begin = time.perf_counter()
        session.run(["items", "scores"], feed)
        latencies.append(time.perf_counter() - begin)
    return sample(latencies, time.perf_counter() - start)


def graph_session(model: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model / "sequence.onnx", options, providers=["CPUExecutionProvider"])


def graph_feed(items: np.ndarray, k: int) -> dict[str, Any]:
    """One history as `sequence.onnx` takes it: an event a day, no ratings, a request a day after the last."""
    gap = np.full((1, len(items)), DAY, np.float32)
    gap[0, 0] = -1
    return {
        "item": items[None],
        "rating": np.full((1, len(items)), -1, np.float32),
        "gap": gap,
        "length": np.array([len(items)], np.int32),
        "request_gap": np.array([DAY], np.float32),
        "exclude": items[None],
        "k": np.array([k], np.int64),
    }


def check_echo(response: bytes) -> None:
    if response:
        raise click.ClickException(f"expected an empty echo, came {len(response)} bytes")


def recommendation_check(k: int) -> Callable[[bytes], None]:
    def check(response: bytes) -> None:
        answer = RecommendResponse.FromString(response)
        if len(answer.recommendations) != k or answer.policy == "popularity":
            raise click.ClickException(
                f"expected {k} items of the model, came {len(answer.recommendations)} of the policy {answer.policy}"
            )

    return check


@contextmanager
def echo_server() -> Iterator[str]:
    """The address of a running echo server."""
    command = [sys.executable, str(Path(__file__).with_name("echo_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def record(address: str, histories: Sequence[Sequence[Event]]) -> None:
    """Stores each history as a user's, named by its place."""
    with RecommenderClient(address, timeout_s=DEADLINE_S) as client:
        for user, events in enumerate(histories):
            client.record_events(
                UserEvent(event_id=f"{user}-{at}", user_id=str(user), item_id=event.item_id, timestamp=event.timestamp)
                for at, event in enumerate(events)
            )


def facts(model: Path, session: onnxruntime.InferenceSession, server_line: str) -> dict[str, Any]:
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    (state,) = (node.shape[-1] for node in session.get_outputs() if node.name == "state")
    return {
        "machine": f"{cpu}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, onnxruntime {onnxruntime.__version__},"
        f" grpc {grpc.__version__}",
        "commit": commit or "unknown",
        "command": " ".join(["python", *sys.argv]),
        "model": f"{manifest['model_version']} ({manifest['policy']}), {manifest['item_count']} items, state {state},"
        f" sequence.onnx {(model / 'sequence.onnx').stat().st_size / 1e6:.1f} MB",
        "server": server_line,
    }


def table(rounds: dict[str, list[Sample]]) -> str:
    """One line per measurement: the median of the rounds (lowest to highest)."""
    lines = ["| what | p50 ms | p95 ms | p99 ms | requests/s |", "|---|---|---|---|---|"]
    for name, samples in rounds.items():
        columns = []
        for field, digits in (("p50", 2), ("p95", 2), ("p99", 2), ("rate", 0)):
            values = [getattr(one, field) for one in samples]
            low, middle, high = (
                f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
            )
            columns.append(f"{middle} ({low} to {high})")
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, show_default=True, help="For each measurement.")
@click.option("--history", "length", type=click.IntRange(1), default=50, show_default=True, help="Events per history.")
@click.option("--k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Items per answer.")
@click.option(
    "--concurrency", type=click.IntRange(1), multiple=True, default=(1, 8, 32), show_default=True, help="Repeatable."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write all rounds here.")
def main(
    model: Path, rounds: int, seconds: float, length: int, k: int, concurrency: tuple[int, ...], json_file: Path | None
) -> None:
    """Measure the server on the model directory MODEL beside the graph alone and gRPC alone."""
    with (model / "catalog.csv").open(encoding="utf-8", newline="") as file:
        item_ids = ["", *(row["item_id"] for row in csv.DictReader(file))]
    if len(item_ids) - 1 < length + k:
        raise click.BadParameter(f"{len(item_ids) - 1} items are too few for {length} events and {k} answers")
    random = np.random.default_rng(0)
    indices = [random.choice(len(item_ids) - 1, length, replace=False).astype(np.int32) + 1 for _ in range(HISTORIES)]
    histories = [
        [Event(item_id=item_ids[item], timestamp=START + DAY * at) for at, item in enumerate(row)] for row in indices
    ]
    request_time = START + DAY * length
    inline = [
        RecommendRequest(history=History(events=events), k=k, request_time=request_time).SerializeToString()
        for events in histories
    ]
    stored = [
        RecommendRequest(user_id=str(user), k=k, request_time=request_time).SerializeToString()
        for user in range(HISTORIES)
    ]
    feeds = [graph_feed(row, k) for row in indices]
    session = graph_session(model)
    measured: dict[str, list[Sample]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(model, Path(folder) / "events.sqlite") as server,
        echo_server() as echo_address,
    ):
        record(server.address, histories)
        check = recommendation_check(k)
        targets = [
            Target("echo RPC", echo_address, ECHO_METHOD, [b""], check_echo),
            Target("Recommend, inline history", server.address, RECOMMEND_METHOD, inline, check),
            Target("Recommend, stored user", server.address, RECOMMEND_METHOD, stored, check),
        ]
        described = facts(model, session, server.line)
        for number in range(rounds):
            click.echo(f"round {number + 1} of {rounds}", err=True)
            measured.setdefault("session.run, 1 thread", []).append(run_graph(session, feeds, seconds))
            for callers in concurrency:
                for target in targets:
                    name = f"{target.name}, concurrency {callers}"
                    measured.setdefault(name, []).append(asyncio.run(drive(target, callers, seconds)))
    described["setting"] = f"{length} events, top {k}, {rounds} rounds of {seconds:g} s, every answer checked"
    for name, value in described.items():
        click.echo(f"{name}: {value}")
    click.echo(f"\n{table(measured)}")
    if json_file is not None:
        result = {**described, "rounds": {name: [asdict(one) for one in samples] for name, samples in measured.items()}}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
