"""Offers a server five times what it can answer, and looks at what it answers meanwhile and how it recovers.

python -m bench.fault_overload MODEL --seconds 60

h2load asks for stored users. Capacity is what the server answers when `--callers` callers each wait for their answer;
then new calls come at five times that rate whether answered or not. How many ended with which status, the server's
metrics say; the calls that they lack were ended before the server, by nginx. How long an accepted call takes, a
client that checks each answer measures beside it; its calls are not counted. The goals: at least 85 % of the capacity
is answered, with a p99 of at most 3 times that at capacity. A missed goal is reported. It is not a flaw; less than
half of the capacity is one.
"""

import contextlib
import itertools
import math
import re
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
LEAST_SHARE, MOST_TIMES = 0.85, 3.0  # goals


class Call(NamedTuple):
    """When it ended and how long it took, in seconds, and its status."""

    ended: float
    seconds: float
    code: str


@dataclass
class Probed:
    """What a careful client saw, one call after the other."""

    calls: list[Call] = field(default_factory=list)

    def of(self, start: float, end: float) -> list[Call]:
        """Those that ended in a time."""
        return [call for call in self.calls if start <= call.ended < end]

    def count(self, start: float, end: float) -> Counter[str]:
        """How many calls of a time ended with each status."""
        return Counter(call.code for call in self.of(start, end))

    def p99_ms(self, start: float, end: float) -> float:
        """Of the calls that were answered in a time."""
        took = [call.seconds for call in self.of(start, end) if call.code == "OK"]
        return float(np.percentile(took, 99)) * 1e3 if took else float("nan")


@dataclass
class Overloaded:
    """Rates in calls per second, times in ms."""

    capacity: float
    capacity_p99: float
    offered: float
    """What h2load was to begin; calls beyond those that a connection may have under way wait in it."""
    ended: float
    goodput: float
    others: dict[str, float]
    """Calls with each other status."""
    before_server: float
    """Calls that did not reach the server."""
    accepted_p99: float
    recovery_s: float
    codes: set[str]
    """Statuses that the client beside it saw."""

    def goals(self) -> list[str]:
        """Whether each is met."""
        met = {
            f"{LEAST_SHARE:.0%} answered": self.goodput >= LEAST_SHARE * self.capacity,
            f"{MOST_TIMES:g} times p99": self.accepted_p99 <= MOST_TIMES * self.capacity_p99,
        }
        return [f"{goal} {'met' if is_met else 'missed'}" for goal, is_met in met.items()]

    def flaws(self) -> list[str]:
        """What may not be. h2load cancels what is under way when it ends; the client beside it cancels nothing."""
        statuses = (self.codes - {"OK", "RESOURCE_EXHAUSTED"}) | (
            set(self.others) - {"RESOURCE_EXHAUSTED", "CANCELLED"}
        )
        found = {
            f"statuses that were not expected: {', '.join(sorted(statuses))}": bool(statuses),
            "it did not recover": not math.isfinite(self.recovery_s),
            "less than half of the capacity was answered": self.goodput < self.capacity / 2,
        }
        return [text for text, is_flaw in found.items() if is_flaw]


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
            capacity = _rates(before, _answered(metrics), probed.count(start, end), end - start)["OK"]
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
        others = _rates(before, after, probed.count(start, end), end - start)
        goodput, ended = others.pop("OK", 0.0), done / (end - start)
        return Overloaded(
            capacity=capacity,
            capacity_p99=capacity_p99,
            offered=rate * connections,
            ended=ended,
            goodput=goodput,
            others=others,
            before_server=max(0.0, ended - goodput - sum(others.values())),
            accepted_p99=probed.p99_ms(start, end),
            recovery_s=recovery_s,
            codes={call.code for call in probed.calls},
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


def _rates(
    before: dict[str, float], after: dict[str, float], own: Mapping[str, int], seconds: float
) -> dict[str, float]:
    """Calls per second with each status between two counts, without one's own calls."""
    counts = {code: count - before.get(code, 0) - own.get(code, 0) for code, count in after.items()}
    return {code: count / seconds for code, count in counts.items() if count > 0}


def _probe(address: str, stop: threading.Event, probed: Probed) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = RecommenderStub(channel)
        for user in itertools.cycle(range(USERS)):
            start = time.monotonic()
            code = "OK"
            try:
                answer = stub.Recommend(RecommendRequest(user_id=str(user), k=10), timeout=DEADLINE_S)
                if len(answer.recommendations) != 10:
                    code = "WRONG"
            except grpc.RpcError as error:
                code = error.code().name
            ended = time.monotonic()
            probed.calls.append(Call(ended, ended - start, code))
            if stop.wait(PROBE_EVERY_S):
                return


def _recovery_s(probed: Probed, end: float, good_ms: float) -> float:
    """How long after the load ended the first of ten good answers in a row came; waits for it."""
    deadline = end + 10 * RECOVERED_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        since = probed.of(end, math.inf)
        for first in range(len(since) - 9):
            if all(call.code == "OK" and call.seconds * 1e3 <= good_ms for call in since[first:][:10]):
                return since[first].ended - end
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
    others = "".join(f" {rate:.0f}/s {code}," for code, rate in sorted(found.others.items()))
    click.echo(
        f"capacity {found.capacity:.0f}/s with {callers} callers on {connections} connections, p99"
        f" {found.capacity_p99:.0f} ms; offered"
        f" {found.offered:.0f}/s for {seconds:g} s, {found.ended:.0f}/s ended: {found.goodput:.0f}/s answered"
        f" ({found.goodput / found.capacity:.0%}),{others} {found.before_server:.0f}/s ended before the server,"
        f" p99 of the answered {found.accepted_p99:.0f} ms ({found.accepted_p99 / found.capacity_p99:.1f} times);"
        f" recovered after {found.recovery_s:.2f} s; statuses seen: {', '.join(sorted(found.codes))}"
    )
    click.echo(f"goals: {', '.join(found.goals())}")
    if flaws := found.flaws():
        raise click.ClickException("; ".join(flaws))


if __name__ == "__main__":
    main()
