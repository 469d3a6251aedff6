"""Measures `jaxrec recommend` for everybody with one and two workers, in turn, on one generated log.

    python -m bench.recommend --work FOLDER [--publish]

The model has random weights, 10,000 items, two LSTMs of 128 and a reranker: what an answer costs does not depend on
what was learned. Each user has 50 events. Each run is a process of its own, from the command to the whole CSV, in a
folder that is empty before, so that no run continues another one. All results must have all users, and be equal to the
byte. With 1,000,000 users (`--users 1000000 --rounds 1`) a run takes five times as long.
"""

import filecmp
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench import child
from bench.child import Usage
from bench.publish import Page, less, publish_option, spread
from jaxrec.files import new_directory

USERS, ROUNDS = 200_000, 2  # of the page
EVENTS, ITEMS = 50, 10_000
WORKERS = (1, 2)
USERS_OF_FILE, FIRST_FILE = 100_000, "part-00000.parquet"


def write_log(folder: Path, users: int, items: int, seed: int = 0) -> None:
    """A new folder of Parquet files, whole or absent: EVENTS events of each user on random items, one a day."""
    with new_directory(folder, FIRST_FILE) as new:
        _write_files(new, users, items, seed)


def _write_files(folder: Path, users: int, items: int, seed: int) -> None:
    for number, first in enumerate(range(0, users, USERS_OF_FILE)):
        rng, count = np.random.default_rng([seed, number]), min(USERS_OF_FILE, users - first)
        rows = count * EVENTS
        columns = {
            "userId": np.repeat(np.arange(first + 1, first + count + 1), EVENTS),
            "movieId": rng.integers(1, items + 1, rows),
            "rating": rng.integers(1, 11, rows) / 2,
            "timestamp": 1_500_000_000 + np.tile(np.arange(EVENTS) * 86_400, count) + rng.integers(0, 86_000, rows),
        }
        pq.write_table(pa.table(columns), folder / f"part-{number:05d}.parquet")


def measure(model: Path, log: Path, out: Path, workers: int) -> Usage:
    """One run, into a new folder around `out`. Raises click.ClickException where it fails."""
    shutil.rmtree(out.parent, ignore_errors=True)  # with the job of a run that was interrupted
    out.parent.mkdir()
    command = [sys.executable, "-m", "jaxrec.cli.main", "recommend", str(model), "--history", str(log)]
    command += ["--out", str(out), "--workers", str(workers), "--provider", "cpu"]
    return child.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)[1]


def users_of(result: Path) -> int:
    """How many users a result has, whose rows lie together."""
    with open(result, encoding="utf-8") as lines:
        next(lines)
        return sum(1 for _ in itertools.groupby(line.partition(",")[0] for line in lines))


@click.command(context_settings={"show_default": True})
@click.option("--users", type=click.IntRange(1), default=USERS)
@click.option("--items", type=click.IntRange(2), default=ITEMS)
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, help="Runs of each number of workers, in turn.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True)
@publish_option
def main(users: int, items: int, rounds: int, work: Path, publish: bool) -> None:
    """Measures one and two workers in turn, and writes WORK/recommend.md."""
    missing = less(users=(users, USERS), items=(items, ITEMS), rounds=(rounds, ROUNDS))
    page = Page("recommend", "Recommending for everybody: time and memory", publish, work, missing)
    work.mkdir(parents=True, exist_ok=True)
    model, log = work / f"model-{items}", work / f"log-{users}-{items}"
    if not model.is_dir():
        make = [sys.executable, "-m", "bench.make_model", "--items", str(items), "--no-index", "--reranker"]
        subprocess.run([*make, "--out", str(model)], check=True)
    if not log.is_dir():
        write_log(log, users, items)
    load = os.getloadavg()[0]
    found: dict[int, list[Usage]] = {workers: [] for workers in WORKERS}
    results = {workers: work / f"run-{workers}/top.csv" for workers in WORKERS}
    for _ in range(rounds):
        for workers, result in results.items():
            found[workers].append(measure(model, log, result, workers))
            if (answered := users_of(result)) != users:
                raise click.ClickException(f"{result} has {answered} users of {users}")
    first, *others = results.values()
    if not all(filecmp.cmp(first, other, shallow=False) for other in others):
        raise click.ClickException("the results of one and of two workers differ")
    page.write(table(users, items, load, found))


def table(users: int, items: int, load: float, found: dict[int, list[Usage]]) -> list[str]:
    """The lines of the page below its head."""
    alone = found[WORKERS[0]]
    lines = [
        f"{users:,} users with {EVENTS} events each, {items:,} items, the best 10 items of each user; a model with"
        " random weights, two LSTMs of 128 and a reranker, and no index; the load was"
        f" {load:.1f} at the start. Medians of {len(alone)} runs (lowest to highest), one and two workers in turn.",
        "",
        "| workers | seconds | users/s | CPU ms a user | peak GB of the largest process |",
        "|---|---|---|---|---|",
    ]
    for workers, runs in found.items():
        cells = [
            spread([one.seconds for one in runs]),
            spread([users / one.seconds for one in runs], 0),
            spread([1000 * one.cpu_seconds / users for one in runs], 2),
            spread([one.peak_gb for one in runs], 2),
        ]
        lines.append(f"| {workers} | {' | '.join(cells)} |")
    ratios = [before.seconds / after.seconds for before, after in zip(alone, found[WORKERS[-1]], strict=True)]
    lines += ["", f"Two workers are {spread(ratios, 2)} times as fast as one (goal: 1.8). The results are equal."]
    return lines


if __name__ == "__main__":
    main()
