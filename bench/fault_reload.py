"""Reloads a server's model again and again, a third of the versions damaged, while callers check every answer.

python -m bench.fault_reload MODEL_A MODEL_B --reloads 200

The two models answer differently. Every version that is put into the watched directory is a copy of one of them, and
an answer is right when it is the one of the model of which the version that it names is a copy. Each damaged version
must be refused, each good one must serve, no call may fail, and memory may not grow: its median in the last tenth of
the reloads is at most 1.25 times that in the first.
"""

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc

from bench.fronts import deployed, fast_option
from bench.load import memory_mb
from bench.model_versions import DAMAGES, add_version
from serve.model.directory import read_artifact
from serve.model.events import Event as HistoryEvent
from serve.model.recommender import Query, Recommender
from serve.pb import model_admin_pb2, recommender_pb2
from serve.pb.model_admin_pb2_grpc import ModelAdminStub
from serve.pb.recommender_pb2_grpc import RecommenderStub

CALLERS = 4
K = 10
WATCH_S = 0.1
DEADLINE_S = 60.0
# What the first reloads bring in stays: the allocator's arenas, the second model's pages in the page cache's mappings.
WARM_UP_RELOADS = 10
LEAST_RELOADS = WARM_UP_RELOADS + 2
MOST_GROWTH = 1.25


@dataclass
class Reloaded:
    """What came of the reloads; failures and wrong answers must be 0."""

    reloads: int = 0
    refused: int = 0
    answers: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    versions_seen: set[str] = field(default_factory=set)
    memory_mb: list[float] = field(default_factory=list)
    """After each reload but the first ones."""

    def early_and_late_mb(self) -> tuple[float, float]:
        """Medians of the first and of the last tenth."""
        tenth = max(len(self.memory_mb) // 10, 1)
        early, late = (statistics.median(part) for part in (self.memory_mb[:tenth], self.memory_mb[-tenth:]))
        return early, late

    def flaws(self) -> list[str]:
        """What may not be."""
        early, late = self.early_and_late_mb()
        found = {
            f"{len(self.failures)} calls failed: {self.failures[:3]}": bool(self.failures),
            f"{len(self.wrong)} answers were of the wrong version: {self.wrong[:3]}": bool(self.wrong),
            f"memory grew from {early:.0f} to {late:.0f} MB": late > MOST_GROWTH * early,
        }
        return [text for text, is_flaw in found.items() if is_flaw]


def reload_rounds(models: tuple[Path, Path], reloads: int, folder: Path, *, fast: bool = False) -> Reloaded:
    """Puts so many versions of two models into a watched directory in `folder` while callers ask."""
    result = Reloaded()
    item_ids = read_artifact(models[0]).catalog.item_ids
    histories = [item_ids[1 + caller : 40 + caller] for caller in range(CALLERS)]
    expected = [_answers(model, histories) for model in models]
    directory = folder / "versions"
    add_version(directory, models[0], _name(0, 0))
    stop = threading.Event()
    with (
        deployed(directory, folder / "events.sqlite", folder, fast=fast, options=["--watch", str(WATCH_S)]) as (
            server,
            address,
        ),
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(CALLERS) as threads,
    ):
        callers = [
            threads.submit(_ask, address, _request(history), caller, expected, stop, result)
            for caller, history in enumerate(histories)
        ]
        admin = ModelAdminStub(channel)
        try:
            for number in range(1, reloads + 1):
                damage = DAMAGES[number // 3 % len(DAMAGES)] if number % 3 == 0 else None
                version = _name(number, number % 2)
                path = add_version(directory, models[number % 2], version, damage=damage)
                _wait_for_state(
                    admin,
                    version,
                    model_admin_pb2.MODEL_STATE_READY if damage is None else model_admin_pb2.MODEL_STATE_REFUSED,
                )
                result.reloads += 1
                result.refused += damage is not None
                if number > WARM_UP_RELOADS:
                    result.memory_mb.append(memory_mb([server.process.pid]))
                if damage is not None or number > 2:
                    # Only what serves has to stay; a directory with hundreds of versions is nobody's.
                    old = path if damage is not None else directory / _last_good(number)
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            stop.set()
            for caller in callers:
                caller.result()
    return result


def _name(number: int, model: int) -> str:
    return f"{number:06d}-{'ab'[model]}"


def _last_good(number: int) -> str:
    before = number - 1 - ((number - 1) % 3 == 0)
    return _name(before, before % 2)


def _answers(model: Path, histories: Sequence[Sequence[str]]) -> list[list[str]]:
    recommender = Recommender(read_artifact(model), "cpu")
    queries = [
        Query([HistoryEvent(item_id, None, at * 86_400) for at, item_id in enumerate(history, 1)], K)
        for history in histories
    ]
    return [[recommender.catalog.item_ids[item] for item in answer.items] for answer in recommender.recommend(queries)]


def _request(history: Sequence[str]) -> recommender_pb2.RecommendRequest:
    events = [recommender_pb2.Event(item_id=item_id, timestamp=at * 86_400) for at, item_id in enumerate(history, 1)]
    return recommender_pb2.RecommendRequest(history=recommender_pb2.History(events=events), k=K)


def _ask(
    address: str,
    request: recommender_pb2.RecommendRequest,
    caller: int,
    expected: list[list[list[str]]],
    stop: threading.Event,
    result: Reloaded,
) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = RecommenderStub(channel)
        while not stop.is_set():
            try:
                answer = stub.Recommend(request, timeout=DEADLINE_S)
            except grpc.RpcError as error:
                result.failures.append(f"{error.code().name}: {error.details()}")
                continue
            result.answers += 1
            result.versions_seen.add(answer.model_version)
            model = "ab".index(answer.model_version[-1])
            if [item.item_id for item in answer.recommendations] != expected[model][caller]:
                result.wrong.append(answer.model_version)


def _state(admin: ModelAdminStub, version: str) -> int | None:
    models = admin.ListModels(model_admin_pb2.ListModelsRequest(), timeout=DEADLINE_S).models
    return next((one.state for one in models if version in (one.model_version, one.folder)), None)


def _wait_for_state(admin: ModelAdminStub, version: str, state: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while _state(admin, version) != state:
        if time.monotonic() > end:
            raise click.ClickException(f"waited in vain for {version} to be {model_admin_pb2.ModelState.Name(state)}")
        time.sleep(0.02)


@click.command(context_settings={"show_default": True})
@click.argument("model_a", type=click.Path(exists=True, path_type=Path))
@click.argument("model_b", type=click.Path(exists=True, path_type=Path))
@click.option("--reloads", type=click.IntRange(LEAST_RELOADS), default=200)
@fast_option
def main(model_a: Path, model_b: Path, reloads: int, fast: bool) -> None:
    """Reload two models in turn, a third of the versions damaged, under load."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = reload_rounds((model_a, model_b), reloads, Path(folder), fast=fast)
    early, late = result.early_and_late_mb()
    click.echo(
        f"{result.reloads} reloads ({result.refused} damaged and refused) in {time.monotonic() - start:.0f} s:"
        f" {result.answers} answers by {len(result.versions_seen)} versions, {len(result.failures)} failed,"
        f" {len(result.wrong)} of the wrong version; memory {early:.0f} MB in the first tenth, {late:.0f} MB in the"
        f" last, {max(result.memory_mb):.0f} MB at most"
    )
    if flaws := result.flaws():
        raise click.ClickException("; ".join(flaws))


if __name__ == "__main__":
    main()
