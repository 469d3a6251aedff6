"""Starts a server as a process of its own, for scripts, tests and benchmarks."""

import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


class StartError(Exception):
    """A server process did not say that it is serving; the message holds its log."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server; `line` is what it printed when it was healthy."""

    process: subprocess.Popen[str]
    address: str
    line: str


@contextmanager
def running_server(
    model: Path,
    store: Path | str,
    *,
    address: str = "127.0.0.1:0",
    provider: str = "auto",
    options: Sequence[str] = (),
    timeout_s: float = 60.0,
    stderr: TextIO | None = None,
) -> Iterator[ServerProcess]:
    """Runs `python -m serve run`, by default on a free loopback port; healthy on entry, drained and ended on exit.

    `options` are further options of the command, such as `("--watch", "0.5")`; `stderr` takes its log, which else goes
    where this process' goes.

    Raises StartError when it ends before it serves, or does not serve within `timeout_s` seconds, and
    subprocess.TimeoutExpired when it does not end within as long after SIGTERM.
    """
    command = [sys.executable, "-m", "serve", "run", str(model), "--address", address]
    command += ["--store", str(store), "--provider", provider, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], timeout_s)
            line = process.stdout.readline().strip() if ready else ""
            if not line:
                how = f"printed no address within {timeout_s:g} s (exit status {process.poll()})"
                log = "" if stderr is None else Path(stderr.name).read_text()
                raise StartError(f"{' '.join(command)} {how}\n{log}")
            address = line.split(" on ", 1)[1].split(" ", 1)[0]
            yield ServerProcess(process, address, line)
        except BaseException:
            process.kill()
            raise
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
