"""`jaxrec recommend`: the answers of the server's engine, for every shape of log that `jaxrec prepare` reads."""

import csv
import datetime
import gzip
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from jaxrec.cli.main import main
from jaxrec.runs.batch import scoring
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender

HEADER = "userId,movieId,rating,timestamp\n"
GOOD = HEADER + "7,1007,4.0,100\n7,1014,,200\n7,1021,2.5,300\n8,1028,5,50\n"
HISTORY_OF_7 = [Event("1007", 4.0, 100), Event("1014", None, 200), Event("1021", 2.5, 300)]
# Users, items, ratings and times (2017) of a log without repeats.
LOG = [
    (user, 1007 + 7 * ((3 * user + 5 * at) % 60), ((user + at) % 10 + 1) / 2, 1_500_000_000 + 86_400 * at + user)
    for user in range(1, 13)
    for at in range(8)
]


@pytest.fixture(scope="module")
def model(model_directory: Path) -> Recommender:
    return Recommender(read_artifact(model_directory), "cpu")


def recommend(model: Path, folder: Path, *options: str, requests: str | None = None, k: int = 3) -> Result:
    """Of folder/history.csv, unless an option names another log."""
    history = [] if "--history" in options else ["--history", str(folder / "history.csv")]
    arguments = ["recommend", str(model), *history, "--k", str(k), "--out", str(folder / "out.csv")]
    if requests is not None:
        (folder / "requests.csv").write_text(requests)
        arguments += ["--requests", str(folder / "requests.csv")]
    return CliRunner().invoke(main, [*arguments, "--provider", "cpu", *options])


def recommend_text(model: Path, folder: Path, history: str | bytes, *options: str, **others: str) -> Result:
    (folder / "history.csv").write_bytes(history.encode() if isinstance(history, str) else history)
    return recommend(model, folder, *options, **others)


def output(folder: Path) -> list[dict[str, str]]:
    with (folder / "out.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows(model: Recommender, user_id: str, query: Query) -> list[tuple[str, str, str, float]]:
    (answer,) = model.recommend([query])
    return [
        (user_id, str(rank), model.catalog.item_ids[item], float(score))
        for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1)
    ]


def assert_rows(found: list[dict[str, str]], expected: Sequence[tuple[str, str, str, float]]) -> None:
    assert [(row["userId"], row["rank"], row["movieId"]) for row in found] == [row[:3] for row in expected]
    scores = [float(row["score"]) for row in found]
    np.testing.assert_allclose(scores, [row[3] for row in expected], atol=1e-4)


def answers_of_log(model: Recommender, with_ratings: bool = True) -> list[tuple[str, str, str, float]]:
    """What the engine answers to each user of LOG, one by one."""
    return [
        row
        for user in range(1, 13)
        for row in rows(
            model,
            str(user),
            Query([Event(str(i), x if with_ratings else None, t) for u, i, x, t in LOG if u == user], 3),
        )
    ]


