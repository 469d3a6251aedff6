"""The full softmax beside the sampled one: time of a training step, and NDCG@10 after one epoch of the same log.

    python -m bench.softmax --work FOLDER [--publish]

A step is the product's, of the LSTM, on random events. The log of each catalogue is generated (`bench.sequential_log`),
so that the best possible NDCG@10 is known. One LSTM is trained on it for one epoch with each softmax and each size of a
batch; item vectors start from co-occurrence. Each measurement is a process of its own.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
import jax
import numpy as np
from flax import nnx

from bench.publish import Page, less, paragraph, publish_option, read_figures, write_figures
from bench.sequential_log import ITEMS_FILE, LOG_FOLDER, best_scorer, write_log
from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.batches import MAX_EARLIER, TrainBatch, TrainingData, prefetch
from jaxrec.data.events import Events
from jaxrec.data.prepare import prepare
from jaxrec.data.store import read_prepared
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import sequence_scorer
from jaxrec.models.neighbours import initial_embedding, neighbours
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.host_memory import keep_freed_memory
from jaxrec.training.sharding import data_mesh
from jaxrec.training.step import SAMPLED_ITEMS as SAMPLED
from jaxrec.training.step import initial_state, make_optimizer, make_train_step

LENGTH, STEPS, EVENTS_PER_USER, CASES = 200, 4, 100, 2_000


class Step(NamedTuple):
    """A step to be measured; `sampled` 0 is the full softmax."""

    items: int
    tokens: int
    sampled: int


class Epoch(NamedTuple):
    """An epoch to be trained, on a log of `users`."""

    items: int
    users: int
    tokens: int
    sampled: int
    learning_rate: float = TrainConfig.learning_rate


SIZES = (10_000, 30_000, 60_000, 100_000, 300_000)
TOKENS = TrainConfig.batch_tokens
LARGE = 4 * TOKENS
WAYS: tuple[Step | Epoch, ...] = (
    *(Step(items, tokens, sampled) for items in SIZES for tokens in (TOKENS, LARGE) for sampled in (0, SAMPLED)),
    *(Epoch(items, 8_000, TOKENS, sampled) for items in SIZES for sampled in (0, SAMPLED)),
    *(Epoch(30_000, 8_000, TOKENS, sampled) for sampled in (2048, 4096)),
    *(Epoch(30_000, 8_000, LARGE, SAMPLED, rate) for rate in (3e-3, 6e-3)),
)
TINY: tuple[Step | Epoch, ...] = (
    Step(2_000, 400, 0),
    Step(2_000, 400, 100),
    Epoch(2_000, 50, 400, 100),
    Epoch(2_000, 50, 400, 0),
)
"""For tests."""


@click.command()
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Everything stays here.")
@click.option("--tiny", is_flag=True, help="Small catalogues, to try all of it.")
@click.option("--inside", type=int, hidden=True, help="The place in WAYS of the one that is measured in this process.")
@publish_option
def main(work: Path, tiny: bool, inside: int | None, publish: bool) -> None:
    """Measures what is not measured yet, and writes WORK/softmax.md."""
    ways = TINY if tiny else WAYS
    if inside is not None:
        way = ways[inside]
        click.echo(json.dumps(time_step(way) if isinstance(way, Step) else train_epoch(way, work)))
        return
    page = Page("softmax", "The full and the sampled softmax", publish, work, less(ways=(len(ways), len(WAYS))))
    work.mkdir(parents=True, exist_ok=True)
    found: dict[Step | Epoch, list[float]] = {}
    files = []
    for place, way in enumerate(ways):
        path = work / f"{type(way).__name__.lower()}-{'-'.join(map(str, way))}.json"
        if not path.is_file():
            command = [sys.executable, "-m", "bench.softmax", "--work", str(work), "--inside", str(place)]
            command += ["--tiny"] if tiny else []
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            write_figures(path, [*json.loads(printed), os.getloadavg()[0]])
        found[way] = read_figures(path)
        files.append(path)
    page.write(tables(found), files)


def time_step(way: Step) -> list[float]:
    """Seconds and CPU seconds of a step on random events, each the least of STEPS."""
    keep_freed_memory()
    items, rng, shape = way.items, np.random.default_rng(0), (max(1, way.tokens // LENGTH), LENGTH)
    events = Events(
        rng.integers(1, items + 1, shape).astype(np.int32),
        rng.random(shape).astype(np.float32),
        rng.integers(0, 10**6, shape).astype(np.float32),
        np.full(shape[0], LENGTH, np.int32),
    )
    earlier = rng.integers(1, items + 1, (shape[0], MAX_EARLIER)).astype(np.int32)
    starts = rng.random(shape) < 0.01
    batch = TrainBatch(events, starts, np.roll(events.item, -1, axis=1), np.roll(events.gap, -1, axis=1), earlier)
    config = TrainConfig(sampled_items=way.sampled)
    optimizer = make_optimizer(config, 100)
    model = TimeRatingAwareLSTM(items, ModelConfig(max_length=LENGTH), rngs=nnx.Rngs(0))
    graphdef, state = initial_state(model, optimizer)
    run = make_train_step(graphdef, optimizer, data_mesh(), config.request_gap_dropout, way.sampled)
    key, found = jax.random.key(0), []
    for _ in range(1 + STEPS):
        start, start_cpu = time.perf_counter(), time.process_time()
        state, metrics = run(state, batch, key)
        float(metrics["loss"])
        found.append((time.perf_counter() - start, time.process_time() - start_cpu))
    seconds, cpu_seconds = np.min(found[1:], axis=0).tolist()
    return [seconds, cpu_seconds]


def train_epoch(way: Epoch, work: Path) -> list[float]:
    """Steps of the epoch, its seconds and CPU seconds, NDCG@10 after it, and the best possible."""
    keep_freed_memory()
    folder = work / f"log-{way.items}-{way.users}"
    if not (folder / "start.npy").is_file():
        source, every_item = folder / "source", PrepareConfig(min_movie_ratings=0)
        write_log(source, way.users, way.items, way.users * EVENTS_PER_USER)
        made = prepare(source / LOG_FOLDER, source / ITEMS_FILE, every_item, out=folder / "data")
        np.save(folder / "start.npy", initial_embedding(neighbours(made), ModelConfig().embedding))
    data, item_vectors = read_prepared(folder / "data"), np.load(folder / "start.npy")
    config = TrainConfig(sampled_items=way.sampled, learning_rate=way.learning_rate)
    widths = ModelConfig(max_length=LENGTH)
    model = TimeRatingAwareLSTM(len(data.catalog), widths, rngs=nnx.Rngs(0), item_embedding=item_vectors)
    batches = TrainingData(data, LENGTH, way.tokens)
    optimizer = make_optimizer(config, batches.steps_per_epoch)
    graphdef, state = initial_state(model, optimizer)
    rest = config.request_gap_dropout, way.sampled, data.train_popularity() > 0
    run, key = make_train_step(graphdef, optimizer, data_mesh(), *rest), jax.random.key(0)
    start, start_cpu = time.perf_counter(), time.process_time()
    for batch in prefetch(batches.epoch(0, 0)):
        state, metrics = run(state, batch, key)
    float(metrics["loss"])
    spent = time.perf_counter() - start, time.process_time() - start_cpu
    cases = data.split.test.at_most(CASES)
    trained = sequence_scorer(nnx.merge(graphdef, state.params, state.fixed))
    scores = [
        float(ndcg(rank_cases(scorer, data, cases, LENGTH, False).ranks, 10).mean())
        for scorer in (trained, best_scorer(data, way.items))
    ]
    return [batches.steps_per_epoch, *spent, *scores]


def tables(found: dict[Step | Epoch, list[float]]) -> list[str]:
    """The lines of the page below its head."""
    loads = [figures[-1] for figures in found.values()]
    lines = [
        paragraph(__doc__),
        "",
        f"The load was {min(loads):.1f} to {max(loads):.1f} after the measurements.",
        "",
        f"A step: the least of {STEPS}.",
        "",
        "| items | tokens of a step | softmax | seconds | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for way, (seconds, cpu, *_) in found.items():
        if isinstance(way, Step):
            lines.append(f"| {way.items:,} | {way.tokens:,} | {_softmax(way.sampled)} | {seconds:.2f} | {cpu:.2f} |")
    lines += [
        "",
        f"An epoch: {EVENTS_PER_USER} events of each user, {CASES:,} test cases at most.",
        "",
        "| items | users | tokens of a step | learning rate | softmax | steps | CPU seconds | NDCG@10 | at best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, figures in found.items():
        if isinstance(way, Epoch):
            steps, _, cpu, score, best, _ = figures
            cells = (f"{way.items:,}", f"{way.users:,}", f"{way.tokens:,}", f"{way.learning_rate:g}")
            rest = (_softmax(way.sampled), f"{steps:,}", f"{cpu:,.0f}", f"{score:.4f}", f"{best:.4f}")
            lines.append("| " + " | ".join((*cells, *rest)) + " |")
    return lines


def _softmax(sampled: int) -> str:
    return f"{sampled:,} sampled" if sampled else "full"


if __name__ == "__main__":
    main()
