"""`python -m serve run`: which addresses beyond loopback it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

BEYOND = "127.1:0"  # loopback in a form that the guard takes for the name of another machine


def said_by(folder: Path, *options: str) -> str:
    """What a server without a model says, which opens its metrics before it looks for the model."""
    command = [sys.executable, "-m", "serve", "run", str(folder / "nowhere"), "--log-format", "text"]
    ended = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("metrics_only", "all_ports", "calls", "metrics", "exposed"),
    [
        (False, False, "127.0.0.1:0", BEYOND, True),
        (True, False, "127.0.0.1:0", BEYOND, False),
        (True, False, BEYOND, "127.0.0.1:0", True),
        (False, True, "127.0.0.1:0", BEYOND, False),
    ],
)
def test_metrics_for_other_machines_do_not_open_the_port_of_calls(
    metrics_only: bool, all_ports: bool, calls: str, metrics: str, exposed: bool, tmp_path: Path
) -> None:
    flags = ["--allow-insecure-metrics"] * metrics_only + ["--allow-insecure"] * all_ports
    said = said_by(tmp_path, "--address", calls, "--metrics", metrics, *flags)
    guard = f"Error: {BEYOND} can be reached from other machines, and there is no TLS and tokens or client certificates"
    assert said.startswith(guard if exposed else f"Error: {tmp_path}/nowhere: cannot be read")
