"""bench/scale.py, at a tiny size: every stage runs, and what is measured is not measured again."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import scale


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which all stages of both logs were measured."""
    folder = tmp_path_factory.mktemp("work")
    result = CliRunner().invoke(scale.main, ["--work", str(folder), "--tiny"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


def test_all_stages_of_both_tiny_logs(work: Path) -> None:
    page = (work / "scale.md").read_text()
    assert "- not to be published: events: 6000 of 25000000" in page
    headings = [f"## {log.events:,} events, {log.items:,} items\n" for log in scale.TINY.values()]
    parts = re.split("|".join(headings), page)
    assert len(parts) == 1 + len(scale.LOGS)
    for part in parts[1:]:
        for label in scale.LABELS.values():
            (cells,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", part, re.MULTILINE)
            seconds, cpu_seconds, peak_gb = cells.split(" | ")
            assert int(seconds) >= 0
            assert int(cpu_seconds) >= 0
            assert 0.05 < float(peak_gb) < 8
        (best,) = re.findall(r"^\| best possible \| \| (\S+) ", part, re.MULTILINE)
        found = {float(one) for one in re.findall(r"^\| \w.* \| with(?:out)? \| (\S+) ", part, re.MULTILINE)}
        assert len(found) >= 4
        assert max(found) < float(best)
        assert "The index keeps 1.0000 (validation)" in part
    assert "1,000 items in the catalogue" in parts[2]  # also those without events


class Again:
    """In place of `scale.watched`: a stage takes 1 second and 9 GB, and makes what it made before."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept, self.commands = folder, folder.with_name("kept"), list[list[str]]()
        shutil.copytree(folder, self.kept)

    def __call__(self, command: list[str], output: Path) -> dict[str, float]:
        self.commands.append(command)
        figures = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_gb": 9.0}
        if command[-1] == "always":
            said = "Error: index: 4000 candidates hold 0.9550 of the 10 best items on 125 requests (made_up), expected"
            output.write_text(f"index: 100%\n{said}\n", encoding="utf-8")
            raise scale.StageFailed("exit status 1", {**figures, "peak_gb": 11.5})
        for path in self.kept.iterdir():
            if path.stem not in scale.STAGES and not (self.folder / path.name).exists():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, self.folder / path.name)
        return figures


@pytest.fixture
def again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Again:
    shutil.copytree(work / "25m", tmp_path / "25m")
    found = Again(tmp_path / "25m")
    monkeypatch.setattr(scale, "watched", found)
    return found


def page_of(folder: Path) -> str:
    options = ["--work", str(folder.parent), "--tiny", "--log", "25m"]
    assert CliRunner().invoke(scale.main, options, catch_exceptions=False).exit_code == 0
    return (folder.parent / "scale.md").read_text()


def test_what_is_measured_is_not_measured_again(again: Again) -> None:
    page_of(again.folder)
    assert again.commands == []


def test_with_a_stage_all_later_ones_are_measured_again(again: Again) -> None:
    (again.folder / "best.json").unlink()
    assert "goal of 8 GB is missed" in page_of(again.folder)
    assert [command[-1] if "export" in command else command[-2] for command in again.commands] == [
        "best",
        "always",
        "never",
        "serve",
    ]


def test_an_index_that_is_refused_is_a_result(again: Again) -> None:
    """The items are searched exactly then; the attempt's memory counts."""
    (again.folder / "export.json").unlink()
    page = page_of(again.folder)
    assert "The export refused the index (`index: 4000 candidates hold 0.9550 of the 10 best items" in page
    assert "| `jaxrec export --index always` | 1 | 1 | 11.50 |" in page
    assert "The index keeps" not in page


def test_a_process_that_ended_and_was_not_waited_for_holds_nothing() -> None:
    with subprocess.Popen(["/bin/true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert scale.held_gb([child.pid]) == 0
        assert scale.held_gb([child.pid, os.getpid()]) > 0.05


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
    result = CliRunner().invoke(scale.main, ["--work", str(tmp_path / "work"), "--tiny", "--log", "25m", "--publish"])
    assert result.exit_code == 1
    assert "bench/scale.md is left as it is: logs: without 1m-items" in result.output
    assert "events: 6000 of 25000000" in result.output
    assert not (tmp_path / "work").exists()
