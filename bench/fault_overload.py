"""Offers a server five times what it can answer, and looks at what it answers meanwhile and how it recovers.

python -m bench.fault_overload MODEL --seconds 60

h2load asks for stored users. Capacity is what the server answers when `--callers` callers each wait for their answer;
then new calls come at five times that rate whether answered or not. How many were answered, the server's metrics say;
all others were turned away, by the server or by nginx. How long an accepted call takes, a client that checks each
answer measures beside it.
"""

import contextlib
import re
import subprocess
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc
import numpy as np

from bench.fronts import deployed, fast_option
from bench.load import GRPC_HEADERS, framed, require_h2load
from serve.client import RecommenderClient, UserEvent
from serve.model.directory import read_artifact
from serve.pb.recommender_pb2 import RecommendRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from tests.ports import reserved_port

FACTOR = 5
EVENTS = 50
USERS = 64
DEADLINE_S = 30.0
PROBE_EVERY_S = 0.02
METHOD = "/jaxrec.v1.Recommender/Recommend"
RECOVERED_S = 2.0


@dataclass
class Probed:
    """What a careful client saw, one call after the other: when each ended, in seconds, and how."""

    ended: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    def p99_ms(self, start: float, end: float) -> float:
        """Of the calls that were answered in a time."""
        took = [
            took
            for at, took, code in zip(self.ended, self.seconds, self.codes, strict=True)
            if start <= at < end and code == "OK"
        ]
        return float(np.percentile(took, 99)) * 1e3 if took else float("nan")


@dataclass
class Overloaded:
    """Rates in calls per second, times in ms."""

    capacity: float
    capacity_p99: float
    offered: float
    goodput: float
    turned_away: float
    accepted_p99: float
    recovery_s: float
    codes: set[str]


def overload(
    model: Path, seconds: float, callers: int, connections: int, folder: Path, *, fast: bool = False
) -> Overloaded:
    """Measures capacity for a while, then offers a multiple of it for `seconds` seconds."""
    with contextlib.ExitStack() as stack:
        metrics = f"127.0.0.1:{stack.enter_context(reserved_port())}"
        options = ["--watch", "0", "--metrics", metrics]
        _, address = stack.enter_context(deployed(model, folder / "events.sqlite", folder, fast=fast, options=options))
        _record(address, read_artifact(model).catalog.item_ids)
        body = folder / "body"
        body.write_bytes(framed(RecommendRequest(user_id="1", k=10).SerializeToString()))
        url = f"http://{address}{METHOD}"
        probed, stop = Probed(), threading.Event()
        probe = threading.Thread(target=_probe, args=[address, stop, probed])
        probe.start()
        try:
            closed = [f"-c{connections}", f"-m{callers // connections}"]
            _load(url, body, closed, 2.0)
            before, start = _answered(metrics), time.monotonic()
            _load(url, body, closed, min(seconds, 10.0))
            end = time.monotonic()
            capacity = _rate(before, _answered(metrics), "OK", end - start)
            capacity_p99 = probed.p99_ms(start, end)
            rate = round(FACTOR * capacity / connections)
            before, start = _answered(metrics), time.monotonic()
            done = _load(url, body, [f"-c{connections}", "-m1000", f"--rps={rate}"], seconds)
            end = time.monotonic()
            after = _answered(metrics)
            recovery_s = _recovery_s(probed, end, 2 * capacity_p99)
        finally:
            stop.set()
            probe.join()
        goodput = _rate(before, after, "OK", end - start)
        offered = done / (end - start)
        return Overloaded(
            capacity=capacity,
            capacity_p99=capacity_p99,
            offered=offered,
            goodput=goodput,
            turned_away=offered - goodput,
            accepted_p99=probed.p99_ms(start, end),
            recovery_s=recovery_s,
            codes=set(probed.codes),
        )