def test_every_user_of_the_history(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    result = recommend_text(model_directory, tmp_path, GOOD)
    assert result.exit_code == 0, result.output
    assert_rows(
        output(tmp_path),
        rows(model, "7", Query(HISTORY_OF_7, 3)) + rows(model, "8", Query([Event("1028", 5.0, 50)], 3)),
    )
    assert {path.name for path in tmp_path.iterdir()} == {"history.csv", "out.csv"}


def test_users_come_in_the_order_of_their_ids(model_directory: Path, tmp_path: Path) -> None:
    for history, expected in (
        ("10,1007,4,100\n9,1007,4,100\n", ["9", "10"]),
        ("u9,1007,4,100\nu10,1007,4,100\n", ["u10", "u9"]),
    ):
        assert recommend_text(model_directory, tmp_path, HEADER + history).exit_code == 0
        assert list(dict.fromkeys(row["userId"] for row in output(tmp_path))) == expected


def test_requests_see_only_the_past(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    asked = "userId,timestamp\n8,49\n7,250\n9,100\n7,300\n7,250\n"
    result = recommend_text(model_directory, tmp_path, GOOD, requests=asked)
    assert result.exit_code == 0, result.output
    of_7_at_250 = rows(model, "7", Query(HISTORY_OF_7[:2], 3, request_time=250))
    expected = [
        *rows(model, "8", Query([], 3)),
        *of_7_at_250,
        *rows(model, "9", Query([], 3)),
        *rows(model, "7", Query(HISTORY_OF_7, 3, request_time=300)),
        *of_7_at_250,
    ]
    assert_rows(output(tmp_path), expected)
    most_popular = model.catalog.by_popularity[0]
    assert output(tmp_path)[0]["movieId"] == model.catalog.item_ids[most_popular]
    assert float(output(tmp_path)[0]["score"]) == model.catalog.popularity[most_popular]


def test_requests_have_the_forms_of_a_log(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    lines = [f"u{user},{item},{rating},{moment}" for user, item, rating, moment in LOG]
    (tmp_path / "history.csv").write_text(HEADER + "\n".join(lines) + "\n")
    moment = LOG[3][3]  # of the fourth event of user 1
    iso = datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()
    expected = rows(model, "u1", Query([Event(str(i), x, t) for _, i, x, t in LOG[:4]], 3, request_time=moment))
    for text in (
        f"userId,timestamp\nu1,{moment}\n",
        f"\ufefftimestamp;note;user_id\r\n{moment};x; u1\r\n",
        f"user_id\ttimestamp\nu1\t{moment}999\n",
        f"userId,timestamp\nu1,{iso}\n",
    ):
        result = recommend(model_directory, tmp_path, requests=text)
        assert result.exit_code == 0, result.output
        assert_rows(output(tmp_path), expected)


def test_order_of_rows_and_columns_and_other_columns_do_not_matter(
    model_directory: Path, model: Recommender, tmp_path: Path
) -> None:
    text = "\ufeffnote,timestamp,movieId,userId,rating\r\nx,300,1021,7,2.5\r\n\r\nx,100,1007,7,4\r\nx,200,1014,7,\r\n"
    result = recommend_text(model_directory, tmp_path, text)
    assert result.exit_code == 0, result.output
    assert_rows(output(tmp_path), rows(model, "7", Query(HISTORY_OF_7, 3)))


def test_events_of_one_second_keep_the_order_of_the_file(
    model_directory: Path, model: Recommender, tmp_path: Path
) -> None:
    items = ["1007", "1070", "1140", "1210"]
    answers = []
    for order in (items, items[::-1]):
        text = HEADER + "".join(f"7,{item},4,100\n" for item in order)
        assert recommend_text(model_directory, tmp_path, text).exit_code == 0
        assert_rows(output(tmp_path), rows(model, "7", Query([Event(item, 4.0, 100) for item in order], 3)))
        answers.append(output(tmp_path))
    assert answers[0] != answers[1]


def test_items_of_the_history_are_excluded(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text(GOOD)
    assert recommend(model_directory, tmp_path, k=1000).exit_code == 0
    of_7 = {row["movieId"] for row in output(tmp_path) if row["userId"] == "7"}
    assert of_7 == set(model.catalog.item_ids) - {"", "1007", "1014", "1021"}


@pytest.mark.parametrize("with_requests", [False, True])
def test_batches_do_not_change_answers(
    model_directory: Path,
    model: Recommender,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_requests: bool,
) -> None:
    monkeypatch.setattr(scoring, "ANSWERED_AT_ONCE", 4)
    monkeypatch.setattr(scoring, "BATCHES_OF_PART", 2)
    monkeypatch.setattr(scoring, "EVENTS_OF_PART", 100)
    rng = np.random.default_rng(0)
    events = {
        str(user): [Event(str(1000 + 7 * rng.integers(1, 61)), None, at) for at in range(rng.integers(1, 40))]
        for user in range(21)
    }
    text = HEADER + "".join(f"{user},{e.item_id},,{e.timestamp}\n" for user, es in events.items() for e in es)
    asked = "userId,timestamp\n" + "".join(f"{user},{len(es)}\n" for user, es in reversed(events.items()))
    more = {"requests": asked} if with_requests else {}
    assert recommend_text(model_directory, tmp_path, text, **more).exit_code == 0
    if with_requests:
        one_by_one = [(u, Query(es, 3, request_time=len(es))) for u, es in reversed(events.items())]
    else:
        one_by_one = [(user, Query(es, 3)) for user, es in events.items()]
    assert_rows(output(tmp_path), [row for user, query in one_by_one for row in rows(model, user, query)])


def delimited(separator: str, header: str = HEADER) -> str:
    lines = [header.strip().replace(",", separator), *(separator.join(map(str, row)) for row in LOG)]
    return "\n".join(lines) + "\n"


def timed(form: Callable[[int], object]) -> str:
    return HEADER + "".join(f"{user},{item},{rating},{form(moment)}\n" for user, item, rating, moment in LOG)


def write_parquet(folder: Path) -> list[str]:
    frame = pd.DataFrame(LOG, columns=HEADER.strip().split(","))
    (folder / "parts").mkdir()
    for part, name in ((frame[:50], "a"), (frame[50:], "b")):
        path = folder / "parts" / f"{name}.parquet"
        duckdb.from_df(part, connection=duckdb.connect()).write_parquet(str(path))
    return ["--history", str(folder / "parts")]


def write_gzip(folder: Path) -> list[str]:
    with gzip.open(folder / "log.csv.gz", "wt") as file:
        file.write(delimited(","))
    return ["--history", str(folder / "log.csv.gz")]


def write_zip(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "ml.zip", "w") as archive:
        archive.writestr("ml/ratings.csv", delimited(","))
    return ["--history", str(folder / "ml.zip")]


def write_text(text: str, *options: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / "history.csv").write_text(text)
        return list(options)

    return write


def write_dat(folder: Path) -> list[str]:
    text = "".join(f"{u}::{i}::{x}::{t}\n" for u, i, x, t in LOG)
    (folder / "ratings.dat").write_text(text)
    return ["--history", str(folder / "ratings.dat")]


def write_json_lines(folder: Path) -> list[str]:
    frame = pd.DataFrame(LOG, columns=["reviewerID", "asin", "overall", "unixReviewTime"])
    frame.to_json(folder / "log.jsonl", orient="records", lines=True)
    return ["--history", str(folder / "log.jsonl")]


def write_two_files(folder: Path) -> list[str]:
    lines = delimited(",").splitlines(keepends=True)
    (folder / "old.csv").write_text("".join(lines[:40]))
    (folder / "new.csv").write_text(lines[0] + "".join(lines[40:]))
    return ["--history", str(folder / "old.csv"), "--history", str(folder / "new.csv")]


def write_utf_16(folder: Path) -> list[str]:
    (folder / "history.csv").write_text(delimited("\t"), encoding="utf-16")
    return []


def iso(moment: int) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()


OWN_NAMES = ("--user-col", "who", "--item-col", "what", "--rating-col", "how", "--time-col", "when")
SHAPES = {
    "plain": write_text(delimited(",")),
    "semicolon": write_text(delimited(";")),
    "tab": write_text(delimited("\t")),
    "spaces": write_text(delimited(", ")),
    "names": write_text(delimited(",", "user_id,item_id,rating,timestamp")),
    "own names": write_text(delimited(",", "who,what,how,when"), *OWN_NAMES),
    "text ids": write_text(delimited(","), "--ids", "text"),
    "milliseconds": write_text(timed(lambda moment: moment * 1000)),
    "milliseconds, told": write_text(timed(lambda moment: moment * 1000), "--time-unit", "milliseconds"),
    "iso": write_text(timed(iso)),
    "quoted": write_text(timed(lambda moment: f'"{moment}"')),
    "gzip": write_gzip,
    "zip": write_zip,
    "parquet": write_parquet,
    "dat": write_dat,
    "json lines": write_json_lines,
    "two files": write_two_files,
    "utf-16": write_utf_16,
    "no header": write_text(delimited(",").split("\n", 1)[1], "--columns", "user,item,rating,time"),
    "repeats": write_text(delimited(",") + "1,1028,1.0,1500000001\n"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_log_gives_the_same_answers(
    model_directory: Path, model: Recommender, tmp_path: Path, shape: str
) -> None:
    options = SHAPES[shape](tmp_path)
    result = recommend(model_directory, tmp_path, *options)
    assert result.exit_code == 0, result.output
    expected = answers_of_log(model)
    if shape == "text ids":
        expected.sort(key=lambda row: row[0])
    assert_rows(output(tmp_path), expected)


def test_a_log_without_ratings(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    text = "userId,movieId,timestamp\n" + "".join(f"{user},{item},{moment}\n" for user, item, _, moment in LOG)
    assert recommend_text(model_directory, tmp_path, text).exit_code == 0
    assert_rows(output(tmp_path), answers_of_log(model, with_ratings=False))


def test_a_model_without_ratings_takes_any(model_directory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_directory, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"rating_scale": None}))
    unrated = Recommender(read_artifact(folder), "cpu")
    answers = []
    for rating in ("", "0", "97"):
        result = recommend_text(folder, tmp_path, HEADER + f"7,1007,{rating},100\n7,1014,5,101\n")
        assert result.exit_code == 0, result.output
        answers.append(output(tmp_path))
    assert_rows(answers[0], rows(unrated, "7", Query([Event("1007", None, 100), Event("1014", None, 101)], 3)))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("", "history.csv: the file is empty; expected the header userId,movieId,rating,timestamp"),
        ("userId,movieId,rating\n", "history.csv:1: column timestamp .* is missing"),
        (HEADER, "history.csv: no rows after the header"),
        (HEADER + "7,1007,4.0,100\n7,1007,x,100\n", "history.csv:3: rating x is not a number"),
        (HEADER + "7,1007,7.5,100\n", r"history.csv:2: rating 7.5 is outside 0.5..5"),
        (HEADER + "7,1007,nan,100\n", r"history.csv:2: rating nan is not a number"),
        (HEADER + "7,1007,4.0,100\n7,1014,4.0,soon\n", "history.csv:3: timestamp soon is not a time"),
        (HEADER + "7,1007,4.0,-1\n", "history.csv:2: timestamp -1 is not a time"),
        (HEADER + "7,1007,4.0,4000000000\n", "history.csv:2: timestamp .*a day from now"),
        (HEADER + ",1007,4.0,1\n", "history.csv:2: userId is empty"),
        (HEADER + "7,,4.0,1\n", "history.csv:2: movieId is empty"),
        (HEADER + "7,1007,4.0\n", "history.csv:2: 3 fields, expected 4"),
        (HEADER + '7,"1007,4.0,1\n', "history.csv:2: not CSV"),
        (HEADER.encode() + b"7,1007,4.0,1\n7,\xe9,4.0,1\n", "history.csv:3: not UTF-8 text"),
    ],
)
def test_bad_history(model_directory: Path, tmp_path: Path, history: str | bytes, expected: str) -> None:
    (tmp_path / "out.csv").write_text("as it was")
    result = recommend_text(model_directory, tmp_path, history)
    assert result.exit_code == 1
    assert re.match(f"Error: .*{expected}", result.output), result.output
    assert (tmp_path / "out.csv").read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"history.csv", "out.csv"}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ("", "requests.csv: the file is empty; expected the header userId,timestamp"),
        ("userId\n7\n", "requests.csv:1: column timestamp .* is missing; the header is 'userId'"),
        ("userId,timestamp\n", "requests.csv: no rows after the header"),
        ("userId,timestamp\n7,\n", "requests.csv:2: timestamp is not a time; expected whole seconds since 1970"),
        ("userId,timestamp\n\n7,5\n,5\n", "requests.csv:4: userId is empty"),
        ("userId,timestamp\n7,5\nu8,5\n", "requests.csv:3: userId u8 is not a whole number"),
        ("userId,timestamp\n7,5,9\n", "requests.csv:2: 3 fields, expected 2"),
        ("userId,timestamp\n7,4000000000\n", "requests.csv:2: timestamp .*a day from now"),
    ],
)
def test_bad_requests(model_directory: Path, tmp_path: Path, requests: str, expected: str) -> None:
    result = recommend_text(model_directory, tmp_path, GOOD, requests=requests)
    assert result.exit_code == 1
    assert re.match(f"Error: .*{expected}", result.output), result.output
    assert not (tmp_path / "out.csv").exists()


