"""Kills `jaxrec train` with SIGKILL at random moments, resumes it each time, and compares with a run left in peace.

    python bench/kill_training.py --kills 20

Nothing may differ: the loss of every step, the validation figures, the weights of the best epochs and the mix. The
run saves after every step, so that many of the kills fall into the writing of a checkpoint; each kill comes a random
time after training has taken its first step since it was resumed (or since the process was started, for every fourth,
so that start-up is hit as well). Prints one line per kill, and a JSON record at the end.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from jaxrec.data.prepare import prepare
from jaxrec.runs.directory import CONTENT_FOLDER, HYBRID_FILE, LSTM_FOLDER, load_supervised, open_run
from jaxrec.training.log import STEPS_FILE, read_epochs, read_steps

OPTIONS = ("--hidden", "32", "--max-length", "8", "--batch-tokens", "128", "--patience", "9")
DEADLINE_SECONDS = 600


def write_log(path: Path, users: int, items: int, events: int) -> None:
    """ratings.csv of a log in which an item is mostly followed by the next one."""
    rng = np.random.default_rng(0)
    lines = ["userId,movieId,rating,timestamp"]
    for user in range(1, users + 1):
        item = int(rng.integers(items))
        for event in range(events):
            item = (item + 1) % items if rng.random() < 0.9 else int(rng.integers(items))
            lines.append(f"{user},{item + 1},{rng.integers(1, 11) / 2},{1_000_000_000 + 1000 * user + event}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def start(arguments: list[str], cache: Path) -> subprocess.Popen[str]:
    """`jaxrec train` in a process of its own."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "jaxrec.cli.main", "train", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for a process that has to end well."""
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    if process.returncode:
        raise click.ClickException(f"exit status {process.returncode}:\n{output}")


def logged(run: Path) -> int:
    """Bytes that the run's step logs have."""
    files = [run / folder / STEPS_FILE for folder in (LSTM_FOLDER, CONTENT_FOLDER)]
    return sum(file.stat().st_size for file in files if file.exists())


def kill_at(process: subprocess.Popen[str], run: Path, from_start: bool, delay: float) -> str:
    """Kills the process `delay` seconds after its start, or after the first step that it logs; says what was hit."""
    before, deadline = logged(run), time.monotonic() + DEADLINE_SECONDS
    while not from_start and process.poll() is None and logged(run) <= before and time.monotonic() < deadline:
        before = min(before, logged(run))  # what was logged past the checkpoint is taken back
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is not None:
        output = process.communicate()[0]
        if process.returncode:
            raise click.ClickException(f"exit status {process.returncode}:\n{output}")
        return "was finished"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if list(run.glob("*/checkpoints/*tmp*")):
        return "a checkpoint was being written"
    return "between checkpoints" if (run / LSTM_FOLDER).exists() else "before the first step"


def differences(run: Path, other: Path) -> list[str]:
    """What differs between two finished runs; seconds and speeds aside."""
    found = []
    for folder in (LSTM_FOLDER, CONTENT_FOLDER):
        if read_steps(run / folder) != read_steps(other / folder):
            found.append(f"{folder}: losses of the steps")
        curves = [
            [(record["loss"], record["validation_ndcg_10"]) for record in read_epochs(path / folder)]
            for path in (run, other)
        ]
        if curves[0] != curves[1]:
            found.append(f"{folder}: figures of the epochs")
    if (run / HYBRID_FILE).read_bytes() != (other / HYBRID_FILE).read_bytes():
        found.append("the mix")
    data = open_run(run).read_data()
    ours, theirs = (load_supervised(open_run(path), data) for path in (run, other))
    if not all(
        np.array_equal(a.item_vectors(), b.item_vectors())
        for a, b in ((ours.lstm, theirs.lstm), (ours.content, theirs.content))
    ):
        found.append("the item vectors of the best epochs")
    return found


def kill_and_compare(folder: Path, kills: int, epochs: int, seed: int) -> dict[str, Any]:
    """Does it all in `folder` and returns the record. Raises ClickException where a run cannot go on."""
    rng = random.Random(seed)
    write_log(folder / "ratings.csv", users=200, items=60, events=12)
    prepare(folder / "ratings.csv", out=folder / "data")
    fresh = [str(folder / "data"), *OPTIONS, "--max-epochs", str(epochs), "--out"]
    started = time.monotonic()
    finish(start([*fresh, str(folder / "whole")], folder / "cache"))
    whole_seconds = time.monotonic() - started
    run, hits = folder / "killed", Counter[str]()
    arguments = [*fresh, str(run), "--checkpoint-seconds", "0"]
    done = 0
    while done < kills:
        if (run / "run.json").exists():
            arguments = ["--out", str(run), "--resume", "--checkpoint-seconds", "0"]
        from_start = done % 4 == 0
        delay = rng.uniform(0, 8.0 if from_start else 2.0)
        hit = kill_at(start(arguments, folder / "cache"), run, from_start, delay)
        if hit == "was finished":
            raise click.ClickException(f"the run ended after {done} kills; give it more --epochs")
        done += 1
        hits[hit] += 1
        click.echo(f"kill {done}: {delay:.2f} s after {'the start' if from_start else 'a step'}, {hit}")
    if (run / "run.json").exists():
        arguments = ["--out", str(run), "--resume"]
    finish(start(arguments, folder / "cache"))
    steps = len(read_steps(run / LSTM_FOLDER)) + len(read_steps(run / CONTENT_FOLDER))
    return {
        "kills": kills,
        "hits": dict(hits),
        "steps": steps,
        "seconds_of_the_whole_run": round(whole_seconds, 1),
        "differences": differences(folder / "whole", run),
    }


@click.command()
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True, help="Of each of the two models.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
def main(kills: int, epochs: int, seed: int) -> None:
    """Kills training at random moments; exit status 1 where the result differs from that of a run left in peace."""
    with tempfile.TemporaryDirectory(prefix="jaxrec-kill-") as folder:
        record = kill_and_compare(Path(folder), kills, epochs, seed)
    click.echo(json.dumps(record))
    sys.exit(bool(record["differences"]))


if __name__ == "__main__":
    main()
