"""Learns in the environment whose best policy is known, for bench/rl_synthetic.md.

    python -m bench.rl_synthetic --work FOLDER [--parts values,speed] [--torch PYTHON]

Values are exact (`bench.synthetic_exact`): what a new user takes until it leaves, as a share of what
it takes under the best policy, which policy iteration finds. Policies are judged as they draw, and in the last column
as the ones that always take their likeliest item. Intervals are 95 % Student intervals over the seeds.

The supervised policy is fitted by the cross-entropy of the items that were taken in a log of 2,000 visits of the
logging policy; off-policy learning (Chen et al. 2019, K = 1, since one item is shown) starts from it and has the same
log with its propensities, and returns until the visit's end. On-policy learning starts uniform and plays 256 users for
16 steps in each update. The speed of that update is measured beside loops that do the same with the same batch, in one
call: with all users at once in NumPy, and with one user at a time, as environments with a `step` function invite; the
network in NumPy (gradient by hand) or PyTorch; two threads (`bench/rl_loops.py`).
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import jax
import numpy as np

from bench.environment_policy import HIDDEN, EnvironmentPolicy, new_policy, probabilities
from bench.from_environment_log import FromLogConfig, collect_log, fit_to_log, next_item_loss, off_policy_loss
from bench.intervals import student
from bench.publish import Page, less, publish_option, read_figures, spread, write_figures
from bench.synthetic import TRAINING, acquired_taste, logging_logprobs, synthetic_environment
from bench.synthetic_exact import (
    all_states,
    best_policy,
    build_model,
    deterministic,
    logging_policy,
    value,
)
from jaxrec.config import to_json
from jaxrec.rl.checkpoint import PolicyCheckpoint
from jaxrec.rl.simulated.policy import Params
from jaxrec.rl.simulated.train import first_learner, simulated_updates, train_simulated

SEEDS, PARTS = 5, ("values", "speed")  # of the page
PARAMS = acquired_taste()
ENVIRONMENT = synthetic_environment(PARAMS)
DISCOUNTS = (0.0, 0.5, 0.9, 0.95, 0.98)
VISITS, LONGEST = 2000, 400
REPEATS = 5  # of the measurement of speed


@click.command()
@click.option("--seeds", default=SEEDS, show_default=True)
@click.option("--updates", default=TRAINING.updates, show_default=True)
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--discount", "discounts", type=float, multiple=True, default=DISCOUNTS, show_default=True)
@click.option("--torch", "torch_python", default="", help="A Python with PyTorch and NumPy, for the loops.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Figures of both parts stay here.")
@publish_option
def main(
    seeds: int,
    updates: int,
    parts: str,
    discounts: tuple[float, ...],
    torch_python: str,
    work: Path,
    publish: bool,
) -> None:
    """Measures the parts, then writes the tables."""
    asked = less(
        seeds=(seeds, SEEDS),
        updates=(updates, TRAINING.updates),
        parts=(parts.split(","), PARTS),
        discounts=(list(map(str, discounts)), list(map(str, DISCOUNTS))),
        loops=(["PyTorch"] if torch_python else [], ["PyTorch"]),
    )
    page = Page("rl_synthetic", "Reinforcement learning where the truth is known", publish, work, asked)
    paragraphs = (__doc__ or "").split("\n\n")[2:4]
    body = [
        f"Seeds 0 to {seeds - 1}, {updates} updates.\n",
        *(one.strip().replace("\n", " ") + "\n" for one in paragraphs),
    ]
    results = []
    if "values" in parts:
        results.append(work / f"values-{seeds}-{updates}-{len(discounts)}.json")
        if not results[-1].is_file():
            write_figures(results[-1], values(seeds, updates, discounts, work))
        body += values_table(read_figures(results[-1]))
    if "speed" in parts:
        results.append(work / "speed.json")
        if not results[-1].is_file():
            write_figures(results[-1], speed(torch_python))
        body += speed_table(read_figures(results[-1]))
    page.write(body, results)


def values(seeds: int, updates: int, discounts: tuple[float, ...], work: Path) -> dict[str, list[float]]:
    """Shares of the best value by policy, one per seed where something is learned."""
    model = build_model(PARAMS)
    best = value(model, best_policy(model))

    def shares(policy: EnvironmentPolicy, params: Params) -> tuple[float, float]:
        table = np.asarray(probabilities(policy, params, ENVIRONMENT, all_states(PARAMS)), np.float64)
        table /= table.sum(axis=1, keepdims=True)
        top = deterministic(table.argmax(axis=1), table.shape[1])
        return value(model, table) / best, value(model, top) / best

    logging = logging_policy(PARAMS)
    found: dict[str, list[float]] = {
        "best value": [best],
        "best policy": [1.0],
        "greedy, exact one-step reward": [value(model, best_policy(model, discount=0.0)) / best],
        "logging policy": [value(model, logging) / best],
        "uniform": [value(model, np.full_like(logging, 1 / logging.shape[1])) / best],
    }

    def add(name: str, shares: tuple[float, float]) -> None:
        found.setdefault(name, []).append(shares[0])
        found.setdefault(f"{name}, best item", []).append(shares[1])
        print(name, shares, flush=True)

    for seed in range(seeds):
        policy = new_policy(ENVIRONMENT, seed=seed)
        for discount in (0.0, 0.95):
            log = collect_log(
                ENVIRONMENT,
                lambda s: logging_logprobs(PARAMS, s),
                jax.random.key(100 + seed),
                VISITS,
                LONGEST,
                discount,
            )
            config = FromLogConfig(seed=seed)
            supervised, _ = fit_to_log(policy, policy.start, log, next_item_loss, config)
            if discount:
                add("supervised: next taken item", shares(policy, supervised))
            learned, metrics = fit_to_log(policy, supervised, log, off_policy_loss(config), config)
            add(f"off-policy from the log, discount {discount:g}", shares(policy, learned))
            for name, of_updates in metrics.items():
                found.setdefault(f"{name}, discount {discount:g}", []).append(float(of_updates[-100:].mean()))
        for discount in discounts:
            config_on = dataclasses.replace(TRAINING, seed=seed, discount=discount, updates=updates)
            checkpoint = PolicyCheckpoint(work / f"on-policy-{discount:g}-{seed}")
            checkpoint.open({"configuration": to_json(config_on)})
            params, _ = train_simulated(ENVIRONMENT, policy, config_on, checkpoint)
            add(f"on-policy, discount {discount:g}", shares(policy, params))
    return found


def speed(torch_python: str) -> dict[str, list[float]]:
    """Environment steps per second, in each repeat: of the jitted update, its environment alone, and the loops."""
    config, policy = TRAINING, new_policy(ENVIRONMENT)
    updates = simulated_updates(ENVIRONMENT, policy, config)
    learner, key = first_learner(ENVIRONMENT, policy, config), jax.random.key(0)
    count = 50
    learner, metrics = updates(learner, policy.start, key, count)
    jax.block_until_ready(metrics)
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        learner, metrics = updates(learner, policy.start, key, count)
        jax.block_until_ready(metrics)
        rates.append(count * config.users * config.steps / (time.perf_counter() - start))
    found = {"jaxrec, rollout and update": rates}

    @jax.jit
    def alone(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, config.users)
        state = jax.vmap(ENVIRONMENT.reset)(keys)[0]

        def go(state: object, key: jax.Array) -> tuple[object, jax.Array]:
            act_key, step_key = jax.random.split(key)
            actions = jax.random.randint(act_key, (config.users,), 1, ENVIRONMENT.item_count + 1)
            state, _, reward, _ = jax.vmap(ENVIRONMENT.step)(state, actions, jax.random.split(step_key, config.users))
            return state, reward.sum()

        return jax.lax.scan(go, state, jax.random.split(key, 2000))[1].sum()

    jax.block_until_ready(alone(key))
    rates = []
    for seed in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(alone(jax.random.key(1 + seed)))
        rates.append(2000 * config.users / (time.perf_counter() - start))
    found["jaxrec, environment alone, random items"] = rates
    if torch_python:
        with tempfile.TemporaryDirectory() as folder:
            tables = {name: np.asarray(array) for name, array in PARAMS._asdict().items()}
            np.savez(Path(folder) / "params.npz", **tables)
            command = [torch_python, str(Path(__file__).with_name("rl_loops.py")), f"{folder}/params.npz"]
            command.append(json.dumps({**dataclasses.asdict(config), "hidden": HIDDEN, "repeats": REPEATS}))
            found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def values_table(found: dict[str, list[float]]) -> list[str]:
    """The policies that learned and those that are exact."""
    lines = [
        f"Best value: {found['best value'][0]:.2f} items taken in a visit of 50 steps on average.\n",
        "| policy | share of the best value | always its likeliest item |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {interval(shares)} | {interval(found[f'{name}, best item']) if learned else ''} |"
        for name, shares in found.items()
        if name != "best value"
        and not name.endswith("best item")
        and not name.startswith(("effective_share", "clipped"))
        for learned in [f"{name}, best item" in found]
    ]
    for discount in ("0", "0.95"):
        effective, clipped = found[f"effective_share, discount {discount}"], found[f"clipped, discount {discount}"]
        lines.append(
            f"\nOff-policy, discount {discount}, last 100 updates: effective sample size {np.mean(effective):.0%} "
            f"of the batch, {np.mean(clipped):.1%} of the weights at the cap."
        )
    return lines


def speed_table(found: dict[str, list[float]]) -> list[str]:
    """Steps per second, beside the jitted update."""
    ours = float(np.median(found["jaxrec, rollout and update"]))
    return [
        f"\n## Speed\n\nMedian of {REPEATS} repeats (lowest to highest).\n",
        "| | environment steps per second | the jitted update is faster by |",
        "|---|---|---|",
        *(f"| {name} | {spread(rates, 0)} | {ours / np.median(rates):.1f} |" for name, rates in found.items()),
    ]


def interval(shares: list[float]) -> str:
    """Mean and Student's 95 % interval."""
    if len(shares) == 1:
        return f"{shares[0]:.3f}"
    mean, half = student(shares)
    return f"{mean:.3f} ({mean - half:.3f}-{mean + half:.3f})"


if __name__ == "__main__":
    sys.exit(main())
