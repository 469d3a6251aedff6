"""Plays three rounds of `jaxrec learn` beside a server, one of them killed and resumed, for bench/learn_loop.md.

    python -m bench.learn_loop [RATINGS] --work FOLDER [--publish]

A run is trained on the first 70 % of a log, in order of time, and its export is served. The rest comes in three equal
parts, as if it happened then: before each round the next part is recorded over gRPC, and each call is made twice, as by
a client that missed the answer. Then `jaxrec learn` plays the round, as a command of its own. In round 2 it is killed
(SIGKILL) halfway through a stage, by the time that the stage took in round 1, and the same command is given again. At
the end the log of the loop is compared with the file, row by row.

RATINGS is a ratings.csv of MovieLens; without it, it is the log of `jaxrec demo`. Fewer than 100 of its users are
active in a third, and the gate's interval is wide: `--least-users` and `--margin` are not the defaults of `jaxrec
learn`, with which it would wait for more events. The training is short, so read nothing about quality here. The stage
`served` runs, but no user was shown anything, so there is nothing to learn a policy from.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from bench.publish import ROOT, Page, begin, less, publish_option, read_figures, write_figures
from jaxrec.config import ModelConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.store import read_prepared
from jaxrec.files import sha256
from jaxrec.runs.demo import write_movielens
from jaxrec.runs.export import export
from jaxrec.runs.learn.state import State, read_state
from jaxrec.runs.train import train
from serve.client import RecommenderClient, UserEvent
from tests.serve.process import running_server

ROUNDS, HELD_BACK, KILLED_ROUND = 3, 0.3, 2
EVENTS, EPOCHS = 100_000, 2
MODEL = ModelConfig()
STAGES = ("export-events", "append", "served", "train", "gate", "export", "publish")
COLUMNS = ["userId", "movieId", "rating", "timestamp"]
CALL = 1_000  # events
WITHIN_S = 900.0
"""What takes longer is a failure."""


@click.command(context_settings={"show_default": True})
@click.argument("ratings", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="The loop and its figures stay here.")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, help="How many; the second or only one is killed.")
@click.option("--epochs", type=click.IntRange(1), default=EPOCHS, help="Of each training, at most.")
@click.option("--kill", type=click.Choice(STAGES), default="train", help="The stage that is killed in round 2.")
@click.option("--least-users", type=click.IntRange(1), default=50, help="Of `jaxrec learn`.")
@click.option("--margin", type=click.FloatRange(0, 1), default=0.25, help="Of `jaxrec learn`.")
@publish_option
def main(
    ratings: Path | None,
    work: Path,
    rounds: int,
    epochs: int,
    kill: str,
    least_users: int,
    margin: float,
    publish: bool,
) -> None:
    """Plays the rounds unless they are there, then writes the page."""
    page = Page(
        "learn_loop", "The learning loop", publish, work, less(rounds=(rounds, ROUNDS), epochs=(epochs, EPOCHS))
    )
    work = work.resolve()
    file, begun, folder = work / "learn_loop.json", work / "begun.json", work / "loop"
    if not file.is_file():
        begin(begun, folder)
        shutil.rmtree(folder, ignore_errors=True)  # of a bench that was interrupted
        folder.mkdir(parents=True)
        if ratings is None:
            write_movielens(folder)
            ratings = folder / "ratings.csv"
        options = ["--least-users", str(least_users), "--margin", str(margin)]
        found = play(ratings, folder, rounds, epochs, kill, options)
        write_figures(file, found)
    found = read_figures(file)
    page.write(body(found), [file, begun], less(events=(found["events"], EVENTS)))


def play(ratings: Path, folder: Path, rounds: int, epochs: int, kill: str, options: list[str]) -> dict[str, Any]:
    """Prepares, trains, serves, and plays the rounds in a folder. Returns what the page says.

    Raises:
        subprocess.SubprocessError: a round failed, or did not come to an end.
        click.ClickException: the kill or the server did not do what was expected.
    """
    log = pd.read_csv(ratings).sort_values("timestamp", kind="stable")[COLUMNS]
    first = len(log) - round(HELD_BACK * len(log))
    log.iloc[:first].to_csv(folder / "first.csv", index=False)
    data, run, models, store = (folder / name for name in ("data", "run", "models", "events.sqlite"))
    prepare(folder / "first.csv", out=data)
    train(data, run, MODEL, TrainConfig(max_epochs=epochs))
    export(run, models / "1")
    command = [sys.executable, "-m", "jaxrec.cli.main", "learn", "--store", str(store), "--data", str(data)]
    command += ["--run", str(run), "--models", str(models), *options]
    played: list[dict[str, Any]] = []
    edges = np.linspace(first, len(log), rounds + 1).astype(int)
    with (
        (folder / "server.log").open("w", encoding="utf-8") as messages,
        running_server(models, store, options=("--watch", "0.5"), stderr=messages) as server,
        RecommenderClient(server.address, timeout_s=60.0) as client,
    ):
        served = client.get_model_info().model_version
        for number in range(1, rounds + 1):
            part = log.iloc[edges[number - 1] : edges[number]]
            recorded, again = record(client, part, number)
            killed = None
            if number == min(KILLED_ROUND, rounds):
                after_s = played[0]["stages"].get(kill, {}).get("seconds", 0.0) / 2 if played else 0.0
                killed = kill_in(command, folder, kill, after_s)
                if kill != "publish" and client.get_model_info().model_version != served:
                    raise click.ClickException("the server took a version of a round that was killed")
            started = time.monotonic()
            subprocess.run(command, cwd=ROOT, check=True, timeout=WITHIN_S)
            seconds, state = time.monotonic() - started, state_of(folder)
            served = wait_until_served(client, state.model_version)
            last = state.history[-1]
            played.append(
                {
                    "recorded": recorded,
                    "again": again,
                    "events": (last.result("export-events") or {})["events"],
                    "users": int(part["userId"].nunique()),
                    "killed": killed,
                    "seconds": seconds,
                    "stages": {name: dict(one) for name, one in last.stages.items()},
                    "published": last.published,
                    "said": state.said,
                    "version": state.folder,
                    "served": served,
                }
            )
    missing, extra = differences(log, Path(state.data))
    return {
        "events": len(log),
        "users": int(log["userId"].nunique()),
        "sha256": sha256(ratings),
        "first": first,
        "rounds": played,
        "missing": missing,
        "extra": extra,
    }


def state_of(folder: Path) -> State:
    """Raises click.ClickException where the loop has not begun."""
    state = read_state(folder / "run.learn")
    if state is None:
        raise click.ClickException(f"{folder}: the loop has not begun")
    return state


def record(client: RecommenderClient, part: pd.DataFrame, number: int) -> tuple[int, int]:
    """Records a part of the log, each call twice. Returns how many events each of the two stored."""
    stored = [0, 0]
    for start in range(0, len(part), CALL):
        events = [
            UserEvent(
                event_id=f"{number}-{start + at}",
                user_id=str(user),
                item_id=str(item),
                rating=float(rating),
                timestamp=int(seconds),
            )
            for at, (user, item, rating, seconds) in enumerate(part[start : start + CALL].itertuples(index=False))
        ]
        for attempt in (0, 1):
            stored[attempt] += client.record_events(events).recorded_count
    return stored[0], stored[1]


def kill_in(command: list[str], folder: Path, stage: str, after_s: float) -> dict[str, Any]:
    """Starts the command, and kills it so many seconds after a stage has begun. Returns the stage and the seconds.

    Raises:
        click.ClickException: the stage did not begin, or it ended before the kill.
    """
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + WITHIN_S
        while (began := began_at(folder, stage)) is None:
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise click.ClickException(f"the stage {stage} of the round to be killed did not begin")
            time.sleep(0.01)
        time.sleep(max(0.0, began + after_s - time.time()))
        process.kill()
        seconds = time.time() - began
    under_way = state_of(folder).round
    if process.returncode != -signal.SIGKILL or under_way is None or list(under_way.stages)[-1] != stage:
        raise click.ClickException(f"the stage {stage} had ended before it was killed; give another one to --kill")
    return {"stage": stage, "seconds": seconds}


def began_at(folder: Path, stage: str) -> float | None:
    """When a stage of the round that is under way began; None: it has not."""
    state = read_state(folder / "run.learn")
    began: float | None = None
    if state is not None and state.round is not None:
        began = state.round.stages.get(stage, {}).get("began")
    return began


def wait_until_served(client: RecommenderClient, version: str) -> str:
    """Raises click.ClickException where the server does not take the version."""
    end = time.monotonic() + 60
    while (served := client.get_model_info().model_version) != version:
        if time.monotonic() > end:
            raise click.ClickException(f"the server has {served}, and not {version}, which was published")
        time.sleep(0.05)
    return served


def differences(log: pd.DataFrame, data: Path) -> tuple[int, int]:
    """How many rows of the log the data lacks, and how many of the data are not in the log; one that is there twice
    counts."""
    found = read_prepared(data).log
    if found is None:
        raise click.ClickException(f"{data}: holds no log")
    events = found.events
    users, items = found.users.decode(events.users() + 1), found.items.decode(np.asarray(events.items))
    have = pd.DataFrame(dict(zip(COLUMNS, (users, items, events.ratings, events.times), strict=True)))
    kinds = {"userId": np.int64, "movieId": np.int64, "rating": np.float32, "timestamp": np.int64}
    counts = log.astype(kinds).value_counts().sub(have.astype(kinds).value_counts(), fill_value=0)
    return int(counts[counts > 0].sum()), int(-counts[counts < 0].sum())


def body(found: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    rounds = found["rounds"]
    numbers = range(1, len(rounds) + 1)
    lines = [" ".join(text.split()) + "\n" for text in (__doc__ or "").split("\n\n")[2:]]
    lines += [
        f"The log has {found['events']:,} ratings of {found['users']:,} users (SHA-256 {found['sha256'][:16]}); the run"
        f" was trained on the first {found['first']:,}.\n",
        "| round | users | recorded | of those sent again | exported to the round | version in the folder |"
        " served after it | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, one in zip(numbers, rounds, strict=True):
        version = f"{one['version']}, {'new' if one['published'] else 'stays'}"
        lines.append(
            f"| {number} | {one['users']:,} | {one['recorded']:,} | {one['again']:,} | {one['events']:,} | {version} |"
            f" {one['served']} | {one['seconds']:.0f} |"
        )
    lines += ["", f"| stage, seconds | {' | '.join(f'round {number}' for number in numbers)} |"]
    lines += [f"|---|{'---|' * len(rounds)}"]
    for name in STAGES:
        cells = [_cell(one, name) for one in rounds]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "What the command said after each round, which is in `state.json`:", "", "```text"]
    lines += [*(one["said"] for one in rounds), "```", ""]
    recorded = sum(one["recorded"] for one in rounds)
    lines.append(
        f"Of {found['first']:,} + {recorded:,} events, {found['missing']} are missing in the data of the loop after the"
        f" last round, and {found['extra']} are there twice or not in the file."
    )
    return lines


def _cell(one: Mapping[str, Any], name: str) -> str:
    """What the page says of a stage of a round."""
    if name not in one["stages"]:
        return "not run"
    stage, killed = one["stages"][name], one["killed"]
    text = f"{stage['seconds']:.1f}"
    if killed is not None and killed["stage"] == name:
        text = f"killed after {killed['seconds']:.1f}, attempt {stage['attempts']}: {text}"
    return text


if __name__ == "__main__":
    main()
