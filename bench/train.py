"""Training: speed beside PyTorch and plain JAX, memory with large catalogues, time to quality.

    python -m bench.train step          # needs `pip install torch==2.13.0+cpu`
    python -m bench.train memory
    python -m bench.train quality DATA  # from `jaxrec prepare --min-user-ratings 5 --min-movie-ratings 5`

Each prints a section of bench/train.md. `step` interleaves the ways in rounds within one process, so that a busy moment
of the machine hits all alike; ratios are medians of the rounds' ratios. All ways run after
`jaxrec.training.host_memory.keep_freed_memory`, which is part of jaxrec's step and helps the others, too; with
`--plain-malloc` all run without it.
"""

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import child
from bench.publish import here, spread
from bench.train_steps import Shape, Step, our_step, plain_jax_step, random_batch, random_weights, torch_step
from jaxrec.config import ModelConfig, TrainConfig
from jaxrec.data.batches import MAX_EARLIER, TrainBatch, TrainingData
from jaxrec.data.events import Events
from jaxrec.data.store import read_prepared
from jaxrec.evaluation.metrics import hit_rate, ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import sequence_scorer
from jaxrec.models.neighbours import initial_embedding, neighbours
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.runs.directory import new_models
from jaxrec.training.host_memory import keep_freed_memory
from jaxrec.training.sharding import data_mesh
from jaxrec.training.step import initial_state, make_optimizer, make_train_step, softmax_sample

OURS, TORCH, PLAIN = "jaxrec", "PyTorch nn.LSTM", "plain JAX"
GRU4REC_NDCG = 0.099  # ML-100K, leave-one-out, test
MEMORY_CASES = (  # items, rows, length
    (3_706, 128, 50),
    (60_000, 64, 200),
    (1_000_000, 64, 200),
)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matrix_products(size: int = 2048) -> dict[str, Callable[[], object]]:
    """A square float32 product, by XLA and by PyTorch."""
    import torch

    factor = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    on_device, tensor = jnp.asarray(factor), torch.from_numpy(factor)
    product = jax.jit(jnp.matmul)
    return {
        "XLA": lambda: product(on_device, on_device).block_until_ready(),
        "PyTorch": lambda: torch.matmul(tensor, tensor),
    }


@click.group()
def main() -> None:
    """Benchmarks of training."""
    if click.get_current_context().invoked_subcommand != "train-random":  # which prints one number
        click.echo(f"- commit {here().commit}\n- {here().machine}")


@main.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=10)
@click.option("--steps", type=click.IntRange(1), default=3, help="Steps of each way in a round.")
@click.option("--kept-memory/--plain-malloc", default=True, help="As jaxrec trains / as PyTorch and JAX come.")
def step(rounds: int, steps: int, kept_memory: bool) -> None:
    """The same training step three ways."""
    if kept_memory:
        keep_freed_memory()
    threads, shape = len(os.sched_getaffinity(0)), Shape()
    load = os.getloadavg()[0]
    weights, batch = random_weights(shape), random_batch(shape)
    ways: dict[str, Step] = {
        OURS: our_step(weights, *batch),
        TORCH: torch_step(weights, *batch, threads),
        PLAIN: plain_jax_step(weights, *batch),
    }
    first: dict[str, float] = {}
    for name, way in ways.items():
        start = time.perf_counter()
        losses = [way()]
        first[name] = time.perf_counter() - start
        losses.append(way())  # after one update, so the gradients agree, too
        if name == OURS:
            expected = losses
        if not np.allclose(losses, expected, atol=1e-3):
            raise click.ClickException(f"{name}: losses {losses}, expected {expected}")
    products = matrix_products()
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        for name, way in ways.items():
            way()  # the one before may still hold the cores
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                way()
            wall[name].append(1e3 * (time.perf_counter() - start) / steps)
            cpu[name].append(1e3 * (time.process_time() - start_cpu) / steps)
        for name, product in products.items():
            product()
            rates[name].append(2 * 2048**3 / 1e9 / min(seconds(product) for _ in range(3)))
    best = max(rates, key=lambda name: statistics.median(rates[name]))
    peak = statistics.median(rates[best])
    click.echo(
        f"- load {load:.1f} at the start, torch {version('torch')}\n"
        f"- {shape.layers} LSTM layers of {shape.width}, {shape.items} items, batch {shape.batch}, length "
        f"{shape.length}, {np.mean(batch[1] == 0):.1%} padding; losses of all ways agree before and after an update\n"
        f"- {shape.flop / 1e9:.1f} GFLOP a step in the model's products; float32 2048 x 2048 product: "
        + ", ".join(f"{name} {spread(values, 0)}" for name, values in rates.items())
        + f" GFLOP/s (per round the best of 3)\n- {rounds} rounds of {steps} steps; median (lowest to highest round)\n"
    )
    click.echo("| way | ms a step | tokens/s | GFLOP/s | share of the product's rate | CPU ms a step | first call, s |")
    click.echo("|---|---|---|---|---|---|---|")
    for name, times in wall.items():
        rate = shape.flop / 1e6 / statistics.median(times)
        shares = [shape.flop / 1e6 / t / product for t, product in zip(times, rates[best], strict=True)]
        click.echo(
            f"| {name} | {spread(times, 0)} | {1e3 * shape.positions / statistics.median(times):,.0f} | {rate:.0f} | "
            f"{rate / peak:.0%} (by round {min(shares):.0%} to {max(shares):.0%}) | {spread(cpu[name], 0)} | "
            f"{first[name]:.1f} |"
        )
    click.echo("")
    for name in (TORCH, PLAIN):
        ratios = [theirs / ours for theirs, ours in zip(wall[name], wall[OURS], strict=True)]
        of_cpu = [theirs / ours for theirs, ours in zip(cpu[name], cpu[OURS], strict=True)]
        click.echo(f"Tokens/s over {name}: {spread(ratios, 2)} times; by CPU time {spread(of_cpu, 2)} times.")


