"""The commands, as a user would type them: every stage from CSV files to a model directory, and clear errors."""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from jaxrec.cli.main import main
from jaxrec.config import TrainConfig, from_json, to_json
from jaxrec.rl.config import LoggedConfig
from tests.synthetic import markov_log


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ratings.csv and movies.csv of a small log."""
    folder = tmp_path_factory.mktemp("files")
    log = markov_log(users=200, items=60, events=10, stay=0.9, seed=0)
    log.columns = ["userId", "movieId", "rating", "timestamp"]
    log.to_csv(folder / "ratings.csv", index=False)
    genres = ["Drama", "Comedy", "Action|Comedy", "(no genres listed)"]
    lines = [f'{i},"Movie {i}, The",{genres[i % 4]}' for i in range(1, 61)]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def stages(files: Path) -> Path:
    """The folder of a whole run over `files`: data, run, evaluation.json, model."""
    calls = [
        ("prepare", files / "ratings.csv", "--movies", files / "movies.csv", "--out", files / "data"),
        (
            "train",
            files / "data",
            "--out",
            files / "run",
            "--batch-tokens",
            256,
            "--max-epochs",
            8,
            "--hidden",
            32,
            "--max-length",
            8,
        ),
        ("rl", "logged", files / "run", "--folds", 2, "--fold-epochs", 1, "--updates", 20, "--samples", 2),
        ("evaluate", files / "run", "--json", files / "evaluation.json"),
        ("export", files / "run", "--out", files / "model"),
    ]
    for call in calls:
        result = run(*call)
        assert result.exit_code == 0, f"{call[0]}: {result.output}"
    return files


def test_every_stage_leaves_its_result(stages: Path) -> None:
    evaluation = json.loads((stages / "evaluation.json").read_text())
    names = {row["name"] for row in evaluation["rows"]}
    assert names == {
        "popularity",
        "recent popularity",
        "TimeRatingAwareLSTM",
        "TimeRatingAwareContentModel",
        "hybrid",
        "stacked",
        "policy",
    }
    for row in evaluation["rows"]:
        assert row["cases"] == 200
        assert (
            0 <= row["ndcg_10"]["low"] <= row["ndcg_10"]["mean"] <= row["ndcg_10"]["high"] <= row["hit_rate_10"]["high"]
        )
    manifest = json.loads((stages / "model/manifest.json").read_text())
    assert manifest["policy"] == ("reinforce" if evaluation["serving"] == "policy" else "supervised")
    assert manifest["metrics"] == evaluation
    assert manifest["item_count"] == 60


def test_the_hybrid_beats_popularity_on_a_log_with_structure(stages: Path) -> None:
    rows = json.loads((stages / "evaluation.json").read_text())["rows"]
    ndcg = {(row["name"], row["request_time"]): row["ndcg_10"]["mean"] for row in rows}
    assert ndcg["hybrid", False] > 3 * ndcg["popularity", False]


def test_a_run_is_not_overwritten_and_resumes(stages: Path) -> None:
    again = run("train", stages / "data", "--out", stages / "run")
    assert again.exit_code == 1
    assert "already holds a run" in again.output
    before = (stages / "run/hybrid.json").read_text()
    assert run("train", stages / "data", "--out", stages / "run", "--resume").exit_code == 0
    assert (stages / "run/hybrid.json").read_text() == before


def test_errors_are_one_line_and_exit_1(files: Path, tmp_path: Path) -> None:
    bad = tmp_path / "ratings.csv"
    bad.write_text("userId,movieId,rating,timestamp\n1,2,4.5,10\n2,3,4.5,9\n1,3,9.5,11\n")
    result = run("prepare", bad, "--out", tmp_path / "data")
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {bad}:4: rating 9.5 is outside 0.5..5 "
        "(the scale that the log seems to have; another can be given: --rating-scale)\n"
    )
    assert not (tmp_path / "data").exists()
    assert "expected a folder written by `jaxrec prepare`" in run("train", tmp_path, "--out", tmp_path / "run").output
    assert "expected a folder written by `jaxrec train`" in run("evaluate", tmp_path).output
    assert run("export", tmp_path, "--out", tmp_path / "model").exit_code == 1


def test_a_folder_of_something_else_is_never_replaced(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(files, folder, ignore=shutil.ignore_patterns("data", "run", "model"))
    result = run("prepare", folder / "ratings.csv", "--out", folder)
    assert result.exit_code == 1
    assert "is not replaced, choose another name" in result.output
    assert (folder / "ratings.csv").exists()
    assert run("prepare", folder / "ratings.csv", "--out", folder / "ratings.csv").exit_code == 2


def test_a_run_notices_that_its_data_was_prepared_anew(stages: Path, tmp_path: Path) -> None:
    shutil.copytree(stages / "data", tmp_path / "data")
    shutil.copytree(stages / "run", tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["data"] = str(tmp_path / "data")
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    ratings = stages / "ratings.csv"
    assert run("prepare", ratings, "--split", "temporal", "--out", tmp_path / "data").exit_code == 0
    result = run("evaluate", tmp_path / "run")
    assert result.exit_code == 1
    assert "was prepared anew since" in result.output
    other = run("train", stages / "data", "--out", tmp_path / "run", "--resume")
    assert "was trained on" in other.output


def test_data_that_cannot_be_trained_on_blocks_no_folder(tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("userId,movieId,rating,timestamp\n1,2,4.0,10\n1,3,4.5,11\n")
    thresholds = ("--min-user-ratings", 1, "--min-movie-ratings", 1)
    assert run("prepare", tmp_path / "two.csv", *thresholds, "--out", tmp_path / "data").exit_code == 0
    result = run("train", tmp_path / "data", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "no validation case is left" in result.output
    assert not (tmp_path / "run").exists()


def test_the_log_of_a_run_is_mended_from_its_checkpoint(stages: Path, tmp_path: Path) -> None:
    shutil.copytree(stages / "run", tmp_path / "run")
    before = (tmp_path / "run/lstm/log.jsonl").read_text()
    (tmp_path / "run/lstm/log.jsonl").write_text("")
    assert run("train", stages / "data", "--out", tmp_path / "run", "--resume").exit_code == 0
    assert (tmp_path / "run/lstm/log.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("logged", ("--resume", "--updates", 5), "--updates cannot be changed on --resume"),
        ("logged", ("--resume",), "no interrupted training to resume"),
        ("logged", ("--method", "bpr"), "is not one of 'pl-rank', 'reinforce'"),
        ("logged", ("--ndcg-budget", "much"), "'much', expected a share such as 1% or 0.01, from 0 to below 1"),
        ("logged", ("--ndcg-budget", "100%"), "'100%', expected a share such as 1% or 0.01, from 0 to below 1"),
        ("logged", ("--diversity-reward", "1"), "No such option"),
        ("logged", ("--ndcg-budget", "1%", "--reward-weight", "1"), "give one of them"),
        ("logged", ("--penalty", -1), "-1.0 is not in the range x>=0"),
        ("logged", ("--attribution-window", 60), "No such option"),
        ("served", (), "Missing option '--log'"),
        ("served", ("--log", "DATA"), "expected the event store of `python -m serve run`"),
        ("served", ("--log", "DATA", "--method", "top-k"), "No such option"),
        ("simulated", (), "Missing option '--simulator'"),
        ("simulated", ("--simulator", "DATA", "--hit-reward", 1), "No such option"),
        ("simulated", ("--simulator", "DATA", "--resume"), "no interrupted training to resume"),
        ("simulated", ("--simulator", "DATA"), "0 of 200 users were not in the run's training data"),
    ],
)
def test_options_of_rl_that_do_not_fit_are_named(
    stages: Path, command: str, options: tuple[object, ...], message: str
) -> None:
    given = [stages / "ratings.csv" if option == "DATA" else option for option in options]
    result = run("rl", command, stages / "run", *given)
    assert result.exit_code != 0
    assert message in result.output


COMMANDS = {
    **main.commands,
    **{
        f"{name} {one}": of_group.commands[one]
        for name, of_group in main.commands.items()
        if isinstance(of_group, click.Group)
        for one in of_group.commands
    },
}


@pytest.mark.parametrize(("words", "command"), COMMANDS.items(), ids=COMMANDS)
def test_help_explains_every_option(words: str, command: click.Command) -> None:
    result = run(*words.split(), "--help")
    assert result.exit_code == 0
    assert command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert all(option.opts[0] in result.output for option in options)


def test_configurations_survive_json_and_refuse_unknown_keys() -> None:
    config = LoggedConfig(seed=7, ndcg_budget=0.01)
    assert from_json(LoggedConfig, json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(ValueError, match=r"TrainConfig has no learning_rte; it has .*learning_rate"):
        from_json(TrainConfig, {"learning_rte": np.pi})
