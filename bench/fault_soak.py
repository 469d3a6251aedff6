"""Half of what a server can answer, for long: does its memory grow, does it lose file descriptors?

python -m bench.fault_soak MODEL --minutes 60

A mix as in production: stored users are asked for and record what they took, some of them new, some deleted, and one
call in a hundred is wrong. Memory and descriptors of the server are read all the time. In the last three quarters
memory may never be more than 60 MB above that at their beginning, and there may be 40 more descriptors.
"""

import itertools
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc
import numpy as np

from bench.fronts import deployed, fast_option
from bench.load import memory_mb
from serve.client import UserEvent
from serve.model.directory import read_artifact
from serve.pb.recommender_pb2 import DeleteUserRequest, RecommendRequest, RecordEventsRequest, SimilarItemsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub

CALLERS = 4
USERS = 2000
DEADLINE_S = 30.0
# Calls come in this mix, per hundred.
MIX = {"recommend": 74, "record": 20, "similar": 4, "wrong": 1, "delete": 1}
EXPECTED = {"wrong": "INVALID_ARGUMENT"}
# Caches fill and allocators settle first.
SETTLING = 0.25
# Since then.
MOST_GROWTH_MB, MOST_DESCRIPTORS = 60.0, 40


@dataclass
class Soaked:
    """What came of it; statuses by kind of call, memory in MB and descriptors over time."""

    capacity: float = 0.0
    seconds: float = 0.0
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    at_s: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    @property
    def unexpected(self) -> int:
        return sum(count for (kind, status), count in self.statuses.items() if status != EXPECTED.get(kind, "OK"))

    def settled(self) -> tuple[list[float], list[float], list[int]]:
        """Times, memory and descriptors without the beginning."""
        first = int(len(self.at_s) * SETTLING)
        return self.at_s[first:], self.memory_mb[first:], self.descriptors[first:]

    def flaws(self) -> list[str]:
        """What may not be."""
        _, memory_mb, descriptors = self.settled()
        found = {
            f"{self.unexpected} statuses that were not expected: {dict(self.statuses)}": self.unexpected > 0,
            f"memory grew by {max(memory_mb) - memory_mb[0]:.0f} MB": max(memory_mb) > memory_mb[0] + MOST_GROWTH_MB,
            f"{max(descriptors)} descriptors": max(descriptors) > descriptors[0] + MOST_DESCRIPTORS,
        }
        return [text for text, is_flaw in found.items() if is_flaw]

    def growth_mb_per_hour(self) -> float:
        """The slope of a line through the settled memory."""
        at_s, memory_mb, _ = self.settled()
        return float(np.polyfit(at_s, memory_mb, 1)[0]) * 3600


def soak(model: Path, seconds: float, folder: Path, *, fast: bool = False) -> Soaked:
    """Finds out what the mix can reach, then offers half of it for `seconds` seconds."""
    result = Soaked(seconds=seconds)
    item_ids = read_artifact(model).catalog.item_ids[1:]
    numbers = itertools.count(1)
    with (
        deployed(model, folder / "events.sqlite", folder, fast=fast, options=["--watch", "0"]) as (server, address),
        ThreadPoolExecutor(CALLERS) as threads,
    ):

        def run(seconds: float, rate: float | None, watch: bool) -> Counter[tuple[str, str]]:
            stop = time.monotonic() + seconds
            callers = [
                threads.submit(_call, address, item_ids, numbers, stop, rate and rate / CALLERS, caller)
                for caller in range(CALLERS)
            ]
            start = time.monotonic()
            ended = threading.Event()
            while watch and not ended.wait(min(seconds / 200, 5.0)) and time.monotonic() < stop:
                result.at_s.append(time.monotonic() - start)
                result.memory_mb.append(memory_mb([server.process.pid]))
                result.descriptors.append(len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())))
            return sum((caller.result() for caller in callers), Counter())

        trial = min(seconds / 4, 10.0)
        result.capacity = run(trial, None, watch=False).total() / trial
        result.statuses = run(seconds, result.capacity / 2, watch=True)
    return result


def _call(
    address: str, item_ids: tuple[str, ...], numbers: "itertools.count[int]", stop: float, rate: float | None, seed: int
) -> Counter[tuple[str, str]]:
    """Calls one after the other until `stop`, at most `rate` a second."""
    chance = random.Random(seed)
    statuses: Counter[tuple[str, str]] = Counter()
    kinds, weights = list(MIX), list(MIX.values())
    due = time.monotonic()
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        calls = _calls(RecommenderStub(channel), item_ids, numbers, chance)
        while (now := time.monotonic()) < stop:
            if rate is not None:
                due += 1 / rate
                if due > now:
                    time.sleep(due - now)
            (kind,) = chance.choices(kinds, weights)
            try:
                calls[kind]()
                statuses[kind, "OK"] += 1
            except grpc.RpcError as error:
                statuses[kind, error.code().name] += 1
    return statuses


def _calls(
    stub: RecommenderStub, item_ids: tuple[str, ...], numbers: "itertools.count[int]", chance: random.Random
) -> dict[str, Callable[[], object]]:
    def user() -> str:
        return str(chance.randrange(USERS))

    def event() -> UserEvent:
        number = next(numbers)
        return UserEvent(event_id=str(number), user_id=user(), item_id=chance.choice(item_ids), timestamp=number)

    return {
        "recommend": lambda: stub.Recommend(RecommendRequest(user_id=user(), k=10), timeout=DEADLINE_S),
        "record": lambda: stub.RecordEvents(RecordEventsRequest(events=[event()]), timeout=DEADLINE_S),
        "similar": lambda: stub.SimilarItems(SimilarItemsRequest(item_id=chance.choice(item_ids)), timeout=DEADLINE_S),
        "wrong": lambda: stub.Recommend(RecommendRequest(user_id=user(), k=-1), timeout=DEADLINE_S),
        "delete": lambda: stub.DeleteUser(DeleteUserRequest(user_id=user()), timeout=DEADLINE_S),
    }


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--minutes", type=click.FloatRange(0.1), default=60.0)
@fast_option
def main(model: Path, minutes: float, fast: bool) -> None:
    """Offer MODEL's server half of what it can answer, and watch its memory and descriptors."""
    with tempfile.TemporaryDirectory() as folder:
        result = soak(model, minutes * 60, Path(folder), fast=fast)
    _, memory_mb, descriptors = result.settled()
    click.echo(
        f"{minutes:g} minutes at half of {result.capacity:.0f} calls/s: {result.statuses.total()} calls,"
        f" {result.unexpected} with a status that was not expected; memory {memory_mb[0]:.0f} MB after a quarter of the"
        f" time, {memory_mb[-1]:.0f} MB at the end, {max(memory_mb):.0f} MB at most, slope"
        f" {result.growth_mb_per_hour():+.1f} MB an hour; descriptors {descriptors[0]}, then {min(descriptors)} to"
        f" {max(descriptors)}"
    )
    if flaws := result.flaws():
        raise click.ClickException("; ".join(flaws))


if __name__ == "__main__":
    main()
