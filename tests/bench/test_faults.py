"""bench/faults.py: what a part said is its result, a part with a flaw is not right, and the page names all."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from bench import faults
from bench.faults import DEFAULT, FAST, NONE, Part, attempt, parts, table

RIGHT = {"is_right": True, "load": 0.5}


def test_a_part_that_is_right() -> None:
    found = attempt(Part("kill", NONE, "fault_kill", 0, ("--kills", "1")), [])
    assert found["is_right"]
    assert [line.split(" in ")[0] for line in found["said"]] == ["1 kills"]
    assert found["command"] == "python -m bench.fault_kill --kills 1"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Part]:
    """A part whose module has this code."""
    (tmp_path / "bench").mkdir()
    monkeypatch.chdir(tmp_path)

    def made(code: str) -> Part:
        (tmp_path / "bench/fault_none.py").write_text(code)
        return Part("store", DEFAULT, "fault_none", 1, ())

    return made


def test_a_flaw_is_what_click_says(part: Callable[[str], Part]) -> None:
    code = "import sys; print('5 lost'); sys.stderr.write('a log\\nError: events are lost\\n'); sys.exit(1)"
    found = attempt(part(code), [Path("model")])
    assert (found["said"], found["is_right"]) == (["5 lost", "Error: events are lost"], False)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('Redis killed: not tried: redis-server')", "Redis killed: not tried: redis-server"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
        ("raise OSError('no such server')", "exit status 1\nTraceback(.|\n)*OSError: no such server"),
        ("import click; click.command()(lambda: 0)()", "exit status 2\n(.|\n)*unexpected extra argument"),
    ],
)
def test_what_did_not_come_to_its_end_is_no_result(code: str, error: str, part: Callable[[str], Part]) -> None:
    with pytest.raises(click.ClickException, match=f"fault_none MODEL did not come to its end\n{error}"):
        attempt(part(code), [Path("model")])


def test_what_a_part_started_ends_with_it(part: Callable[[str], Part]) -> None:
    """It has the part's output and errors, and would keep a pipe open."""
    (pid,) = attempt(part("import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"), [Path("model")])["said"]
    end = time.monotonic() + 10
    while (status := Path(f"/proc/{pid}/status")).is_file() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_every_fault_has_a_file_of_its_own_and_is_tried_on_both_fronts() -> None:
    every = parts(1000, 200, 100_000, 60.0, 20.0)
    assert len({part.file for part in every}) == len(every) == 17
    on = {front: {part.fault for part in every if part.front == front} for front in (DEFAULT, FAST)}
    assert on[DEFAULT] - on[FAST] == {"hostile requests over HTTP", "hostile requests over HTTP with TLS and tokens"}
    assert on[FAST] < on[DEFAULT]
    (reload, _) = (part for part in every if part.fault == "reloads under load")
    assert reload.command == "python -m bench.fault_reload MODEL MODEL --reloads 200"


def test_the_page_says_of_each_module_what_it_does_and_what_came_of_it() -> None:
    soaks = {Part("soak", front, "fault_soak", 1, ()): {"said": [front, "a|b"], **RIGHT} for front in (DEFAULT, FAST)}
    kill = {Part("kill -9", NONE, "fault_kill", 0, ("--kills", "9")): {"said": ["0 lost"], **RIGHT, "load": 1.25}}
    lines = table({**kill, **soaks})
    assert "The load was 0.5 to 1.2." in lines
    assert [line for line in lines if line.startswith("##")] == ["## `bench.fault_kill`", "## `bench.fault_soak`"]
    assert "| kill -9 | none | 0 lost |" in lines
    assert "    python -m bench.fault_kill --kills 9" in lines
    assert f"| soak | {FAST} | {FAST}<br>a&#124;b |" in lines
    assert any(line.startswith("Half of what a server can answer, for long:") for line in lines)


def test_less_than_the_page_needs_is_refused_before_anything_is_tried(tmp_path: Path) -> None:
    result = CliRunner().invoke(faults.main, ["--work", str(tmp_path / "work"), "--minutes", "1", "--publish"])
    assert result.exit_code == 1
    assert "minutes: 1 of 20" in result.output
    assert not (tmp_path / "work").exists()


def test_what_was_tried_is_tried_again_only_with_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def attempted(part: Part, models: list[Path]) -> dict[str, Any]:
        assert [model.name for model in models] == ["model-1", "model-2"]
        tried.append(part.fault)
        return {"command": part.command, "said": ["it"], **RIGHT, "is_right": part.fault != "soak"}

    def made(folder: Path, seed: int) -> Path:
        faults.write_figures(folder.with_suffix(".json"), None)
        return folder

    monkeypatch.setattr(faults, "attempt", attempted)
    monkeypatch.setattr(faults, "made_model", made)
    monkeypatch.setattr(faults, "require_proxy", lambda: None)
    monkeypatch.setattr(faults, "require_h2load", lambda: None)
    options = ["--work", str(tmp_path)]
    result = CliRunner().invoke(faults.main, options)
    assert result.exit_code == 1
    assert f"soak (default) shows a flaw, see {tmp_path / 'soak.json'}" in result.output
    assert len(tried) == 17
    CliRunner().invoke(faults.main, options)
    assert len(tried) == 17  # also the one with a flaw, until its file is deleted
    CliRunner().invoke(faults.main, [*options, "--kills", "3"])
    assert tried[17:] == ["kill -9 while recording"]


def test_a_model_of_an_unknown_commit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model-1").mkdir()
    with pytest.raises(click.ClickException, match="model-1 is of an unknown commit"):
        faults.made_model(tmp_path / "model-1", 1)