@main.command()
def memory() -> None:
    """Peak memory of a process that trains, per catalogue."""
    click.echo(
        "| items | batch | length | softmax | s a step | peak memory of the process, GB |\n|---|---|---|---|---|---|"
    )
    for case in MEMORY_CASES:
        command = [sys.executable, "-m", "bench.train", "train-random", *map(str, case)]
        printed, usage = child.run(command, stdout=subprocess.PIPE)
        items, rows, length = case
        sample = softmax_sample(items, None)
        softmax = f"sampled, {sample} items" if sample else "full"
        click.echo(f"| {items:,} | {rows} | {length} | {softmax} | {printed} | {usage.peak_gb:.2f} |")


@main.command(hidden=True)
@click.argument("items", type=int)
@click.argument("rows", type=int)
@click.argument("length", type=int)
@click.option("--sampled-items", type=int)
def train_random(items: int, rows: int, length: int, sampled_items: int | None) -> None:
    """Trains the product's model on random events; prints the seconds of a step."""
    keep_freed_memory()
    rng = np.random.default_rng(0)
    shape = (rows, length)
    events = Events(
        rng.integers(1, items + 1, shape).astype(np.int32),
        rng.random(shape).astype(np.float32),
        rng.integers(0, 10**6, shape).astype(np.float32),
        np.full(rows, length, np.int32),
    )
    starts = rng.random(shape) < 0.01
    earlier = rng.integers(1, items + 1, (rows, MAX_EARLIER)).astype(np.int32)
    batch = TrainBatch(events, starts, np.roll(events.item, -1, axis=1), np.roll(events.gap, -1, axis=1), earlier)
    config, mesh = TrainConfig(sampled_items=sampled_items), data_mesh()
    optimizer = make_optimizer(config, 100)
    model = TimeRatingAwareLSTM(items, ModelConfig(max_length=length), rngs=nnx.Rngs(0))
    graphdef, state = initial_state(model, optimizer)
    del model
    train_step = make_train_step(graphdef, optimizer, mesh, config.request_gap_dropout, config.sampled_items)
    key, times = jax.random.key(0), []
    for _ in range(4):
        start = time.perf_counter()
        state, metrics = train_step(state, batch, key)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - start)
        assert np.isfinite(loss)
    click.echo(f"{min(times):.2f}")


@main.command(context_settings={"show_default": True})
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--epochs", type=click.IntRange(1), default=TrainConfig.max_epochs)
@click.option("--target", type=float, default=GRU4REC_NDCG, help="Test NDCG@10 to reach.")
@click.option("--content", is_flag=True, help="The content model instead of the LSTM.")
@click.option("--seed", type=int, default=0)
def quality(data: Path, epochs: int, target: float, content: bool, seed: int) -> None:
    """Test NDCG@10, without request time, over the seconds of training.

    The clock runs while co-occurrence is counted and batches are made, compiled and trained on; it stops for the
    evaluation after each epoch.
    """
    keep_freed_memory()
    prepared = read_prepared(data)
    config, model_config, mesh = TrainConfig(seed=seed, max_epochs=epochs), ModelConfig(), data_mesh()
    start = time.perf_counter()
    vectors = initial_embedding(neighbours(prepared), model_config.embedding)
    counted = time.perf_counter() - start
    model = new_models(prepared, model_config, seed, vectors)[content]
    batches = TrainingData(prepared, model_config.max_length, config.batch_tokens)
    optimizer = make_optimizer(config, batches.steps_per_epoch * epochs)
    graphdef, state = initial_state(model, optimizer)
    trained_items = prepared.train_popularity() > 0
    train_step = make_train_step(
        graphdef, optimizer, mesh, config.request_gap_dropout, config.sampled_items, trained_items
    )
    key, trained, reached = jax.random.key(seed), counted, None
    click.echo(
        f"{type(model).__name__}, seed {seed}, {len(prepared.catalog)} items, {len(prepared.split.test)} test cases\n"
    )
    click.echo("| epoch | seconds of training | test NDCG@10 | test HR@10 |\n|---|---|---|---|")
    for epoch in range(epochs):
        start = time.perf_counter()
        for batch in batches.epoch(seed, epoch):
            state, metrics = train_step(state, batch, key)
        float(metrics["loss"])
        trained += time.perf_counter() - start
        scorer = sequence_scorer(nnx.merge(graphdef, state.params, state.fixed))
        rank = functools.partial(rank_cases, scorer, prepared, prepared.split.test, model_config.max_length)
        ranks = rank(request_time=False).ranks
        score = float(ndcg(ranks, 10).mean())
        click.echo(f"| {epoch} | {trained:.1f} | {score:.4f} | {float(hit_rate(ranks, 10).mean()):.4f} |")
        reached = trained if reached is None and score > target else reached
    click.echo(
        f"\nAbove {target} after " + ("none of the epochs." if reached is None else f"{reached:.1f} s of training.")
    )


if __name__ == "__main__":
    main()
