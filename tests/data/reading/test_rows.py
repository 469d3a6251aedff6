"""Every row of a file is an event, a row in quarantine, or named in the error, whatever quotes and lines it has."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import PrepareConfig, Repeats
from jaxrec.data.prepare import prepare
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.data.reading.lines import BLOCK, blocks, lines_at
from jaxrec.data.reading.movies import read_movies
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.reading.text_file import AMBIGUOUS
from jaxrec.data.schema import GENRES, TITLE
from jaxrec.errors import DataError

HEADER = "user,item,name,time"
EVERYTHING = PrepareConfig(0, 0, repeats=Repeats.KEEP)


def write(path: Path, rows: list[str], end: str = "\n", header: str = HEADER) -> Path:
    path.write_bytes(end.join([header, *rows, ""]).encode("utf-8", "surrogateescape"))
    return path


def accounted(path: Path, out: Path) -> tuple[list[tuple[str, str, int]], list[int]]:
    """The events as (user, item, time), by time, and the lines in quarantine."""
    data = prepare(path, None, EVERYTHING, out=out, on_bad_rows=OnBadRows.QUARANTINE)
    assert data.log is not None
    log = data.log
    assert data.input["rows"] == log.events.event_count + data.input["bad_rows"]
    lines = []
    if data.input["bad_rows"]:
        with open(out / "quarantine.csv", newline="", encoding="utf-8") as file:
            lines = [int(row["line"]) for row in csv.DictReader(file)]
    assert len(lines) == data.input["bad_rows"]
    users = log.users.raw_ids[log.events.users()]
    items = log.items.raw_ids[log.events.items - 1]
    events = zip(users.tolist(), items.tolist(), log.events.times.tolist(), strict=True)
    return sorted(events, key=lambda event: event[2]), lines


def row(number: int, name: str = "plain") -> str:
    return f"u{number},i{number % 3},{name},{1_500_000_000 + number}"


def event(number: int) -> tuple[str, str, int]:
    return (f"u{number}", f"i{number % 3}", 1_500_000_000 + number)


# Each case: the rows of the file, which of them (from 0) are events, and which lines are set aside.
SITUATIONS = {
    "a quote opens in one name and closes in another": (
        [row(0), row(1, '"Heroes'), row(2), row(3, 'Blue 12"'), row(4)],
        [0, 1, 2, 3, 4],
        [],
    ),
    # Two rows, the second one broken, or one row whose name has a line break: another time, or a row less.
    "a stray quote that a later broken line closes": (
        [row(0), row(1, '"Heroes'), 'u9,i9,Low, live",1500000009', row(4)],
        [0, 4],
        [3, 4],
    ),
    "a stray quote that a broken line closes after an empty one": (
        [row(0), row(1, '"Heroes'), "", 'u9,i9,Low, live",1500000009', row(5)],
        [0, 5],
        [3, 5],
    ),
    "a stray quote after backslashes that a later broken line closes": (
        [row(0), row(1, '"best, the \\""'), 'Low, live",1500000009', row(4)],
        [0, 4],
        [3, 4],
    ),
    "a stray quote, and a whole row before the line that closes it": (
        [row(0), row(1, '"Heroes'), row(2), 'u9,i9,Low, live",1500000009', row(4)],
        [0, 1, 2, 4],
        [5],
    ),
    "a line break after what is no time of the log": (
        [row(0), 'u1,i1,"May, 2001', f'rest",{event(1)[2]}', row(3)],
        [0, 1, 3],
        [],
    ),
    "a line break after what could be a time of the log": (
        [row(0), 'u1,i1,"May, 1500000005', 'rest",1500000001', row(4)],
        [0, 4],
        [3, 4],
    ),
    "a quote that never closes": ([row(0), row(1, '"Heroes'), row(2)], [0, 1, 2], []),
    "inches within a name": ([row(0, 'Blue 12" disc'), row(1)], [0, 1], []),
    "a quoted name with the delimiter": ([row(0, '"Heroes, the"'), row(1)], [0, 1], []),
    "a quoted name with quotes": ([row(0, '"the ""best"" of"'), row(1)], [0, 1], []),
    "a quoted name over two lines": ([row(0), row(1, '"two\nlines"'), row(2)], [0, 1, 2], []),
    "a quoted name over four lines, one of them empty": ([row(0, '"a\n\nb, c\nd"'), row(1)], [0, 1], []),
    "backslashes before quotes": ([row(0, '"the \\"best\\", of"'), row(1)], [0, 1], []),
    "a delimiter at the end of a row": ([row(0, '"a" b'), row(1) + ",", row(2)], [0, 1, 2], []),
    "text after a closing quote": ([row(0, '"a" b'), row(1)], [0, 1], []),
    "a quote in an id that does not close": ([row(0), 'u1,"i1,plain,1500000001', row(2)], [0, 2], [3]),
    "a line break within an id": ([row(0), 'u1,"i\n1",plain,1500000001', row(2)], [0, 2], [3]),
    "too few and too many fields": ([row(0), "u1,i1", row(2), row(3) + ",5"], [0, 2], [3, 5]),
    "empty lines": ([row(0), "", "  ", row(4), ""], [0, 4], []),
    "NUL in a name": ([row(0, "a\0b"), row(1)], [0, 1], []),
    "NUL in an id": ([row(0), "u1,i\0,plain,1500000001", row(2)], [0, 2], [3]),
    "bytes that are no text, in a name and in an id": (
        [row(0, "Zo\u00eb"), row(1, "\udcff"), "u2,i\udcff,plain,1500000002", row(3), '"', row(5)],
        [0, 1, 3, 5],
        [4, 6],
    ),
    "an id of 512 characters and one of 513": (
        [row(0), f"u1,{'x' * 513},plain,1500000001", f"u2,{'x' * 512},plain,1500000002"],
        None,
        [3],
    ),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("case", SITUATIONS)
def test_each_situation_gives_the_right_rows(tmp_path: Path, case: str, end: str) -> None:
    rows, expected, aside = SITUATIONS[case]
    events, lines = accounted(write(tmp_path / "log.csv", rows, end), tmp_path / "data")
    assert lines == aside
    if expected is None:
        assert events == [event(0), ("u2", "x" * 512, 1_500_000_002)]
    else:
        assert events == [event(number) for number in expected]


def test_lines_that_end_in_returns_alone_or_in_several_ways(tmp_path: Path) -> None:
    rows = [row(number) for number in range(6)]
    expected = [event(number) for number in range(6)]
    path = tmp_path / "log.csv"
    for text in ("\r".join([HEADER, *rows]), "\r\n".join([HEADER, *rows[:3]]) + "\n" + "\r".join(rows[3:])):
        path.write_bytes(text.encode())
        assert accounted(path, tmp_path / "data") == (expected, [])


words = st.text(st.sampled_from(['"', "'", "\n", "\r", "\0", "a", "é", "日", " ", "1", "\\"]), max_size=6)
# With more delimiters a line of such a name could be a row by itself, which is never taken for a part of a name. Its
# first line can be one here, too, but with a time of six digits at most, while those of the rows have ten.
names = st.builds(lambda *parts: "".join(parts), words, st.sampled_from(["", ",", ";", "\t", "|"]), words)
ends = st.sampled_from(["\n", "\r\n"])


@settings(max_examples=60, deadline=None)
@given(st.lists(names, min_size=1, max_size=12), st.sampled_from(",;\t|"), ends, st.booleans())
def test_a_well_formed_file_is_read_whole_whatever_its_names_hold(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], delimiter: str, end: str, mark: bool
) -> None:
    folder = tmp_path_factory.mktemp("whole")
    buffer = io.StringIO(newline="")
    # Python would leave a lone CR without quotes.
    quoting = csv.QUOTE_ALL if any("\r" in text for text in texts) else csv.QUOTE_MINIMAL
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(HEADER.split(","))
    for number, text in enumerate(texts):
        writer.writerow([f"u{number}", f"i{number % 3}", text, 1_500_000_000 + number])
    path = folder / "log.csv"
    path.write_bytes(buffer.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    if len(texts) < 2:
        return  # one item only
    assert accounted(path, folder / "data") == ([event(number) for number in range(len(texts))], [])


stray = st.text(st.sampled_from(['"', "a", "'", "é", " "]), max_size=6)


@settings(max_examples=80, deadline=None)
@given(st.lists(stray, min_size=3, max_size=12), ends, st.sampled_from([",", "\t"]))
def test_stray_quotes_in_names_lose_no_row(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str, delimiter: str
) -> None:
    folder = tmp_path_factory.mktemp("stray")
    rows = [row(number, text).replace(",", delimiter) for number, text in enumerate(texts)]
    path = write(folder / "log.csv", rows, end, HEADER.replace(",", delimiter))
    # A well-formed name may look like "a" b: whatever it is, the line has its own user, item and time.
    assert accounted(path, folder / "data") == ([event(number) for number in range(len(texts))], [])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(stray | st.sampled_from(['"Heroes', 'live"']), st.sampled_from(["{}", "Low,{}", "{},Low"])),
        min_size=1,
        max_size=10,
    )
)
def test_no_row_with_a_stray_quote_gets_the_time_of_a_broken_line(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    """A broken line has a delimiter too many. Each line is an event of its own, or set aside."""
    folder = tmp_path_factory.mktemp("broken")
    rows = [row(number, broken.format(text)) for number, (text, broken) in enumerate(texts)]
    rows += [row(number) for number in range(len(rows), len(rows) + 3)]
    events, aside = accounted(write(folder / "log.csv", rows), folder / "data")
    numbers = [number for number in range(len(rows)) if number + 2 not in aside]
    assert events == [event(number) for number in numbers]
    # Quotes may close around both.
    assert not any(broken != "{}" and '"' not in text and at in numbers for at, (text, broken) in enumerate(texts))


@settings(max_examples=30, deadline=None)
@given(st.lists(names, min_size=2, max_size=8), st.sampled_from(["", "{", "[1]", "null", '{"user": ']))
def test_json_lines_are_accounted_for(tmp_path_factory: pytest.TempPathFactory, texts: list[str], broken: str) -> None:
    folder = tmp_path_factory.mktemp("json")
    records = [
        json.dumps({"user": f"u{n}", "item": f"i{n % 3}", "name": text, "time": 1_500_000_000 + n})
        for n, text in enumerate(texts)
    ]
    path = folder / "log.jsonl"
    path.write_text("\n".join([*records, broken]) + "\n", encoding="utf-8")
    events, lines = accounted(path, folder / "data")
    assert events == [event(number) for number in range(len(texts))]
    assert lines == ([len(texts) + 1] if broken else [])


IDS, LAST = "user,item,name,time", "user,item,time,name"
RATED = "user,item,time,name,rating"
# The header, the lines after a good row, and the event that they are; none: they are set aside.
OTHER_LAYOUTS: dict[str, tuple[str, list[str], list[Any]]] = {
    "a stray quote after a quoted item": (IDS, ['u1,"i,1","Heroes,1500000001', 'u9,i9,Low, live",1500000009'], []),
    "a stray quote after a quoted user": (IDS, ['"u1",i1,"Heroes,1500000001', 'u9,i9,Low, live",1500000009'], []),
    "a first line with a delimiter too many": (IDS, ['u1,i1,"Heroes,x,1500000001', 'u9,i9,y,z",1500000009'], []),
    "a number far from the times": (IDS, ['u1,i1,"May, 2001', 'live",1500000001'], [("u1", "i1", 1_500_000_001, None)]),
    "a time of one digit less": (IDS, ['u1,i1,"Heroes,999999999', 'u9,i9,Low, live",1500000009'], []),
    "names last: the row that would be lost has a time": (LAST, ['u1,i1,1500000001,"He', 'u9,i9,1500000009,L, l"'], []),
    "names last: its time is elsewhere": (LAST, ['u1,i1,1500000001,"He', 'u9, Jr,i9,1500000009,live"'], []),
    "names last: its time is quoted": (LAST, ['u1,i1,"1500000001","He', 'u9,i9,1500000009,Low, live"'], []),
    "names last: a text": (LAST, ['u1,i1,1500000001,"a, 2', 'of, it, a, ll"'], [("u1", "i1", 1_500_000_001, None)]),
    "names last: a text that could be a row at no time of the log": (
        LAST,
        ['u1,i1,1500000001,"Heroes', 'and more, 1, 2, 3"'],
        [],
    ),
    "another rating": (RATED, ['u1,i1,1500000001,"Heroes,4.5', 'u9, live",3.0'], []),
    "a rating of more digits": (RATED, ['u1,i1,1500000001,"Heroes,7.75', 'u9, live",3.0'], []),
    "no rating": (RATED, ['u1,i1,1500000001,"Heroes,', 'u9, live",3.0'], [("u1", "i1", 1_500_000_001, 3.0)]),
    "what is no rating": (RATED, ['u1,i1,1500000001,"May, 2001', 'live",3.0'], [("u1", "i1", 1_500_000_001, 3.0)]),
    "another item": ("user,time,name,item", ['u1,1500000001,"Heroes,i9', 'u9, Jr, Low, live",i1'], []),
    "a text, and the item": (
        "user,time,name,item",
        ['u1,1500000001,"far away, ""crew""', 'meets, it",i1'],
        [("u1", "i1", 1_500_000_001, None)],
    ),
    "dates": (IDS, ['u1,i1,"Heroes,2017-05-01', 'u9,i9,Low, live",2017-05-02'], []),
    "dates with times": (IDS, ['u1,i1,"Heroes,2017-05-01T10:00:00+00:00', 'u9,i9,Low, live",2017-05-02'], []),
    "dates, and a year": (IDS, ['u1,i1,"May, 2001', 'live",2017-05-02'], [("u1", "i1", 1_493_683_200, None)]),
}
GOOD = {"user": "u0", "item": "i0", "name": "plain", "rating": "4.0"}


@pytest.mark.parametrize("case", OTHER_LAYOUTS)
def test_a_quote_that_may_or_may_not_go_on_is_set_aside_in_every_layout(tmp_path: Path, case: str) -> None:
    header, lines, events = OTHER_LAYOUTS[case]
    time, seconds = ("2017-05-01", 1_493_596_800) if case.startswith("dates") else ("1500000000", 1_500_000_000)
    good = [",".join({**GOOD, "item": item, "time": time}[name] for name in header.split(",")) for item in ("i0", "i2")]
    path = write(tmp_path / "log.csv", [good[0], *lines, good[1]], header=header)
    data = prepare(path, None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    if not events:
        quarantine = pd.read_csv(tmp_path / "data/quarantine.csv")
        assert quarantine["line"].tolist() == [3, 4]
        assert quarantine["text"].tolist() == lines
        assert set(quarantine["reason"]) == {AMBIGUOUS.format(first=3, last=4)}
    log = data.log
    assert log is not None
    users, items = log.users.raw_ids[log.events.users()], log.items.raw_ids[log.events.items - 1]
    ratings = log.events.ratings.tolist() if header == RATED else [None] * len(users)
    found = list(zip(users.tolist(), items.tolist(), log.events.times.tolist(), ratings, strict=True))
    rating = 4.0 if header == RATED else None
    assert sorted(found) == [("u0", "i0", seconds, rating), ("u0", "i2", seconds, rating), *events]
    assert data.input["bad_rows"] == (0 if events else 2)


def test_lines_of_a_catalogue_that_may_be_one_movie_or_two_are_refused(tmp_path: Path) -> None:
    """The first one alone would be `3,Title` of the genre `the`."""
    path = tmp_path / "movies.csv"
    path.write_text('item,title,genres\n1,Red,Comedy\n2,Blue,Drama\n3,"Title, the\nrest, of it",Comedy\n')
    with pytest.raises(DataError, match="ambiguous: lines 4 to 5"):
        read_movies(path)
    path.write_text('item,title,genres\n1,Red,Comedy\n2,Blue,Drama\n3,"Title\nthe rest, of it",Comedy\n')
    assert read_movies(path)[TITLE].tolist() == ["Red", "Blue", "Title\nthe rest, of it"]


@pytest.mark.parametrize(
    "first", ['3,Alien,"A crew, far away,', '"3","Alien","A crew, ""far"" away,', '3,Alien,"A crew, far']
)
def test_a_catalogue_with_descriptions_over_lines_is_read(tmp_path: Path, first: str) -> None:
    path = tmp_path / "movies.csv"
    path.write_text(f'item,title,description,genres\n1,Red,plain,Comedy\n{first}\nmeets it",Horror\n')
    movies = read_movies(path)
    assert movies[TITLE].tolist() == ["Red", "Alien"]
    assert movies[GENRES].tolist() == ["Comedy", "Horror"]


@pytest.mark.parametrize("kind", ["parquet", "frame"])
def test_rows_of_parquet_and_frames_are_accounted_for(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame(
        {"user": ["u0", None, "u2", "u3", "x" * 513], "item": ["i0", "i1", "i2", " i", "i4"], "time": 1_500_000_000}
    )
    frame.loc[2, "time"] = -1
    source: Path | pd.DataFrame = frame
    if kind == "parquet":
        source = tmp_path / "log.parquet"
        pd.concat([frame, frame.assign(user="u9", item="i9", time=5)]).to_parquet(source, index=False)
    else:
        source = pd.concat([frame, frame.assign(user="u9", item="i9", time=5)])
    data = prepare(source, None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    aside = pd.read_csv(tmp_path / "data/quarantine.csv")
    assert aside["line"].tolist() == [2, 3, 4, 5]
    assert aside["field"].tolist() == ["user", "time", "item", "user"]
    assert (data.input["rows"], data.histories.event_count) == (10, 6)


def test_a_bad_row_of_one_of_several_files_is_named_with_its_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", [row(0), row(1), ""])
    second = write(tmp_path / "b.csv", [row(2), 'u3,i0,"x', row(4), "u5,i2,plain,soon"])
    data = prepare([first, second], None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    aside = pd.read_csv(tmp_path / "data/quarantine.csv")
    assert list(zip(aside["file"], aside["line"], strict=True)) == [(str(second), 3), (str(second), 5)]
    assert (data.input["rows"], data.histories.event_count) == (6, 4)


def test_blocks_of_lines_cut_nowhere_but_at_line_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [b"x" * int(length) for length in rng.integers(0, 9000, 1500)]  # more than one block
    path = tmp_path / "lines"
    for end in (b"\n", b"\r\n", b"\r"):
        path.write_bytes(end.join(lines))
        assert path.stat().st_size > BLOCK
        found = [block.line(at) for block in blocks(path) for at in range(len(block))]
        assert found == lines
        assert list(lines_at(path, np.array([1, 700, 1500]))) == [lines[at].decode() for at in (0, 699, 1499)]


def test_without_quarantine_the_first_rows_of_all_kinds_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [row(0), "u1,i1,plain,soon", row(2), "u3", row(4)])
    with pytest.raises(DataError, match=r"log\.csv:3: time soon is not a time.*; .*log\.csv:5: 1 fields, expected 4$"):
        read_ratings(path)
