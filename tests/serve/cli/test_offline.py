"""`python -m serve recommend`: the same answers as the server's, from CSV to CSV, and errors that name the line."""

import csv
import re
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from serve.cli import recommend as offline
from serve.cli.main import main
from serve.model.events import Event
from serve.model.recommender import Query, Recommender

HEADER = "userId,movieId,rating,timestamp\n"
GOOD = HEADER + "7,1007,4.0,100\n7,1014,,200\n7,1021,2.5,300\n8,1028,5,50\n"


def recommend(model: Path, folder: Path, history: str | bytes, requests: str | None = None, k: int = 3) -> Result:
    (folder / "history.csv").write_bytes(history.encode() if isinstance(history, str) else history)
    arguments = ["recommend", str(model), "--history", str(folder / "history.csv"), "--k", str(k)]
    arguments += ["--out", str(folder / "out.csv"), "--provider", "cpu"]
    if requests is not None:
        (folder / "requests.csv").write_text(requests)
        arguments += ["--requests", str(folder / "requests.csv")]
    return CliRunner().invoke(main, arguments)


def output(folder: Path) -> list[dict[str, str]]:
    with (folder / "out.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows(model: Recommender, user_id: str, query: Query) -> list[tuple[str, str, str, float]]:
    (answer,) = model.recommend([query])
    return [
        (user_id, str(rank), model.catalog.item_ids[item], float(score))
        for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1)
    ]


def assert_rows(found: list[dict[str, str]], expected: list[tuple[str, str, str, float]]) -> None:
    assert [(row["userId"], row["rank"], row["movieId"]) for row in found] == [row[:3] for row in expected]
    scores = [float(row["score"]) for row in found]
    np.testing.assert_allclose(scores, [row[3] for row in expected], atol=1e-4)


def assert_error(result: Result, expected: str) -> None:
    assert re.match(f"Error: .*{expected}", result.output), result.output


HISTORY_OF_7 = [Event("1007", 4.0, 100), Event("1014", None, 200), Event("1021", 2.5, 300)]


