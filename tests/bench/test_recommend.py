"""bench/recommend.py, at a tiny size: it measures what it says, and no page comes of so little."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import recommend
from bench.child import Usage


def test_a_tiny_run_prints_both_rows_and_is_not_to_be_published(tmp_path: Path) -> None:
    options = ["--users", "30", "--items", "200", "--rounds", "1", "--work", str(tmp_path)]
    result = CliRunner().invoke(recommend.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "recommend.md").read_text()
    assert "- not to be published: users: 30 of 200000" in page
    rows = [line for line in page.splitlines() if line[:3] in ("| 1", "| 2")]
    cells = [[cell.split()[0] for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == ["1", "2"]
    assert all(float(cell) > 0 for row in cells for cell in row)
    result = tmp_path / "run-1/top.csv"
    assert len(result.read_text().splitlines()) == 1 + 30 * 10
    # A run that was interrupted before is not continued, and a log with fewer users is no log of these.
    expected = result.read_bytes()
    job = result.with_name(".top.csv.job")
    job.mkdir()
    (job / "job.json").write_text("of a run that was interrupted")
    recommend.measure(tmp_path / "model-200", tmp_path / "log-30-200", result, 1)
    assert result.read_bytes() == expected
    (tmp_path / "log-30-200").rename(tmp_path / "log-40-200")
    options[1] = "40"
    assert "has 30 users of 40" in CliRunner().invoke(recommend.main, options).output


def test_a_log_that_was_interrupted_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*of: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recommend, "USERS_OF_FILE", 20)
    write = recommend.pq.write_table
    monkeypatch.setattr(recommend.pq, "write_table", lambda *of: write(*of) if "00000" in of[1].name else stop())
    with pytest.raises(KeyboardInterrupt):
        recommend.write_log(tmp_path / "log", 30, 200)
    assert list(tmp_path.iterdir()) == []


def test_ratios_are_those_of_the_rounds() -> None:
    runs = {1: [Usage(8, 8, 0.5)] * 2, 2: [Usage(4, 9, 0.6), Usage(5, 9, 0.6)]}
    lines = recommend.table(1000, 10, 0.0, runs)
    assert lines[-1].startswith("Two workers are 1.80 (1.60 to 2.00) times as fast as one")
    assert lines[-3] == "| 2 | 4.5 (4.0 to 5.0) | 225 (200 to 250) | 9.00 (9.00 to 9.00) | 0.60 (0.60 to 0.60) |"


def test_less_than_the_page_needs_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    result = CliRunner().invoke(recommend.main, ["--users", "30", "--work", str(tmp_path / "work"), "--publish"])
    assert result.exit_code == 1
    assert "bench/recommend.md is left as it is: users: 30 of 200000" in result.output
    assert not (tmp_path / "work").exists()
