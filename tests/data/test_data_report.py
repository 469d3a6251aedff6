"""The data report: values counted by hand on seven events, and bounded memory on mapped columns."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from jaxrec.config import PrepareConfig, RatingScale
from jaxrec.data import report as data_report
from jaxrec.data.histories import Histories
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.report import build_report, write_report
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER

DAY = 86_400
JAN, FEB, SEP = (int(np.datetime64(day, "s").astype(int)) for day in ("2001-01-31", "2001-02-01", "2001-09-01"))
LOG = pd.DataFrame(
    [
        (1, 10, 4.0, JAN),
        (1, 20, 4.0, JAN),  # tied
        (1, 30, 0.5, FEB),
        (2, 10, 5.0, FEB),  # the time of user 1's last event: no tie
        (2, 20, np.nan, FEB),  # tied
        (2, 30, 4.5, FEB),  # tied
        (3, 10, 3.0, SEP),
    ],
    columns=[USER, ITEM, RATING, TIME],
)
MOVIES = pd.DataFrame(
    [(10, "A", "Drama|War"), (20, "B", "Drama"), (30, "C", "(no genres listed)"), (40, "D", "Comedy")],
    columns=[ITEM, TITLE, GENRES],
)


@pytest.fixture
def tiny() -> PreparedData:
    return prepare(LOG, MOVIES, PrepareConfig(0, 0, rating_scale=RatingScale(0.5, 5.0)))


def test_counts_by_hand(tiny: PreparedData) -> None:
    report = build_report(dataclasses.replace(tiny, input={"duplicates": 2}))
    assert (report["users"], report["items"], report["events"]) == (3, 4, 7)
    assert (report["first_time"], report["last_time"]) == ("2001-01-31T00:00:00Z", "2001-09-01T00:00:00Z")
    assert report["rating_scale"] == "0.5..5"
    assert report["ratings"] == {"0.5": 1, "3": 1, "4": 2, "4.5": 1, "5": 1}
    assert report["missing_ratings"] == 1
    assert report["input"] == {"duplicates": 2}


def test_history_lengths_by_hand(tiny: PreparedData) -> None:
    report = build_report(tiny)
    lengths = report["history_lengths"]  # 3, 3, 1
    assert (lengths["min"], lengths["median"], lengths["max"]) == (1, 3, 3)
    assert lengths["mean"] == pytest.approx(7 / 3)
    assert report["history_length_histogram"] == {"from": [0, 1, 2], "users": [0, 1, 2]}


def test_popularity_and_genres_by_hand(tiny: PreparedData) -> None:
    report = build_report(tiny)  # 3, 2, 2 and 0 events
    assert report["popularity"]["top_1_percent"] == pytest.approx(3 / 7)
    assert report["popularity"]["curve"][-2:] == pytest.approx([5 / 7, 1])
    assert report["popularity"]["items_without_events"] == 1
    assert report["genre_shares"] == pytest.approx({"Comedy": 0, "Drama": 5 / 7, "War": 3 / 7})


def test_ties_by_hand(tiny: PreparedData) -> None:
    report = build_report(tiny)
    assert report["tied_events"] == 3
    assert report["tie_rate"] == pytest.approx(3 / 7)
    over_time = report["over_time"]
    assert over_time["unit"] == "month"
    assert over_time["starts"] == [f"2001-{month:02d}" for month in range(1, 10)]
    assert over_time["events"] == [2, 4, 0, 0, 0, 0, 0, 0, 1]
    assert over_time["tied"] == [1, 2, 0, 0, 0, 0, 0, 0, 0]


def test_a_short_log_is_counted_by_day() -> None:
    over_time = build_report(prepare(LOG[LOG[TIME] < SEP], None, PrepareConfig(0, 0)))["over_time"]
    assert over_time == {"unit": "day", "starts": ["2001-01-31", "2001-02-01"], "events": [2, 4], "tied": [1, 2]}


def test_without_ratings_and_genres(tmp_path: Path) -> None:
    report = write_report(prepare(LOG.assign(rating=np.nan), None, PrepareConfig(0, 0)), tmp_path)
    assert report["ratings"] == {}
    assert report["rating_scale"] is None
    assert report["missing_ratings"] == 7
    assert report["genre_shares"] == {}


def test_a_long_scale_is_shown_in_twenty_steps() -> None:
    log = LOG.assign(rating=[0.0, 2.4, 2.6, 50, 99, 100, 100])
    report = build_report(prepare(log, None, PrepareConfig(0, 0, rating_scale=RatingScale(0, 100))))
    assert report["ratings"] == {"0": 2, "5": 1, "50": 1, "100": 3}


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_the_size_of_the_chunks_changes_nothing(
    chunk: int, tiny: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build_report(tiny)
    monkeypatch.setattr(data_report, "CHUNK", chunk)
    assert build_report(tiny) == expected


def test_mapped_columns_give_the_same_report(small_data: PreparedData, tmp_path: Path) -> None:
    mapped = {}
    for name, column in dataclasses.asdict(small_data.histories).items():
        np.save(tmp_path / f"{name}.npy", column)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    assert build_report(dataclasses.replace(small_data, histories=Histories(**mapped))) == build_report(small_data)


def test_files(small_data: PreparedData, tmp_path: Path) -> None:
    report = write_report(small_data, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    height, width, _ = image.imread(tmp_path / "report.png").shape
    assert (width, height) == (1500, 800)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]
