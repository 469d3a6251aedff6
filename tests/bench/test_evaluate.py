"""bench/evaluate.py, at a tiny size: it measures the table of eight rows, and no page comes of so little."""

import re
from pathlib import Path

from click.testing import CliRunner

from bench import evaluate


def test_a_tiny_run_measures_eight_rows_and_is_not_to_be_published(tmp_path: Path) -> None:
    options = ["--users", "60", "--items", "200", "--rounds", "1", "--work", str(tmp_path)]
    result = CliRunner().invoke(evaluate.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "evaluate.md").read_text()
    assert "- not to be published: users: 60 of 22363" in page
    assert "60 cases, 200 items, 8 rows" in page
    (cells,) = re.findall(r"^\| (\d\S+) \(.*\) \| (\d\S+) \(.*\) \| (\d\S+) \(.*\) \|$", page, re.MULTILINE)
    assert all(float(cell) > 0 for cell in cells)
