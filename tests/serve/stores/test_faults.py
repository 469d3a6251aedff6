"""Short versions of the faults of bench/faults.md."""

import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bench import fault_overload, fault_reload, fault_soak, fault_store
from bench.model_versions import replace_file
from tests.serve.front.proxy import FRONTS
from tests.serve.stores.databases import NotInstalled, redis_server

ROOT = Path(__file__).parents[3]


def test_kill_9_loses_nothing_and_doubles_nothing() -> None:
    """In a process of its own: it forks, which one with threads must not."""
    command = [sys.executable, "-m", "bench.fault_kill", "--kills", "12"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert re.match(r"12 kills .*: [1-9]\d* events acknowledged, \d+ stored, 0 lost, 0 counted twice\n", ended.stdout)


@pytest.mark.parametrize("front", FRONTS)
def test_reloads_under_load(front: str, model_directory: Path, tmp_path: Path) -> None:
    # Answers differently: the last item has the name of the first, and so on.
    other = tmp_path / "other"
    shutil.copytree(model_directory, other)
    header, *rows = (other / "catalog.csv").read_text().splitlines()
    ids = [row.partition(",")[0] for row in rows]
    rows = [f"{new},{row.partition(',')[2]}" for new, row in zip(reversed(ids), rows, strict=True)]
    replace_file(other, "catalog.csv", "\n".join([header, *rows, ""]).encode())
    result = fault_reload.reload_rounds((model_directory, other), 12, tmp_path, fast=front != "default")
    assert (result.reloads, result.refused) == (12, 4)
    assert result.answers > 0
    assert len(result.versions_seen) > 1
    assert (result.failures, result.wrong) == ([], [])
    result.memory_mb = [100.0] * 10 + [125.0, 125.0]
    assert result.flaws() == []
    result.memory_mb[-1] = 126.0
    assert result.flaws() == ["memory grew from 100 to 126 MB"]


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", ["disk full", "Redis killed"])
def test_store_that_goes_away_and_comes_back(name: str, front: str, model_directory: Path, tmp_path: Path) -> None:
    full, of_proxy = tmp_path / "full", tmp_path / "proxy"
    full.mkdir()
    of_proxy.mkdir()
    faults: dict[str, AbstractContextManager[fault_store.Fault]] = {
        "disk full": fault_store.full_disk(full),
        "Redis killed": fault_store.restarted(redis_server(), kill=True),
    }
    try:
        with faults[name] as fault:
            result = fault_store.survive(name, fault, model_directory, of_proxy, fast=front != "default")
    except (NotInstalled, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot be set up here: {error}")
    assert result.is_right, result


@pytest.mark.parametrize("front", FRONTS)
def test_soak(front: str, model_directory: Path, tmp_path: Path) -> None:
    result = fault_soak.soak(model_directory, 4.0, tmp_path, fast=front != "default")
    assert result.flaws() == []
    result.statuses["recommend", "INTERNAL"] += 1
    result.memory_mb[-1] += 1000
    result.descriptors[-1] += 100
    assert [flaw.split(" ")[0] for flaw in result.flaws()] == ["1", "memory", str(max(result.descriptors))]


def test_what_is_a_goal_and_what_a_flaw_of_an_overload() -> None:
    found = fault_overload.Overloaded(
        capacity=1000.0,
        capacity_p99=100.0,
        offered=5000.0,
        ended=2000.0,
        goodput=850.0,
        others={"RESOURCE_EXHAUSTED": 500.0, "CANCELLED": 1.0},
        before_server=0.0,
        accepted_p99=301.0,
        recovery_s=0.1,
        codes={"OK", "RESOURCE_EXHAUSTED"},
    )
    assert found.goals() == ["85% answered met", "3 times p99 missed"]
    assert found.flaws() == []
    found.codes.add("CANCELLED")  # of a client that cancels nothing
    assert found.flaws() == ["statuses that were not expected: CANCELLED"]
    found.others["INTERNAL"], found.goodput, found.recovery_s = 1.0, 499.0, float("inf")
    assert found.flaws() == [
        "statuses that were not expected: CANCELLED, INTERNAL",
        "it did not recover",
        "less than half of the capacity was answered",
    ]
