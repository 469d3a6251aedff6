"""Drives a server with h2load and reads what it cost: percentiles, requests per second, CPU time, memory.

h2load (Debian's nghttp2-client) takes a few microseconds for a request, so that what is measured is the server. It
does not look at grpc-status; so the bytes of its answers are compared with those of an answer that was checked.
"""

import contextlib
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
CONNECTIONS = 4
CLOCK_TICK_MS = 10.0


@dataclass(frozen=True)
class Target:
    """Where calls go: `requests` are whole bodies, `answer` raises for an answer that is not right."""

    name: str
    pids: Sequence[int]
    """Of the processes that answer; what they started counts with them."""
    url: str
    requests: Sequence[bytes]
    answer: Callable[[int], bytes]
    """Sends one of the requests with another client, checks status and content, and returns the body."""
    is_http1: bool = False


@dataclass(frozen=True)
class Sample:
    """One round of one target: percentiles in ms, requests per second, CPU ms of the server per request."""

    p50: float
    p95: float
    p99: float
    rate: float
    cpu: float


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, with its length before it."""
    return b"\0" + struct.pack(">I", len(message)) + message


def require_h2load() -> None:
    if shutil.which("h2load") is None:
        raise click.ClickException("expected h2load on the path: apt-get install nghttp2-client")


def drive(target: Target, concurrency: int, seconds: float, number: int, folder: Path) -> Sample:
    """Sends one request over and over for so long, from `concurrency` callers on at most four connections."""
    body, log = folder / "body", folder / "h2load.log"
    body.write_bytes(target.requests[number % len(target.requests)])
    log.unlink(missing_ok=True)
    expected = len(target.answer(number % len(target.requests)))
    connections = concurrency if target.is_http1 else min(concurrency, CONNECTIONS)
    command = ["h2load", "-t1", f"-c{connections}", f"-m{concurrency // connections}", f"-D{round(seconds * 1e3)}ms"]
    command += ["-d", str(body), "--log-file", str(log)]
    if target.is_http1:
        command += ["--h1", "-H", "content-type: application/json"]
    else:
        command += [part for header in GRPC_HEADERS for part in ("-H", header)]
    before = cpu_ms(target.pids)
    output = subprocess.run([*command, target.url], capture_output=True, text=True, check=True).stdout
    used_ms = cpu_ms(target.pids) - before
    done = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", output)
    data = re.search(r"\((\d+)\) data", output)
    if done is None or data is None:
        raise click.ClickException(f"{target.name}: h2load answered what is not understood: {output}")
    succeeded, *others = map(int, done.groups())
    # Calls under way when the time is over count as failed by none; all others must have the answer's size.
    if not succeeded or any(others) or not 0.97 < int(data[1]) / (succeeded * expected) < 1.03:
        raise click.ClickException(f"{target.name}: expected {succeeded} answers of {expected} bytes each: {output}")
    latencies = np.loadtxt(log, usecols=2, dtype=np.int64) / 1e3
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    return Sample(float(p50), float(p95), float(p99), succeeded / seconds, used_ms / succeeded)


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            for child in children.read_text().split():
                found += family(int(child))
    return found


def cpu_ms(pids: Sequence[int]) -> float:
    """CPU time that processes and their children have used."""
    ticks = 0
    for member in (member for pid in pids for member in family(pid)):
        fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * CLOCK_TICK_MS


def memory_mb(pids: Sequence[int]) -> float:
    """Resident memory of processes and their children, in 10^6 bytes; what they share counts for each."""
    kibibytes = 0
    for member in (member for pid in pids for member in family(pid)):
        with contextlib.suppress(OSError):  # a process that ended meanwhile
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{member}/status").read_text())
            kibibytes += int(found[1]) if found else 0  # one that ended, and was not waited for, has none
    return kibibytes * 1024 / 1e6
