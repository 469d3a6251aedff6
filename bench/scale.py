"""From a generated log to answers, with the time and the memory of each stage, for bench/scale.md.

    python -m bench.scale --work FOLDER [--log 25m] [--log 1m-items] [--publish]

`bench.sequential_log` writes the logs, and knows the probability of every next item. The product's own commands then
prepare the log, train both models for one epoch (`jaxrec train` also counts the co-occurrence and learns the mix),
evaluate, export with an index, and serve. Each stage is a process of its own. Its memory is the sum of the resident
memory of all its processes, looked at ten times a second, or the most that one of them ever held if that is more. A
stage that is done is not measured again. One that was interrupted starts anew, and so do all stages after it. So the
command can be given again, and `--publish` can follow later, at the same commit. Where the export refuses the index,
since it finds too few of the best items, the page says so, and the model is exported and served without one.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from bench.child import wait
from bench.load import family, memory_mb
from bench.publish import Page, less, paragraph, publish_option, read_figures, write_figures
from bench.sequential_log import ITEMS_FILE, LOG_FOLDER, best_scorer, write_log
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import read_prepared
from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.files import read_json, read_json_lines, write_text
from jaxrec.runs.directory import CONTENT_FOLDER, EVALUATION_FILE, HYBRID_FILE, LSTM_FOLDER, NEIGHBOURS_FILE, RUN_FILE
from jaxrec.training.log import LOG_FILE, STEPS_FILE
from serve.client import Connection, Event, RecommenderClient, UserEvent
from tests.serve.process import running_server

GOAL_GB = 8.0
ROUNDS_PER_SECOND = 10.0
K = 10
MOST_EVENTS = 1_000  # of a history that the server is given
REFUSED_INDEX = re.compile(r"index: \d+ candidates hold .*")  # what the export says where it refuses one


class Log(NamedTuple):
    """A generated log, and how it is used. `least_events`: of an item that is kept; 0: the whole catalogue is.
    `cases`: test cases that are ranked; `asked`: users that the server is asked for."""

    users: int
    items: int
    events: int
    least_events: int
    cases: int
    asked: int


LOGS = {
    "25m": Log(160_000, 60_000, 25_000_000, 5, 20_000, 1_000),
    "1m-items": Log(8_000, 1_000_000, 2_000_000, 0, 2_000, 500),
}
TINY = {"25m": Log(150, 500, 6_000, 5, 100, 10), "1m-items": Log(100, 1_000, 4_000, 0, 50, 10)}
"""For tests."""
STAGES = ("log", "prepare", "train", "evaluate", "best", "export", "serve")
LABELS = {
    "log": "generate the log",
    "prepare": "`jaxrec prepare`",
    "train": "`jaxrec train --max-epochs 1`",
    "evaluate": "`jaxrec evaluate`",
    "best": "rank by the true probabilities",
    "export": "`jaxrec export --index always`",
    "serve": "`python -m serve run`, with the client that asks",
}


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Everything stays here.")
@click.option("--log", "names", type=click.Choice(list(LOGS)), multiple=True, default=list(LOGS))
@click.option("--tiny", is_flag=True, help="Small logs, to try all stages.")
@click.option("--inside", type=click.Choice(["log", "best", "serve"]), hidden=True)
@publish_option
def main(work: Path, names: tuple[str, ...], tiny: bool, inside: str | None, publish: bool) -> None:
    """Measures the stages that are not measured yet, and writes WORK/scale.md."""
    logs = TINY if tiny else LOGS
    if inside is not None:
        {"log": make_log, "best": rank_best, "serve": ask_server}[inside](work / names[0], logs[names[0]])
        return
    needed = less(logs=(names, list(LOGS)), events=(logs["25m"].events, LOGS["25m"].events))
    page = Page("scale", "From 25 million events to answers", publish, work, needed)
    for name in names:
        for stage in STAGES:
            measure(work / name, name, stage, logs[name], tiny)
    body = [paragraph(__doc__)]
    for name in names:
        body += section(work / name, logs[name])
    page.write(body, [work / name / f"{stage}.json" for name in names for stage in STAGES])


class StageFailed(click.ClickException):
    """A command of a stage ended with another status than 0. `figures`: what it took until then."""

    def __init__(self, message: str, figures: dict[str, float]) -> None:
        super().__init__(message)
        self.figures = figures


def measure(folder: Path, name: str, stage: str, log: Log, tiny: bool) -> None:
    """Runs one stage, unless FOLDER/STAGE.json says that it was. What later stages measured is deleted then. Raises
    StageFailed."""
    done = folder / f"{stage}.json"
    if done.is_file():
        return
    source, data, run, model = (folder / part for part in ("source", "data", "run", "model"))
    jaxrec = [sys.executable, "-m", "jaxrec.cli.main"]
    inside = [sys.executable, "-m", "bench.scale", "--work", str(folder.parent), "--log", name, "--inside", stage]
    inside += ["--tiny"] if tiny else []
    prepare = [*jaxrec, "prepare", str(source / LOG_FOLDER), "--movies", str(source / ITEMS_FILE)]
    prepare += ["--min-movie-ratings", f"{log.least_events}", "--out", str(data)]
    command, made = {
        "log": (inside, source),
        "prepare": (prepare, data),
        "train": ([*jaxrec, "train", str(data), "--out", str(run), "--max-epochs", "1"], run),
        "evaluate": ([*jaxrec, "evaluate", str(run), "--cases", f"{log.cases}"], run / EVALUATION_FILE),
        "best": (inside, folder / "ranked_by_probability.json"),
        "export": ([*jaxrec, "export", str(run), "--out", str(model), "--index", "always"], model),
        "serve": (inside, folder / "served.json"),
    }[stage]
    if made.is_dir():
        shutil.rmtree(made)
    made.unlink(missing_ok=True)
    for later in STAGES[STAGES.index(stage) :]:
        (folder / f"{later}.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    began, load, output = time.time(), os.getloadavg()[0], folder / f"{stage}.log"
    figures: dict[str, Any]
    try:
        figures = {**watched(command, output), "load": load}
    except StageFailed as failed:
        refused = REFUSED_INDEX.search(output.read_text(encoding="utf-8"))
        if stage != "export" or refused is None:
            raise
        figures = {**watched([*command[:-1], "never"], output), "load": load, "refused": refused[0]}
        figures["peak_gb"] = max(figures["peak_gb"], failed.figures["peak_gb"])
    if stage == "train":
        figures["parts"] = training_parts(run, began)
    write_figures(done, figures)


def watched(command: Sequence[str], output: Path) -> dict[str, float]:
    """Runs a command, whose output goes to a file: its seconds, the CPU seconds of its processes, and the most memory
    that they held together, in GB. Raises StageFailed."""
    peak, ended = 0.0, threading.Event()

    def watch(pid: int) -> None:
        nonlocal peak
        while not ended.wait(1 / ROUNDS_PER_SECOND):
            with contextlib.suppress(OSError):  # a process can end while its children are looked for
                peak = max(peak, held_gb(family(pid)))

    start = time.perf_counter()
    with output.open("w", encoding="utf-8") as text:
        child = subprocess.Popen(command, stdout=text, stderr=text)
        watcher = threading.Thread(target=watch, args=(child.pid,))
        watcher.start()
        try:
            usage = wait(child, start)  # its peak would be at least that of this process
        except BaseException:
            child.kill()
            raise
        finally:
            ended.set()
            watcher.join()
    figures = {**usage._asdict(), "peak_gb": peak}
    if child.returncode:
        raise StageFailed(f"exit status {child.returncode}: {' '.join(command)}; see {output}", figures)
    return figures


def held_gb(pids: Sequence[int]) -> float:
    """Resident memory of processes now, or the most that one of them ever held if that is more. A process that has
    ended holds none, also while its parent has not waited for it."""
    now, ever = [0.0], [0.0]
    for pid in pids:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            for name, sizes in (("VmRSS", now), ("VmHWM", ever)):
                found = re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
                sizes += [int(size) * 1024 / 1e9 for size in found]
    return max(sum(now), *ever)


def training_parts(run: Path, began: float) -> dict[str, Any]:
    """What a training run spent its time on: by the times at which its files were written, and by its logs."""
    ends = [(run / name).stat().st_mtime for name in (RUN_FILE, NEIGHBOURS_FILE, HYBRID_FILE)]
    found: dict[str, Any] = {"open the data": ends[0] - began, "co-occurrence": ends[1] - ends[0]}
    last = ends[1]
    for name, folder in (("LSTM", run / LSTM_FOLDER), ("content model", run / CONTENT_FOLDER)):
        (epoch,) = read_json_lines(folder / LOG_FILE, "train again")
        last = (folder / LOG_FILE).stat().st_mtime
        steps = len(read_json_lines(folder / STEPS_FILE, "train again"))
        found[f"{name}: {steps:,} steps"] = epoch["seconds"]
        found[f"{name}: validation"] = epoch["validation_seconds"]
    return {**found, "content heads and mix": ends[2] - last}


def make_log(folder: Path, log: Log) -> None:
    """The stage `log`."""
    write_log(folder / "source", log.users, log.items, log.events)


def rank_best(folder: Path, log: Log) -> None:
    """Ranks the cases of the evaluation by the probabilities that made the log."""
    data = read_prepared(folder / "data")
    length = read_json(folder / "run" / RUN_FILE, "train again")["model"]["max_length"]
    cases = data.split.test.at_most(log.cases)
    ranks = rank_cases(best_scorer(data, log.items), data, cases, length, request_time=False).ranks
    found = bootstrap(ndcg(ranks, K), resample(cases.users, seed=0))
    write_text(folder / "ranked_by_probability.json", json.dumps(dataclasses.asdict(found)))


def ask_server(folder: Path, log: Log) -> None:
    """Starts the server and asks it for test users: with the history sent along, and after their events are stored."""
    data = read_prepared(folder / "data")
    cases, histories = data.split.test.at_most(log.asked), data.histories
    store = folder / "events.sqlite"
    for file in folder.glob("events.sqlite*"):
        file.unlink()
    start = time.perf_counter()
    sent, stored, ranks = [], [], []
    with running_server(folder / "model", store, provider="cpu", timeout_s=600) as server:
        ready = time.perf_counter() - start
        with RecommenderClient(Connection(server.address, timeout_s=60.0)) as client:
            for user, row in zip(cases.users.tolist(), cases.rows.tolist(), strict=True):
                past = _events(data, range(max(int(histories.offsets[user]), row - MOST_EVENTS), row))
                begin = time.perf_counter()
                answer = client.recommend(history=past, k=K)
                sent.append(time.perf_counter() - begin)
                answered = [one.item_id for one in answer.recommendations]
                (target,) = (one.item_id for one in _events(data, range(row, row + 1)))
                ranks.append(answered.index(target) + 1 if target in answered else K + 1)
            for user, row in zip(cases.users.tolist(), cases.rows.tolist(), strict=True):
                name = str(data.users.raw_ids[user])
                past = _events(data, range(max(int(histories.offsets[user]), row - MOST_EVENTS), row))
                client.record_events(
                    UserEvent(
                        event_id=f"{name}-{at}",
                        user_id=name,
                        item_id=one.item_id,
                        rating=one.rating,
                        timestamp=one.timestamp,
                    )
                    for at, one in enumerate(past)
                )
                client.recommend(user_id=name, k=K)  # the first answer replays what was just stored
                begin = time.perf_counter()
                client.recommend(user_id=name, k=K)
                stored.append(time.perf_counter() - begin)
        memory = memory_mb([server.process.pid])
    found = {
        "ready_seconds": ready,
        "memory_mb": memory,
        "sent_ms": (1e3 * np.percentile(sent, [50, 99])).tolist(),
        "stored_ms": (1e3 * np.percentile(stored, [50, 99])).tolist(),
        "ndcg_10": float(ndcg(np.array(ranks), K).mean()),
    }
    write_text(folder / "served.json", json.dumps(found))


def _events(data: PreparedData, rows: range) -> list[Event]:
    """Rows of the histories as the server gets them."""
    histories, raw_ids, some = data.histories, data.catalog.ids.raw_ids, np.arange(rows.start, rows.stop)
    columns = raw_ids[histories.items[some] - 1], histories.ratings[some], histories.times[some]
    return [
        Event(item_id=str(item), rating=rating, timestamp=at)
        for item, rating, at in zip(*(column.tolist() for column in columns), strict=True)
    ]


def section(folder: Path, log: Log) -> list[str]:
    """The page's part of one log."""
    figures = {stage: read_figures(folder / f"{stage}.json") for stage in STAGES}
    loads = [of_stage["load"] for of_stage in figures.values()]
    peak = max(of_stage["peak_gb"] for of_stage in figures.values())
    summary = read_prepared(folder / "data").summary()
    lines = [
        "",
        f"## {log.events:,} events, {log.items:,} items",
        "",
        f"{log.users:,} users; {summary['items']:,} items in the catalogue, {summary['training_events']:,} events"
        f" train. The load of the machine was {min(loads):.1f} to {max(loads):.1f} when the stages began. The most"
        f" memory is {peak:.2f} GB; the goal of {GOAL_GB:g} GB is {'met' if peak <= GOAL_GB else 'missed'}.",
        "",
        "| stage | seconds | CPU seconds | peak GB |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        one = figures[stage]
        lines.append(f"| {LABELS[stage]} | {one['seconds']:,.0f} | {one['cpu_seconds']:,.0f} | {one['peak_gb']:.2f} |")
    lines += ["", "| part of the training | seconds |", "|---|---|"]
    lines += [f"| {part} | {seconds:,.0f} |" for part, seconds in figures["train"]["parts"].items()]
    evaluation = read_json(folder / "run" / EVALUATION_FILE, "evaluate again")
    best = read_json(folder / "ranked_by_probability.json", "rank again")
    cases = evaluation["protocol"]["test_cases"]
    lines += [
        "",
        f"NDCG@10 on {cases:,} test cases, with 95 % intervals over users. The best possible is the ranking by the",
        "probabilities that made the log.",
        "",
        "| | request time | NDCG@10 | of the best possible |",
        "|---|---|---|---|",
    ]
    for row in evaluation["rows"]:
        one, time_given = row["ndcg_10"], "with" if row["request_time"] else "without"
        lines.append(f"| {row['name']} | {time_given} | {_interval(one)} | {one['mean'] / best['mean']:.0%} |")
    served = read_json(folder / "served.json", "serve again")
    if "refused" in figures["export"]:
        searched = f"The export refused the index (`{figures['export']['refused']}`). The stage's time is that of"
        searched += " `jaxrec export --index never`, its memory the most of both, and the server searches all items."
    else:
        index = read_json(folder / "model" / "manifest.json", "export again")["index"]
        kept = ", ".join(f"{found['recall_10']:.4f} ({kind})" for kind, found in index["recall"].items())
        searched = f"The index keeps {kept} of the ten best items."
    return [
        *lines,
        f"| best possible | | {_interval(best)} | |",
        "",
        f"{searched} The server was ready after {served['ready_seconds']:.1f} s. It held {served['memory_mb']:,.0f} MB"
        f" after one client had asked it for {log.asked:,} users, one after the other. Their NDCG@10, with the history"
        f" sent along and without request time, is {served['ndcg_10']:.4f}. It cannot be compared with the table: it is"
        f" of other cases, whose histories are cut to the last {MOST_EVENTS:,} events, and has no trend, since the log"
        " ended years ago.",
        "",
        "| request | p50 ms | p99 ms |",
        "|---|---|---|",
        "| history sent along | {:.2f} | {:.2f} |".format(*served["sent_ms"]),
        "| stored user | {:.2f} | {:.2f} |".format(*served["stored_ms"]),
    ]


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.4f} ({estimate['low']:.4f} to {estimate['high']:.4f})"


if __name__ == "__main__":
    main()