def _record(address: str, item_ids: tuple[str, ...]) -> None:
    with RecommenderClient(address, timeout_s=DEADLINE_S) as client:
        for user in range(USERS):
            client.record_events(
                UserEvent(
                    event_id=f"{user}-{at}",
                    user_id=str(user),
                    item_id=item_ids[1 + (user + at) % (len(item_ids) - 1)],
                    timestamp=86_400 * (at + 1),
                )
                for at in range(EVENTS)
            )


def _load(url: str, body: Path, how: list[str], seconds: float) -> int:
    """How many calls ended, with whatever status."""
    command = ["h2load", "-t1", *how, f"-D{round(seconds * 1e3)}ms", "-d", str(body)]
    command += [part for header in GRPC_HEADERS for part in ("-H", header)]
    said = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
    done = re.search(r"(\d+) done", said)
    if done is None:
        raise click.ClickException(f"h2load answered what is not understood: {said}")
    return int(done[1])


def _answered(metrics: str) -> dict[str, float]:
    """So many calls of Recommend ended with each status since the server started."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=DEADLINE_S) as response:
        lines = response.read().decode().splitlines()
    counts: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name.startswith("jaxrec_rpc_seconds_count") and METHOD in name:
            counts[name.split('code="')[1].split('"')[0]] = float(value)
    return counts


def _rate(before: dict[str, float], after: dict[str, float], code: str, seconds: float) -> float:
    return (after.get(code, 0) - before.get(code, 0)) / seconds


def _probe(address: str, stop: threading.Event, probed: Probed) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = RecommenderStub(channel)
        for user in iter(lambda: len(probed.ended) % USERS, -1):
            start = time.monotonic()
            code = "OK"
            try:
                answer = stub.Recommend(RecommendRequest(user_id=str(user), k=10), timeout=DEADLINE_S)
                if len(answer.recommendations) != 10:
                    code = "WRONG"
            except grpc.RpcError as error:
                code = error.code().name
            probed.seconds.append(time.monotonic() - start)
            probed.codes.append(code)
            probed.ended.append(time.monotonic())
            if stop.wait(PROBE_EVERY_S):
                return


def _recovery_s(probed: Probed, end: float, good_ms: float) -> float:
    """How long after the load ended the first of ten good answers in a row came; waits for it."""
    deadline = end + 10 * RECOVERED_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        since = [at for at, ended in enumerate(probed.ended[: len(probed.codes)]) if ended >= end]
        for first in range(len(since) - 9):
            if all(probed.codes[at] == "OK" and probed.seconds[at] * 1e3 <= good_ms for at in since[first:][:10]):
                return probed.ended[since[first]] - end
    return float("inf")


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--seconds", type=click.FloatRange(1), default=60.0, help="How long the overload lasts.")
@click.option("--callers", type=click.IntRange(1), default=128, help="Callers at capacity.")
@click.option("--connections", type=click.IntRange(1), default=4, help="Of all callers together.")
@fast_option
def main(model: Path, seconds: float, callers: int, connections: int, fast: bool) -> None:
    """Measure the goodput of MODEL's server at five times its capacity."""
    require_h2load()
    with tempfile.TemporaryDirectory() as folder:
        found = overload(model, seconds, callers, connections, Path(folder), fast=fast)
    click.echo(
        f"capacity {found.capacity:.0f}/s with {callers} callers on {connections} connections, p99"
        f" {found.capacity_p99:.0f} ms; offered"
        f" {found.offered:.0f}/s for {seconds:g} s: {found.goodput:.0f}/s answered"
        f" ({found.goodput / found.capacity:.0%}), {found.turned_away:.0f}/s turned away, p99 of the answered"
        f" {found.accepted_p99:.0f} ms ({found.accepted_p99 / found.capacity_p99:.1f} times); recovered after"
        f" {found.recovery_s:.2f} s; statuses seen: {', '.join(sorted(found.codes))}"
    )


if __name__ == "__main__":
    main()
