"""Kills a process that records events, again and again, and looks whether it lost or doubled any that it acknowledged.

python bench/fault_kill.py --kills 1000

The process is a fork that opens the store and records from several threads, as the server does, so that a life takes
milliseconds and kills fall into opening, recovery and closing of the WAL too. `kill -9` shows what the process loses;
what the power takes depends on fsync and cannot be shown so.
"""

import os
import random
import select
import signal
import struct
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import click

from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import EventStore, UserEvent

THREADS = 4
EVENTS = 3
# A quarter of the lives is counted from the fork on, so that kills fall into the opening too, and the others from the
# first acknowledgement.
LONGEST_LIFE_S = 0.06
SHARE_FROM_THE_FORK = 0.25
LONGEST_START_S = 30.0
# Thread, number of its last request, and the number in it of its last event id: an acknowledgement in the pipe.
ACKNOWLEDGED = struct.Struct("<ii")


@dataclass
class Killed:
    """What came of the kills; the last two must be 0."""

    kills: int = 0
    kills_before_the_first_answer: int = 0
    acknowledged: int = 0
    stored: int = 0
    lost: int = 0
    doubled: int = 0


def kill_rounds(path: Path, kills: int, seed: int = 0) -> Killed:
    """Kills so many processes that record into the store at `path`, which is created."""
    chance = random.Random(seed)
    result = Killed()
    # Per thread the requests sent so far, as far as known: whatever was acknowledged, and the one after it, which may
    # have been stored or not and is sent again as the first request of the next life.
    acknowledged: list[list[int]] = [[] for _ in range(THREADS)]
    for _ in range(kills):
        first = [requests[-1] + 1 if requests else 0 for requests in acknowledged]
        came = _life(path, first, chance.uniform(0, LONGEST_LIFE_S), chance.random() < SHARE_FROM_THE_FORK)
        result.kills += 1
        result.kills_before_the_first_answer += not came
        for thread, number in came:
            acknowledged[thread].append(number)
    with open_store(path) as store:
        stored = [new for part in store.all_events() for _, new in part]
        for thread, requests in enumerate(acknowledged):
            _check(store, [new for new in stored if new.user_id == str(thread)], thread, requests, result)
    return result


def _life(path: Path, first: list[int], seconds: float, from_the_fork: bool) -> list[tuple[int, int]]:
    """One process from fork to kill; returns the requests that it acknowledged, as (thread, number)."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _record_until_killed(path, first, writing)
    os.close(writing)
    content = b""
    if not from_the_fork:
        select.select([reading], [], [], LONGEST_START_S)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            content += os.read(reading, 2**16)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        raise click.ClickException("the process ended before it was killed")
    while more := os.read(reading, 2**16):
        content += more
    os.close(reading)
    return [(thread, number) for thread, number in ACKNOWLEDGED.iter_unpack(content)]


def _record_until_killed(path: Path, first: list[int], writing: int) -> None:
    try:
        store = open_store(path)

        def record(thread: int) -> None:
            number = first[thread]
            while True:
                # Each request is sent twice, as by a client that missed the answer.
                for _ in range(2):
                    store.record(events(thread, number))
                os.write(writing, ACKNOWLEDGED.pack(thread, number))
                number += 1

        threads = [threading.Thread(target=record, args=[thread]) for thread in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os._exit(1)


def events(thread: int, number: int) -> list[UserEvent]:
    """One request: a few events of the thread's own user, in the second `number`."""
    return [UserEvent(f"{thread}-{number}-{at}", str(thread), Event("i", None, number)) for at in range(EVENTS)]


def _check(store: EventStore, found: list[UserEvent], thread: int, requests: list[int], result: Killed) -> None:
    stored: dict[int, int] = {}
    for new in found:
        stored[new.event.timestamp] = stored.get(new.event.timestamp, 0) + 1
    result.acknowledged += EVENTS * len(requests)
    result.stored += sum(stored.values())
    result.lost += sum(max(EVENTS - stored.get(number, 0), 0) for number in requests)
    result.doubled += sum(max(count - EVENTS, 0) for count in stored.values())
    # A request is stored as a whole or not at all, and its ids are known: sent again nothing is new.
    result.lost += sum(count % EVENTS for count in stored.values())
    for number in stored:
        result.doubled += len(store.record(events(thread, number)))


@click.command(context_settings={"show_default": True})
@click.option("--kills", type=click.IntRange(1), default=1000)
@click.option("--seed", type=int, default=0)
def main(kills: int, seed: int) -> None:
    """Kill a process that records events, and compare what it acknowledged with what is stored."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_rounds(Path(folder) / "events.sqlite", kills, seed)
    click.echo(
        f"{result.kills} kills in {time.monotonic() - start:.0f} s ({result.kills_before_the_first_answer} before the"
        f" first answer): {result.acknowledged} events acknowledged, {result.stored} stored, {result.lost} lost,"
        f" {result.doubled} counted twice"
    )
    if result.lost or result.doubled:
        raise click.ClickException("acknowledged events are lost, or counted twice")


if __name__ == "__main__":
    main()
