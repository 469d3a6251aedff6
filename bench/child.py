"""Runs a measured part of a bench in a process of its own: its time, and the memory of the largest process."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click


class Usage(NamedTuple):
    """Of a process and of those that it waited for.

    `seconds` from start to end, the `cpu_seconds` of all, and `peak_gb`, the most memory that one of them held, in
    10^9 bytes. A process begins as a copy of the one that starts it, so `peak_gb` is at least what that one held then.
    """

    seconds: float
    cpu_seconds: float
    peak_gb: float


def run(command: Sequence[str | Path], **options: Any) -> tuple[str, Usage]:
    """Runs a command to its end.

    Args:
        command: The program and its arguments.
        options: Of `subprocess.Popen`; with `stdout=subprocess.PIPE`, what it prints is returned.

    Returns:
        What it printed, without white space at both ends ("" unless stdout is a pipe), and what it used.

    Raises:
        click.ClickException: Its exit status is not 0.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, text=True, **options) as child:
        try:
            printed = "" if child.stdout is None else child.stdout.read()
            usage = wait(child, start)
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise click.ClickException(f"exit status {child.returncode}: {' '.join(map(str, command))}")
    return printed.strip(), usage


def wait(child: "subprocess.Popen[Any]", start: float) -> Usage:
    """Waits for a process, sets its `returncode`, and returns what it used.

    Args:
        child: The process, which was not waited for yet.
        start: `time.perf_counter()` before it started.
    """
    _, status, usage = os.wait4(child.pid, 0)  # of this child and its own alone
    child.returncode = os.waitstatus_to_exitcode(status)
    used = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9
    return Usage(time.perf_counter() - start, *used)
