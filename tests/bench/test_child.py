"""bench/child.py: what a process and its own children used."""

import subprocess
import sys

import click
import pytest

from bench import child

BUSY = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"


def test_what_a_child_prints_and_what_it_and_its_own_child_used() -> None:
    """Two processes of 0.3 CPU seconds, one after the other."""
    program = (
        f"{BUSY}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}], check=True)\nprint(' a ')"
    )
    printed, used = child.run([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert printed == "a"
    assert 0.6 <= used.cpu_seconds < 30
    assert used.seconds >= 0.6


def test_memory_is_in_10_9_bytes_whatever_this_process_holds() -> None:
    """The measuring process is a small one, and its child takes 1 GB."""
    large = "x = b'1' * 1_000_000_000"
    program = f"import sys; from bench import child; print(child.run([sys.executable, '-c', {large!r}])[1].peak_gb)"
    printed, _ = child.run([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert 1 < float(printed) < 1.07


def test_another_status_than_0_is_an_error() -> None:
    with pytest.raises(click.ClickException, match=r"exit status 3: .* raise SystemExit"):
        child.run([sys.executable, "-c", "raise SystemExit(3)"])
