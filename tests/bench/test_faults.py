"""bench/faults.py: a part's figures are what it said, a flaw is none that can be missed, and the page names all."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import faults
from bench.faults import DEFAULT, FAST, Part, attempt, parts, table

RIGHT = {"is_right": True, "load": 0.5}


def test_a_part_that_is_right_and_one_that_fails() -> None:
    found = attempt(Part("kill", "none", "fault_kill", ("--kills", "1")))
    assert found["is_right"]
    assert [line.split(" in ")[0] for line in found["said"]] == ["1 kills"]
    found = attempt(Part("kill", "none", "fault_kill", ("--kills", "0")))
    assert not found["is_right"]
    assert "0 is not in the range x>=1" in found["said"][-1]


def test_what_was_not_tried_is_not_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/fault_none.py").write_text("print('Redis killed and started: not tried: redis-server')")
    monkeypatch.chdir(tmp_path)
    assert not attempt(Part("store", DEFAULT, "fault_none", ()))["is_right"]


def test_every_fault_has_a_file_of_its_own_and_is_tried_on_both_fronts() -> None:
    every = parts([Path("a"), Path("b")], 1000, 200, 100_000, 60.0, 20.0)
    assert len({part.file for part in every}) == len(every) == 17
    on = {front: {part.fault for part in every if part.front == front} for front in (DEFAULT, FAST)}
    assert on[DEFAULT] - on[FAST] == {"hostile requests over HTTP", "hostile requests over HTTP with TLS and tokens"}
    assert on[FAST] < on[DEFAULT]


def test_the_page_says_of_each_module_what_it_does_and_what_came_of_it() -> None:
    soaks = {Part("soak", front, "fault_soak", ()): {"said": [front, "a|b"], **RIGHT} for front in (DEFAULT, FAST)}
    kill = {Part("kill -9", "none", "fault_kill", ()): {"said": ["0 lost"], **RIGHT, "load": 1.25}}
    lines = table({**kill, **soaks})
    assert "The load of the machine was 0.5 to 1.2 when the parts began." in lines
    assert [line for line in lines if line.startswith("##")] == ["## `bench.fault_kill`", "## `bench.fault_soak`"]
    assert "| kill -9 | none | 0 lost |" in lines
    assert f"| soak | {FAST} | {FAST}<br>a&#124;b |" in lines
    assert any(line.startswith("Half of what a server can answer, for long:") for line in lines)


def test_less_than_the_page_needs_is_refused_before_anything_is_tried(tmp_path: Path) -> None:
    result = CliRunner().invoke(faults.main, ["--work", str(tmp_path / "work"), "--minutes", "1", "--publish"])
    assert result.exit_code == 1
    assert "minutes: 1 of 20" in result.output
    assert not (tmp_path / "work").exists()