def test_every_user_of_the_history(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    result = recommend(model_directory, tmp_path, GOOD)
    assert result.exit_code == 0, result.output
    assert_rows(
        output(tmp_path),
        rows(model, "7", Query(HISTORY_OF_7, 3)) + rows(model, "8", Query([Event("1028", 5.0, 50)], 3)),
    )
    assert {path.name for path in tmp_path.iterdir()} == {"history.csv", "out.csv"}


def test_requests_see_only_the_past(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    result = recommend(model_directory, tmp_path, GOOD, "userId,timestamp\n8,49\n7,250\n9,100\n7,300\n")
    assert result.exit_code == 0, result.output
    expected = [
        *rows(model, "8", Query([], 3)),
        *rows(model, "7", Query(HISTORY_OF_7[:2], 3, request_time=250)),
        *rows(model, "9", Query([], 3)),
        *rows(model, "7", Query(HISTORY_OF_7, 3, request_time=300)),
    ]
    assert_rows(output(tmp_path), expected)
    most_popular = model.catalog.by_popularity[0]
    assert output(tmp_path)[0]["movieId"] == model.catalog.item_ids[most_popular]
    assert float(output(tmp_path)[0]["score"]) == model.catalog.popularity[most_popular]


def test_order_of_rows_and_columns_and_other_columns_do_not_matter(
    model_directory: Path, model: Recommender, tmp_path: Path
) -> None:
    text = "\ufeffnote,timestamp,movieId,userId,rating\r\nx,300,1021,7,2.5\r\n\r\nx,100,1007,7,4\r\nx,200,1014,7,\r\n"
    result = recommend(model_directory, tmp_path, text)
    assert result.exit_code == 0, result.output
    assert_rows(output(tmp_path), rows(model, "7", Query(HISTORY_OF_7, 3)))


def test_items_of_the_history_are_excluded(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    assert recommend(model_directory, tmp_path, GOOD, k=1000).exit_code == 0
    of_7 = {row["movieId"] for row in output(tmp_path) if row["userId"] == "7"}
    assert of_7 == set(model.catalog.item_ids) - {"", "1007", "1014", "1021"}


def test_batches_do_not_change_answers(
    model_directory: Path, model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "USERS_AT_ONCE", 4)
    monkeypatch.setattr(offline, "BATCHES_AT_ONCE", 2)
    rng = np.random.default_rng(0)
    events = {
        str(user): [Event(str(1000 + 7 * rng.integers(1, 61)), None, at) for at in range(rng.integers(1, 40))]
        for user in range(21)
    }
    text = HEADER + "".join(f"{user},{e.item_id},,{e.timestamp}\n" for user, es in events.items() for e in es)
    assert recommend(model_directory, tmp_path, text).exit_code == 0
    expected = [row for user, history in events.items() for row in rows(model, user, Query(history, 3))]
    assert_rows(output(tmp_path), expected)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("", "history.csv:1: expected the columns userId,movieId,rating,timestamp, came an empty file"),
        (
            "userId,movieId,rating\n",
            "history.csv:1: expected the columns .* came userId,movieId,rating .missing: timestamp",
        ),
        (HEADER + "7,1007,4.0,100\n7,1007,x,100\n", "history.csv:3: rating: expected a number, came 'x'"),
        (HEADER + "7,1007,7.5,100\n", r"history.csv:2: rating: expected a rating in 0.5..5, came 7.5"),
        (HEADER + "7,1007,nan,100\n", r"history.csv:2: rating: expected a rating in 0.5..5, came nan"),
        (HEADER + "7,1007,4.0,1e9\n", "history.csv:2: timestamp: expected a whole number of seconds, came '1e9'"),
        (HEADER + "7,1007,4.0,-1\n", "history.csv:2: timestamp: expected seconds since 1970.* came -1"),
        (HEADER + f"7,1007,4.0,{2**63}\n", "history.csv:2: timestamp: expected seconds since 1970.*"),
        (HEADER + ",1007,4.0,1\n", "history.csv:2: userId: expected an id of 1 to 256 characters"),
        (HEADER + "7,,4.0,1\n", "history.csv:2: movieId: expected an id of 1 to 256 characters"),
        (HEADER + "7,1007,4.0\n", "history.csv:2: expected 4 fields, came 3"),
        (HEADER + '7,"1007,4.0,1\n', "history.csv:2: expected CSV"),
        (HEADER.encode() + b"7,1007,4.0,1\n7,\xe9,4.0,1\n", "history.csv:3: expected UTF-8"),
    ],
)
def test_bad_history(model_directory: Path, tmp_path: Path, history: str | bytes, expected: str) -> None:
    (tmp_path / "out.csv").write_text("as it was")
    result = recommend(model_directory, tmp_path, history)
    assert result.exit_code == 1
    assert_error(result, expected)
    assert (tmp_path / "out.csv").read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"history.csv", "out.csv"}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ("userId\n7\n", "requests.csv:1: expected the columns userId,timestamp, came userId .missing: timestamp"),
        ("userId,timestamp\n7,\n", "requests.csv:2: timestamp: expected a whole number of seconds, came ''"),
        ("userId,timestamp\n7,5\n,5\n", "requests.csv:3: userId: expected an id"),
    ],
)
def test_bad_requests(model_directory: Path, tmp_path: Path, requests: str, expected: str) -> None:
    result = recommend(model_directory, tmp_path, GOOD, requests)
    assert result.exit_code == 1
    assert_error(result, expected)
    assert not (tmp_path / "out.csv").exists()


def test_missing_file(model_directory: Path, tmp_path: Path) -> None:
    arguments = ["recommend", str(model_directory), "--history", str(tmp_path / "no"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.output) == (1, f"Error: {tmp_path}/no: No such file or directory\n")


def test_no_model(tmp_path: Path) -> None:
    result = recommend(tmp_path / "nowhere", tmp_path, GOOD)
    assert result.exit_code == 1
    assert_error(result, "manifest.json: cannot be read: No such file or directory")


@pytest.mark.parametrize("command", [[], ["run"], ["ask"], ["recommend"]])
def test_help_explains_every_option(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    if command:
        named = main.get_command(click.Context(main), command[0])
        assert named is not None
        for parameter in named.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in result.output
                assert parameter.help  # type: ignore[attr-defined]
