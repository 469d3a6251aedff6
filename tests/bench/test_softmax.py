"""bench/softmax.py, at a tiny size: steps and epochs are measured, and no page comes of so little."""

import re
from pathlib import Path

from click.testing import CliRunner

from bench import softmax


def test_a_tiny_run_has_a_row_for_each_way(tmp_path: Path) -> None:
    result = CliRunner().invoke(softmax.main, ["--work", str(tmp_path), "--tiny"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "softmax.md").read_text()
    assert f"- not to be published: ways: 4 of {len(softmax.WAYS)}" in page
    steps = re.findall(r"^\| 2,000 \| 400 \| (full|100 sampled) \| (\d\S+) \| (\d\S+) \|$", page, re.MULTILINE)
    assert [row[0] for row in steps] == ["full", "100 sampled"]
    assert all(float(cell) > 0 for row in steps for cell in row[1:])
    epochs = re.findall(
        r"^\| 2,000 \| 50 \| 400 \| 0.003 \| (full|100 sampled) \| (\d+) \| .* \| (\S+) \|$", page, re.M
    )
    assert [row[0] for row in epochs] == ["100 sampled", "full"]
    assert int(epochs[0][1]) == int(epochs[1][1]) > 1
    assert 0.1 < float(epochs[0][2]) == float(epochs[1][2]) < 0.5  # the best possible is that of the log
