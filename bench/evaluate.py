"""Measures `jaxrec evaluate` on as many cases and items as Amazon's Beauty has.

    python -m bench.evaluate --work FOLDER [--publish]

A generated log (`bench.sequential_log`) with 22,363 users, 12,100 items and 198,502 events; both models are trained for
one epoch. The table of the evaluation has eight rows: popularity and recent popularity, both models and the hybrid
without and with request time. Each run is a process of its own, from the command to the table.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from bench.publish import Page, less, paragraph, publish_option, spread
from bench.scale import watched
from bench.sequential_log import ITEMS_FILE, LOG_FOLDER, write_log
from jaxrec.runs.directory import EVALUATION_FILE, HYBRID_FILE

USERS, ITEMS, EVENTS, LEAST_EVENTS = 22_363, 12_100, 198_502, 5  # of a user, at least
ROUNDS, GOAL_S = 3, 40.0


@click.command(context_settings={"show_default": True})
@click.option("--users", type=click.IntRange(10), default=USERS)
@click.option("--items", type=click.IntRange(100), default=ITEMS, help="A multiple of 100.")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS)
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Log and run stay here.")
@publish_option
def main(users: int, items: int, rounds: int, work: Path, publish: bool) -> None:
    """Trains a run that is not there yet, measures its evaluation, and writes WORK/evaluate.md."""
    missing = less(users=(users, USERS), items=(items, ITEMS), rounds=(rounds, ROUNDS))
    page = Page("evaluate", "Evaluation: time and memory", publish, work, missing)
    folder = work / f"{users}-{items}"
    source, data, run = (folder / part for part in ("source", "data", "run"))
    jaxrec = [sys.executable, "-m", "jaxrec.cli.main"]
    if not (run / HYBRID_FILE).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a training that was interrupted
        write_log(source, users, items, EVENTS * users // USERS, LEAST_EVENTS)
        keep = ["--min-user-ratings", f"{LEAST_EVENTS}", "--min-movie-ratings", "0"]
        log = [str(source / LOG_FOLDER), "--movies", str(source / ITEMS_FILE)]
        subprocess.run([*jaxrec, "prepare", *log, *keep, "--out", str(data)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*jaxrec, "train", str(data), "--out", str(run), "--max-epochs", "1"], check=True)
    load = os.getloadavg()[0]
    found = [watched([*jaxrec, "evaluate", str(run)], folder / "evaluate.log") for _ in range(rounds)]
    evaluation = json.loads((run / EVALUATION_FILE).read_text("utf-8"))
    seconds = [one["seconds"] for one in found]
    goal = "met" if sorted(seconds)[len(seconds) // 2] <= GOAL_S else "missed"
    page.write(
        [
            paragraph(__doc__),
            "",
            f"{evaluation['protocol']['test_cases']:,} cases, {items:,} items, {len(evaluation['rows'])} rows; the load"
            f" was {load:.1f} at the start. Medians of {rounds} runs (lowest to highest). The goal of {GOAL_S:g} s"
            f" is {goal}.",
            "",
            "| seconds | CPU seconds | peak GB |",
            "|---|---|---|",
            "| "
            + " | ".join(spread([one[name] for one in found]) for name in ("seconds", "cpu_seconds", "peak_gb"))
            + " |",
        ]
    )


if __name__ == "__main__":
    main()
