"""bench/learn_loop.py, at a tiny size: it plays its rounds by the command, and no page comes of so little."""

from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from bench import learn_loop
from jaxrec.data.prepare import prepare
from tests.runs.test_train import MODEL
from tests.synthetic import markov_log


def log_of(users: int, items: int, events: int) -> pd.DataFrame:
    """All users have their first event, then all their second one, ..."""
    log = markov_log(users, items, events, stay=0.9, seed=0)
    log.columns = learn_loop.COLUMNS
    return log.assign(timestamp=1_000_000_000 + log.groupby("userId").cumcount() * 100_000 + log["userId"])


def test_the_rounds_lose_no_event_and_are_not_to_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_loop, "MODEL", MODEL)
    log_of(60, 30, 20).to_csv(tmp_path / "ratings.csv", index=False)
    work = tmp_path / "work"
    options = [str(tmp_path / "ratings.csv"), "--work", str(work), "--rounds", "1", "--epochs", "1", "--margin", "1"]
    result = CliRunner().invoke(learn_loop.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (work / "learn_loop.md").read_text()
    assert "- not to be published: rounds: 1 of 3" in page
    assert "- not to be published: events: 1200 of 100000" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert rows[1][1:5] == ["60", "360", "0", "360"]
    [trained] = [row[1] for row in rows if row[0] == "`train`"]
    assert trained.startswith("killed after ")
    assert ", attempt 2: " in trained
    assert "Of 840 + 360 events, 0 are missing in the data of the loop after the last round, and 0 are there" in page
    assert "NDCG@10 on the new held-out events of 60 users" in page


def test_rows_that_are_missing_or_twice_are_counted(tmp_path: Path) -> None:
    log = log_of(20, 8, 12)
    log.to_csv(tmp_path / "ratings.csv", index=False)
    prepare(tmp_path / "ratings.csv", out=tmp_path / "data")
    assert learn_loop.differences(log, tmp_path / "data") == (0, 0)
    assert learn_loop.differences(log.iloc[3:], tmp_path / "data") == (0, 3)
    changed = log.assign(timestamp=log["timestamp"].where(log.index > 0, 1))
    assert learn_loop.differences(changed, tmp_path / "data") == (1, 1)