def test_bad_rows_in_quarantine_lie_beside_the_result(
    model_directory: Path, model: Recommender, tmp_path: Path
) -> None:
    bad = GOOD + "8,1035,9,60\n8,1042,4,x\n"
    result = recommend_text(model_directory, tmp_path, bad, "--on-bad-rows", "quarantine")
    assert result.exit_code == 0, result.output
    quarantine = tmp_path / "out.quarantine.csv"
    read = result.stdout.splitlines()
    assert "columns: user=userId, item=movieId, rating=rating, time=timestamp" in read
    assert f"in quarantine: 2 rows (rating 1, timestamp 1), see {quarantine}" in read
    with quarantine.open(newline="") as file:
        assert [(row["line"], row["text"]) for row in csv.DictReader(file)] == [
            ("6", "8,1035,9,60"),
            ("7", "8,1042,4,x"),
        ]
    assert_rows(
        output(tmp_path),
        rows(model, "7", Query(HISTORY_OF_7, 3)) + rows(model, "8", Query([Event("1028", 5.0, 50)], 3)),
    )
    assert recommend_text(model_directory, tmp_path, GOOD, "--on-bad-rows", "quarantine").exit_code == 0
    assert not quarantine.exists()


def test_a_log_of_other_items_is_noted(model_directory: Path, tmp_path: Path) -> None:
    history = HEADER + "7,1007,4,100\n7,2,4,101\n7,3,4,102\n"
    result = recommend_text(model_directory, tmp_path, history)
    assert "note: the model knows 1 of the log's 3 items, such as 2, and leaves events on others out" in result.stdout
    assert "the model knows" not in recommend_text(model_directory, tmp_path, GOOD).stdout


def test_missing_files(model_directory: Path, tmp_path: Path) -> None:
    missing = recommend(model_directory, tmp_path)
    assert missing.exit_code == 2
    assert "history.csv' does not exist" in " ".join(missing.output.split())
    no_model = recommend_text(tmp_path, tmp_path, GOOD)
    assert no_model.exit_code == 1
    assert re.match(r"Error: .*manifest.json: cannot be read: No such file or directory", no_model.output)


@pytest.mark.parametrize("name", ["history.csv", "requests.csv"])
def test_what_is_read_is_never_replaced(model_directory: Path, tmp_path: Path, name: str) -> None:
    requests = "userId,timestamp\n7,500\n"
    result = recommend_text(model_directory, tmp_path, GOOD, "--out", str(tmp_path / name), requests=requests)
    assert result.exit_code == 1
    assert f"{name} would be written, and {tmp_path / name} is read; choose another --out" in result.output
    assert (tmp_path / "history.csv").read_text() == GOOD
    aside = tmp_path / "top.quarantine.csv"
    aside.write_text(GOOD)
    options = ("--history", str(aside), "--out", str(tmp_path / "top.csv"))
    assert "is read; choose another --out" in recommend(model_directory, tmp_path, *options).output
    assert aside.read_text() == GOOD
