"""append(prepare(a), b) is prepare(a + b), but for the order of ids; what was known keeps its index."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.cli.main import main
from jaxrec.config import FilterOn, PrepareConfig, RatingScale, Repeats, SplitKind, Ties
from jaxrec.data.append import KnownEvents, append
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.store import check_prepared, read_prepared
from jaxrec.errors import DataError, NoUsableRow
from tests.logs import by_user

Row = tuple[int, int, float, int]
COLUMNS = ["userId", "movieId", "rating", "timestamp"]
EVERYTHING = PrepareConfig(1, 1, rating_scale=RatingScale(0.5, 5.0))
A = [(5, 30, 4.0, 300), (5, 10, 3.0, 100), (9, 10, 5.0, 50), (9, 20, 1.0, 60), (9, 30, 2.0, 70)]
B = [(5, 20, 2.0, 200), (7, 25, 2.0, 10), (7, 10, 2.0, 20), (9, 20, 1.0, 61)]


def csv(path: Path, rows: list[Row]) -> Path:
    pd.DataFrame(rows, columns=COLUMNS).to_csv(path, index=False)
    return path


def stepwise(folder: Path, a: list[Row], b: list[Row], config: PrepareConfig) -> tuple[PreparedData, PreparedData]:
    """prepare(a), and append(prepare(a), b) in another folder."""
    first = prepare(csv(folder / "a.csv", a), None, config, out=folder / "first")
    return first, append(folder / "first", csv(folder / "b.csv", b), out=folder / "both")


def test_append_by_hand(tmp_path: Path) -> None:
    first, both = stepwise(tmp_path, A, B, EVERYTHING)
    assert first.users.raw_ids.tolist() == [5, 9]
    assert both.users.raw_ids.tolist() == [5, 9, 7]
    assert both.catalog.ids.raw_ids.tolist() == [10, 20, 30, 25]
    assert by_user(both) == {
        5: ([(100, 10, 3.0), (200, 20, 2.0), (300, 30, 4.0)], 1, [1], [2]),
        9: ([(50, 10, 5.0), (60, 20, 1.0), (61, 20, 1.0), (70, 30, 2.0)], 2, [2], [3]),
        7: ([(10, 25, 2.0), (20, 10, 2.0)], 2, [], []),
    }
    assert check_prepared(tmp_path / "both") > 0


rows = st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from([0.5, 3.0, 5.0]), st.integers(0, 9))
logs = st.lists(rows, min_size=2, max_size=50, unique_by=lambda row: (row[0], row[1], row[3]))
# What equality holds for with any filter: here neither a known user nor a known item can drop out.
KEEPING = [
    (SplitKind.LEAVE_ONE_OUT, FilterOn.LOG),
    (SplitKind.USER_HELD_OUT, FilterOn.LOG),
    (SplitKind.TEMPORAL, FilterOn.LOG),
]


@settings(max_examples=60, deadline=None)
@given(logs, st.data(), st.sampled_from(KEEPING), st.sampled_from(list(Ties)), st.integers(1, 3))
def test_append_equals_preparing_both(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[Row],
    data: st.DataObject,
    kind: tuple[SplitKind, FilterOn],
    ties: Ties,
    minimum: int,
) -> None:
    folder = tmp_path_factory.mktemp("append")
    cut = data.draw(st.integers(1, len(log) - 1))
    split, filter_on = kind
    if split is SplitKind.TEMPORAL:
        log = sorted(log, key=lambda row: row[3])  # what is added is not older, so that the cut does not move back
    config = PrepareConfig(minimum, minimum, split, ties, EVERYTHING.rating_scale, 3, filter_on)
    try:
        first, both = stepwise(folder, log[:cut], log[cut:], config)
    except DataError as error:  # too little is left of a, or of both
        assert "left" in str(error)  # noqa: PT017 - any other error is a failure
        return
    whole = prepare(csv(folder / "whole.csv", log), None, config, out=folder / "whole")
    assert by_user(both) == by_user(whole)
    assert sorted(both.catalog.ids.raw_ids.tolist()) == whole.catalog.ids.raw_ids.tolist()
    assert {**both.summary()} == {**whole.summary()}
    known = len(first.catalog)
    assert both.catalog.ids.raw_ids[:known].tolist() == first.catalog.ids.raw_ids.tolist()
    assert both.users.raw_ids[: len(first.users)].tolist() == first.users.raw_ids.tolist()
    assert both.log is not None
    assert whole.log is not None
    assert both.log.events.event_count == whole.log.events.event_count == len(log)


def test_what_was_rare_comes_back_with_its_old_events(tmp_path: Path) -> None:
    config = dataclasses.replace(EVERYTHING, min_movie_ratings=2)
    a = [(1, 10, 3.0, 1), (2, 10, 3.0, 2), (1, 20, 3.0, 3), (2, 20, 3.0, 4), (1, 99, 3.0, 5)]
    first, both = stepwise(tmp_path, a, [(2, 99, 3.0, 6)], config)
    assert 99 not in first.catalog.ids.raw_ids
    assert both.catalog.ids.raw_ids.tolist() == [10, 20, 99]
    assert by_user(both)[1][0] == [(1, 10, 3.0), (3, 20, 3.0), (5, 99, 3.0)]


def test_known_ids_keep_their_index_where_the_filter_would_now_drop_them(tmp_path: Path) -> None:
    config = dataclasses.replace(EVERYTHING, filter_on=FilterOn.TRAINING)
    a = [(1, 10, 3.0, 1), (1, 20, 3.0, 2), (2, 30, 3.0, 3), (2, 40, 3.0, 4)]  # two events each: all of them train
    first, both = stepwise(tmp_path, a, [(1, 30, 3.0, 5)], config)
    assert both.catalog.ids.raw_ids.tolist() == first.catalog.ids.raw_ids.tolist() == [10, 20, 30, 40]
    assert by_user(both)[1][0] == [(1, 10, 3.0), (5, 30, 3.0)]  # movie 20 is not in training any more


def test_an_event_that_is_there_already_is_left_out_or_a_bad_row(tmp_path: Path) -> None:
    config = dataclasses.replace(EVERYTHING, repeats=Repeats.FAIL)
    prepare(csv(tmp_path / "a.csv", A), None, config, out=tmp_path / "data")
    again = csv(tmp_path / "b.csv", [*B, A[0]])
    with pytest.raises(DataError, match=r"b\.csv:6: repeats an event that is in the"):
        append(tmp_path / "data", again, out=tmp_path / "data")
    data = append(tmp_path / "data", again, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    assert data.input["repeats_left_out"] == data.input["bad_rows"] == 1
    assert data.input["rows"] == len(B) + 1
    assert data.histories.event_count == len(A) + len(B)
    rated = append(prepare(csv(tmp_path / "a.csv", A), None, EVERYTHING), again)
    assert (rated.input["rows"], rated.input["repeats_left_out"], rated.input["bad_rows"]) == (len(B) + 1, 1, 0)
    assert rated.histories.event_count == len(A) + len(B)


def test_a_file_that_was_appended_before_is_refused_unless_repeats_are_told(tmp_path: Path) -> None:
    first, again = csv(tmp_path / "a.csv", A), csv(tmp_path / "again.csv", A)
    with pytest.raises(DataError, match=rf"again\.csv: {len(A)} of {len(A)} events are in the data already"):
        append(prepare(first, None, EVERYTHING), again)
    keep = dataclasses.replace(EVERYTHING, repeats=Repeats.KEEP)
    kept = append(prepare(first, None, keep), again)
    assert (kept.histories.event_count, kept.input["repeats"], kept.input["repeats_left_out"]) == (
        2 * len(A),
        len(A),
        0,
    )


def test_known_events_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    data, again = prepare(csv(tmp_path / "a.csv", A), None, EVERYTHING), csv(tmp_path / "again.csv", A)
    both = append(data, csv(tmp_path / "both.csv", [*A, *B]), known_events=KnownEvents.LEAVE_OUT)
    assert by_user(both) == by_user(append(data, csv(tmp_path / "b.csv", B)))
    assert both.input["known_left_out"] == len(A)
    with pytest.raises(NoUsableRow, match="all of its 5 usable events are in the data already"):
        append(data, again, known_events=KnownEvents.LEAVE_OUT)


def test_titles_of_new_movies_and_of_those_that_were_rare(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("movieId,title,genres\n10,Ten,Drama\n20,Twenty,War\n30,Thirty,War\n25,Old,War\n")
    (tmp_path / "new.csv").write_text("movieId,title,genres\n77,New,Comedy\n")
    prepare(csv(tmp_path / "a.csv", A), tmp_path / "m.csv", EVERYTHING, out=tmp_path / "data")
    added = csv(tmp_path / "b.csv", [*B, (5, 77, 3.0, 900)])
    data = append(tmp_path / "data", added, tmp_path / "new.csv", out=tmp_path / "data")
    assert data.catalog.titles == ("Ten", "Twenty", "Thirty", "Old", "New")


def test_the_command_replaces_the_data_and_does_not_need_the_old_files(tmp_path: Path) -> None:
    prepare(csv(tmp_path / "a.csv", A), None, EVERYTHING, out=tmp_path / "data")
    (tmp_path / "a.csv").unlink()
    result = CliRunner().invoke(main, ["append", str(tmp_path / "data"), str(csv(tmp_path / "b.csv", B))])
    assert result.exit_code == 0, result.output
    assert "rows: 4\n" in result.output
    assert "events: 9\n" in result.output
    assert CliRunner().invoke(main, ["check", str(tmp_path / "data")]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.csv", "data"]


def test_bad_rows_leave_the_data_as_it_was(tmp_path: Path) -> None:
    before = prepare(csv(tmp_path / "a.csv", A), None, EVERYTHING, out=tmp_path / "data")
    with pytest.raises(DataError, match=r"b\.csv:2: rating 9.0 is outside 0.5..5"):
        append(tmp_path / "data", csv(tmp_path / "b.csv", [(1, 1, 9.0, 1)]), out=tmp_path / "data")
    assert by_user(read_prepared(tmp_path / "data")) == by_user(before)
    shutil.rmtree(tmp_path / "data/log")
    with pytest.raises(DataError, match="missing"):
        append(tmp_path / "data", csv(tmp_path / "b.csv", B), out=tmp_path / "data")


def test_text_ids_and_implicit_logs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("userId,movieId,timestamp\nann,x,1\nann,y,2\nbob,x,3\n")
    (tmp_path / "b.csv").write_text("userId,movieId,timestamp\nann,w,3\ncid,y,2\n")
    first = prepare(tmp_path / "a.csv", None, PrepareConfig(1, 1), out=tmp_path / "data")
    assert first.config.rating_scale is None
    both = append(tmp_path / "data", tmp_path / "b.csv", out=tmp_path / "data")
    assert both.catalog.ids.raw_ids.tolist() == ["x", "y", "w"]
    assert both.users.raw_ids.tolist() == ["ann", "bob", "cid"]
    assert np.isnan(both.histories.ratings).all()


def test_rows_that_were_set_aside_before_stay_in_quarantine(tmp_path: Path) -> None:
    header = "userId,movieId,rating,timestamp\n"
    good = "".join(f"{user},{item},3.5,{1000 + item}\n" for user in (1, 2) for item in (1, 2, 3))
    (tmp_path / "a.csv").write_text(header + good + "1,9,99,5000\n")
    (tmp_path / "b.csv").write_text(header + "2,4,2.5,6000\n2,5,77,6001\n")
    out, quarantine = tmp_path / "data", OnBadRows.QUARANTINE
    prepare(tmp_path / "a.csv", None, PrepareConfig(1, 1), out=out, on_bad_rows=quarantine)
    append(out, tmp_path / "b.csv", out=out, on_bad_rows=quarantine)
    assert pd.read_csv(out / "quarantine.csv")["value"].tolist() == [99, 77]
    (tmp_path / "c.csv").write_text(header + "2,6,2.5,7000\n")
    append(out, tmp_path / "c.csv", out=out)
    assert pd.read_csv(out / "quarantine.csv")["value"].tolist() == [99, 77]
    check_prepared(out)


def test_whole_numbers_are_text_where_the_ids_are(tmp_path: Path) -> None:
    frame = pd.DataFrame({"userId": [1, 1, 2], "movieId": [1, 2, 1], "rating": [4.0, 4.5, 3.0], "timestamp": [1, 2, 3]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.assign(timestamp=[11, 12, 13]).to_parquet(tmp_path / "b.parquet")
    options = ReadOptions(users=IdKind.TEXT, items=IdKind.TEXT)
    prepare(tmp_path / "a.csv", None, PrepareConfig(1, 1), out=tmp_path / "data", options=options)
    data = append(tmp_path / "data", tmp_path / "b.parquet", out=tmp_path / "data")
    assert data.users.raw_ids.tolist() == ["1", "2"]
    assert data.histories.event_count == 6


def test_frames_are_appended_in_memory_to_data_that_was_opened_or_not(tmp_path: Path) -> None:
    on_disk = stepwise(tmp_path, A, B, EVERYTHING)[1]
    a, b = (pd.DataFrame(rows, columns=COLUMNS) for rows in (A, B))
    in_memory = prepare(a, None, EVERYTHING)
    for first in (in_memory, read_prepared(tmp_path / "first"), tmp_path / "first"):
        both = append(first, b)
        assert by_user(both) == by_user(on_disk)
        assert both.catalog.ids.raw_ids.tolist() == on_disk.catalog.ids.raw_ids.tolist()
        assert both.folder is None
    twice = append(append(in_memory, b[:2]), b[2:])
    assert by_user(twice) == by_user(on_disk)
