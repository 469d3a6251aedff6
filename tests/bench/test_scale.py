"""bench/scale.py, at a tiny size: every stage runs, and what is measured is not measured again."""

import contextlib
import os
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import scale


def test_all_stages_of_a_tiny_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--work", str(tmp_path), "--tiny", "--log", "25m"]
    result = CliRunner().invoke(scale.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "scale.md").read_text()
    assert "- not to be published: logs: without 1m-items" in page
    assert "- not to be published: events: 6000 of 25000000" in page
    for label in scale.LABELS.values():
        (cells,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", page, re.MULTILINE)
        seconds, cpu_seconds, peak_gb = cells.split(" | ")
        assert int(seconds) >= 0
        assert int(cpu_seconds) >= 0
        assert 0.05 < float(peak_gb) < 8
    (best,) = re.findall(r"^\| best possible \| \| (\S+) ", page, re.MULTILINE)
    found = {float(one) for one in re.findall(r"^\| \w.* \| with(?:out)? \| (\S+) ", page, re.MULTILINE)}
    assert len(found) >= 4
    assert max(found) < float(best)

    def watched(command: list[str], output: Path) -> dict[str, float]:
        measured.append(output.stem)
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_gb": 9.0}

    measured: list[str] = []
    monkeypatch.setattr(scale, "watched", watched)
    CliRunner().invoke(scale.main, options, catch_exceptions=False)
    assert measured == []
    (tmp_path / "25m/log.json").unlink()
    assert (tmp_path / "25m/source").is_dir()
    CliRunner().invoke(scale.main, options, catch_exceptions=False)
    assert measured == ["log"]
    assert not (tmp_path / "25m/source").exists()  # of a stage that was interrupted
    assert "goal of 8 GB is missed" in (tmp_path / "scale.md").read_text()


def test_a_stage_that_fails_ends_the_bench(tmp_path: Path) -> None:
    with pytest.raises(scale.click.ClickException, match=r"exit status 3: .*; see .*output"):
        scale.watched(["/bin/sh", "-c", "exit 3"], tmp_path / "output")


def test_memory_is_that_of_all_processes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two children hold 100 MB each until both were seen together, and a fifo is opened to let them go."""
    fifo, held_gb = tmp_path / "seen", scale.held_gb
    os.mkfifo(fifo)
    hold = f"held = bytearray(100_000_000); open({str(fifo)!r}).read()"
    command = f'"{sys.executable}" -c "$0" & "{sys.executable}" -c "$0" & wait'

    together: list[float] = []

    def seen(pids: list[int]) -> float:
        together.append(held_gb(pids))
        if max(together) > 0.2:
            with contextlib.suppress(OSError):  # while nobody reads
                os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return together[-1]

    monkeypatch.setattr(scale, "held_gb", seen)
    found = scale.watched(["/bin/sh", "-c", command, hold], tmp_path / "output")
    assert 0.2 < found["peak_gb"] < 0.4
    assert found["seconds"] > 0 < found["cpu_seconds"]


def test_less_than_the_page_needs_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    result = CliRunner().invoke(scale.main, ["--work", str(tmp_path / "work"), "--tiny", "--publish"])
    assert result.exit_code == 1
    assert "bench/scale.md is left as it is: events: 6000 of 25000000" in result.output
    assert not (tmp_path / "work").exists()
