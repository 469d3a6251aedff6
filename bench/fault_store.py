"""Takes the store away from a running server in every way, gives it back, and looks at what the server says meanwhile.

python -m bench.fault_store MODEL

Full disk (a file system of its own of 2 MB), read-only files, a lock held by another, and PostgreSQL and Redis
stopped and started again. Each time: recording must fail with UNAVAILABLE and nothing else, an event that was
acknowledged must be there, one that was not must count once when it is sent again, recommendations that need no store
must go on, and all must work again without a restart.
"""

import itertools
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc

from bench.fronts import deployed, fast_option
from serve.api.rules import MAX_ID_LENGTH
from serve.client import Event, UserEvent
from serve.model.directory import read_artifact
from serve.pb.recommender_pb2 import GetUserProfileRequest, History, RecommendRequest, RecordEventsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from tests.serve.stores.databases import DatabaseServer, NotInstalled, postgres_server, redis_server

DEADLINE_S = 30.0
DISK_BYTES = 2 * 2**20
USER = "u"
FAILURES = 5

Fault = tuple[str, Callable[[], None], Callable[[], None]]
"""The store's location, what takes it away and what gives it back."""


@dataclass
class Survived:
    """What came of one fault."""

    name: str
    acknowledged: int = 0
    stored: int = 0
    statuses: set[str] = field(default_factory=set)
    slowest_failure_s: float = 0.0
    recovery_s: float = 0.0
    answered_meanwhile: bool = False

    @property
    def is_right(self) -> bool:
        return self.statuses == {"UNAVAILABLE"} and self.stored == self.acknowledged and self.answered_meanwhile


def survive(name: str, fault: Fault, model: Path, folder: Path, *, fast: bool = False) -> Survived:
    """Records before, during and after a fault, each event until it is acknowledged."""
    location, take_away, give_back = fault
    result = Survived(name)
    with deployed(model, location, folder, fast=fast, options=["--watch", "0"]) as (_, address):
        item_id = read_artifact(model).catalog.item_ids[1]
        with grpc.insecure_channel(address) as channel:
            stub = RecommenderStub(channel)
            numbers = itertools.count(1)
            pending = _request(item_id, next(numbers))

            def record() -> bool:
                nonlocal pending
                start = time.monotonic()
                try:
                    stub.RecordEvents(pending, timeout=DEADLINE_S)
                except grpc.RpcError as error:
                    result.statuses.add(error.code().name)
                    result.slowest_failure_s = max(result.slowest_failure_s, time.monotonic() - start)
                    return False
                result.acknowledged += len(pending.events)
                pending = _request(item_id, next(numbers))
                return True

            for _ in range(10):
                record()
            take_away()
            failures = 0
            end = time.monotonic() + DEADLINE_S
            # A full disk takes some more events first.
            while failures < FAILURES:
                failures += not record()
                if time.monotonic() > end:
                    raise click.ClickException(f"{name}: the store does not fail")
            history = History(events=[Event(item_id=item_id, timestamp=1)])
            answer = stub.Recommend(RecommendRequest(history=history, k=5), timeout=DEADLINE_S)
            result.answered_meanwhile = len(answer.recommendations) == 5
            give_back()
            start = time.monotonic()
            while not record():
                if time.monotonic() > start + DEADLINE_S:
                    raise click.ClickException(f"{name}: the store does not come back")
            result.recovery_s = time.monotonic() - start
            for _ in range(10):
                record()
            profile = stub.GetUserProfile(GetUserProfileRequest(user_id=USER), timeout=DEADLINE_S)
            result.stored = profile.event_count
    return result


def _request(item_id: str, number: int) -> RecordEventsRequest:
    """Ids of the longest kind, so that a small disk is full soon."""
    return RecordEventsRequest(
        events=[
            UserEvent(
                event_id=f"{number}-{at}".ljust(MAX_ID_LENGTH, "x"), user_id=USER, item_id=item_id, timestamp=number
            )
            for at in range(20)
        ]
    )


@contextmanager
def full_disk(folder: Path) -> Iterator[Fault]:
    """A disk of 2 MB with some ballast, which is taken off when there is to be room again."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                # Full, which is what was wanted.
                return

    try:
        yield str(disk / "events.sqlite"), fill, ballast.unlink
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Fault]:
    """Database and log may not be written any more (chattr +i), also by who has them open.

    Not so the index of the log, which SQLite maps into memory: writing to a map whose file may not be written ends a
    process with SIGBUS, whoever wrote the program.
    """

    def mark(sign: str) -> None:
        files = [str(file) for file in folder.glob("events.sqlite*") if not file.name.endswith("-shm")]
        subprocess.run(["chattr", f"{sign}i", *files], check=True)

    try:
        yield str(folder / "events.sqlite"), lambda: mark("+"), lambda: mark("-")
    finally:
        mark("-")


@contextmanager
def locked(folder: Path) -> Iterator[Fault]:
    """Another process holds the write lock for longer than the server waits."""
    path = folder / "events.sqlite"
    connections: list[sqlite3.Connection] = []

    def lock() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        connections.append(connection)

    def unlock() -> None:
        connections.pop().close()

    yield str(path), lock, unlock


@contextmanager
def restarted(server: AbstractContextManager[DatabaseServer], kill: bool) -> Iterator[Fault]:
    """A database server that ends and comes back."""
    with server as database:
        yield database.location, lambda: database.stop(kill=kill), database.start


def faults() -> list[tuple[str, Callable[[Path], AbstractContextManager[Fault]]]]:
    """By name, with what sets each up in an empty folder: NotInstalled without the database's server, and
    CalledProcessError without the rights."""
    return [
        ("disk full (SQLite)", full_disk),
        ("store read-only (SQLite)", read_only),
        ("store locked by another (SQLite)", locked),
        ("PostgreSQL stopped and started", lambda _: restarted(postgres_server(), kill=False)),
        ("PostgreSQL killed and started", lambda _: restarted(postgres_server(), kill=True)),
        ("Redis stopped and started", lambda _: restarted(redis_server(), kill=False)),
        ("Redis killed and started", lambda _: restarted(redis_server(), kill=True)),
    ]


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@fast_option
def main(model: Path, fast: bool) -> None:
    """Take the store of MODEL's server away in every way, and give it back."""
    wrong = []
    for name, set_up in faults():
        # The first may be full.
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as of_proxy:
            try:
                with set_up(Path(folder)) as fault:
                    found = survive(name, fault, model, Path(of_proxy), fast=fast)
            except (NotInstalled, subprocess.CalledProcessError) as error:
                click.echo(f"{name}: not tried: {error}")
                continue
        click.echo(
            f"{name}: {', '.join(sorted(found.statuses))}, at the latest after {found.slowest_failure_s:.1f} s;"
            f" {found.acknowledged} events acknowledged, {found.stored} stored; back after {found.recovery_s:.2f} s;"
            f" answers without the store: {'yes' if found.answered_meanwhile else 'no'}"
        )
        if not found.is_right:
            wrong.append(name)
    if wrong:
        raise click.ClickException(f"not as it should be: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
