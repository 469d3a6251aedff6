"""bench/child.py: what a process and its own children used."""

import subprocess
import sys

import click
import pytest

from bench import child

BUSY = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"


def test_what_a_child_prints_and_what_it_and_its_own_child_used() -> None:
    """Two processes of 0.3 CPU seconds, the second with 300 MB."""
    own = f"{BUSY}\nx = b'1' * 300_000_000"
    program = (
        f"{BUSY}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {own!r}], check=True)\nprint(' a ')"
    )
    printed, used = child.run([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert printed == "a"
    assert 0.6 <= used.cpu_seconds < 30
    assert used.seconds > 0.3
    assert used.peak_gb > 0.3


def test_another_status_than_0_is_an_error() -> None:
    with pytest.raises(click.ClickException, match=r"exit status 3: .* raise SystemExit"):
        child.run([sys.executable, "-c", "raise SystemExit(3)"])
