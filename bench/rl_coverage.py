"""How often the intervals of offline evaluation cover the truth in the environment whose values are known, for
bench/rl_coverage.md.

    python -m bench.rl_coverage [--logs 100] [--processes 2] [--publish]

The environment is the user with an acquired taste (`bench.synthetic`), and the value of a policy is
what a new user takes in the first H steps of its visit: exact, by a sweep over all states for each step (Sutton and
Barto 2018, section 4.1). Logs are visits of the logging policy, with its propensities, cut at H steps. A visit is a
slate whose slots are the steps, since what is taken depends on what was shown before and not on what comes after: step
t's weight is the product of the ratios of steps 1..t, and steps after the user left are empty. So IPS is per-decision
importance sampling and SNIPS its weighted form (Precup et al. 2000), and Cascade-DR is doubly robust for sequences
(Jiang & Li 2016; self-normalized: Thomas & Brunskill 2016). Its Q is the exact one of an environment with half the
gain: wrong, most where a taste was acquired, and fitted on no log.

New policies: the logging policy (a softmax of sharpness 4 over what is likely to be taken, a tenth uniform) made
sharper, and two that were learned from one more log, by the cross-entropy of what was taken (supervised) and by the
off-policy correction with discount .95 that starts from it. Visits are the bootstrap's groups. Logs of one seed are
the same in all tables, shorter ones being the beginnings of longer ones.
"""

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np

from bench.coverage_tables import Coverage, coverage_table, size_table
from bench.environment_policy import new_policy, probabilities
from bench.estimators import ips, percentile
from bench.from_environment_log import FromLogConfig, collect_log, fit_to_log, next_item_loss, off_policy_loss
from bench.publish import Page, less, publish_option
from bench.synthetic import SyntheticState, acquired_taste, logging_logprobs, synthetic_environment
from bench.synthetic_exact import (
    action_values,
    all_states,
    build_model,
    logging_policy,
    state_number,
    value,
    values_by_steps,
)
from jaxrec.rl.ope.estimators import Terms, doubly_robust, on_policy, self_normalized_doubly_robust, snips
from jaxrec.rl.ope.intervals import interval_of, replicates, studentized
from jaxrec.rl.ope.sample_size import effective_sample_size, slate_sample_size
from jaxrec.rl.ope.weights import ImportanceWeights, slate_weights
from jaxrec.rl.simulated.policy import draw_actions

LOGS = 100  # of each seed, of the page
PARAMS = acquired_taste()
ENVIRONMENT = synthetic_environment(PARAMS)
HALF_RIGHT = PARAMS._replace(gain=PARAMS.gain / 2)
SEEDS, LEVEL, RESAMPLES = 5, 0.95, 600
STEPS, VISITS = 10, 3000  # of the longest logs
LEARNED_VISITS, LEARNED_STEPS, HIDDEN = 2000, 400, 64
PAIRED = "SNIPS, gain over the log (paired)"
NEAR, FURTHER, FAR = "sharpness 5", "sharpness 8, a twentieth uniform", "sharpness 12, a twentieth uniform"
SUPERVISED, OFF_POLICY = "supervised", "off-policy from a log"


class Setting(NamedTuple):
    """The new policy, the steps of a visit, and the visits of a log."""

    policy: str
    steps: int
    visits: int


SETTINGS = (
    *(Setting(policy, steps, 1000) for policy in (NEAR, FURTHER, FAR) for steps in (1, 5, 10)),
    Setting(SUPERVISED, 1, 1000),
    Setting(SUPERVISED, 10, 1000),
    Setting(OFF_POLICY, 1, 1000),
    Setting(FURTHER, 10, 3000),
    Setting(FAR, 10, 3000),
)


class Visits(NamedTuple):
    """Logged visits, each [logs, visits, steps]: the `state` int16 (its number in `all_states`) that was seen, the
    `action` int8 (item 1 is 0), whether it was taken, and whether the user was still there, both bool."""

    state: np.ndarray
    action: np.ndarray
    taken: np.ndarray
    here: np.ndarray


class Worth(NamedTuple):
    """A policy [states, items] and what is known of it over some steps: the true `value`, that of the logging policy
    (`logged`), and `q` [steps, states, items], what items are worth at each step in the half right environment."""

    policy: np.ndarray
    value: float
    logged: float
    q: np.ndarray


def draw_visits(key: jax.Array, logs: int, visits: int, steps: int) -> Visits:
    """Independent visits of the logging policy."""
    users = logs * visits

    @jax.jit
    def play() -> tuple[jax.Array, ...]:
        start = jax.vmap(ENVIRONMENT.reset)(jax.random.split(jax.random.fold_in(key, 0), users))[0]

        def go(
            at: tuple[SyntheticState, jax.Array], key: jax.Array
        ) -> tuple[tuple[SyntheticState, jax.Array], tuple[jax.Array, ...]]:
            state, here = at
            act_key, step_key = jax.random.split(key)
            _, action = draw_actions(ENVIRONMENT, act_key, jax.vmap(lambda s: logging_logprobs(PARAMS, s))(state))
            number = jax.vmap(lambda s: state_number(PARAMS, s))(state)
            state, _, reward, done = jax.vmap(ENVIRONMENT.step)(state, action, jax.random.split(step_key, users))
            seen = number.astype(jnp.int16), (action - 1).astype(jnp.int8), here & (reward > 0), here
            return (state, here & ~done), seen

        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        return jax.lax.scan(go, (start, jnp.ones(users, bool)), keys)[1]

    return Visits(*(np.asarray(column).T.reshape(logs, visits, steps) for column in play()))


def new_policies() -> dict[str, np.ndarray]:
    """The policies that are evaluated, [states, items] float64 each."""
    sharper = {NEAR: (5.0, 0.1), FURTHER: (8.0, 0.05), FAR: (12.0, 0.05)}
    policies = {
        name: logging_policy(PARAMS._replace(sharpness=jnp.float32(sharpness), uniform=jnp.float32(uniform)))
        for name, (sharpness, uniform) in sharper.items()
    }
    key, config = jax.random.key(1000), FromLogConfig()
    log = collect_log(
        ENVIRONMENT, lambda s: logging_logprobs(PARAMS, s), key, LEARNED_VISITS, LEARNED_STEPS, discount=0.95
    )
    policy = new_policy(ENVIRONMENT, HIDDEN, 0)
    supervised, _ = fit_to_log(policy, policy.start, log, next_item_loss, config)
    off_policy, _ = fit_to_log(policy, supervised, log, off_policy_loss(config), config)
    for name, params in ((SUPERVISED, supervised), (OFF_POLICY, off_policy)):
        table = np.asarray(probabilities(policy, params, ENVIRONMENT, all_states(PARAMS)), np.float64)
        policies[name] = table / table.sum(axis=1, keepdims=True)
    return policies


def worth_of(policy: np.ndarray, steps: int) -> Worth:
    """What is known of a policy [states, items] over so many steps."""
    model, half_right = build_model(PARAMS), build_model(HALF_RIGHT)
    after = values_by_steps(half_right, policy, steps - 1)[::-1]  # of what the first step leaves, then of less
    q = np.stack([action_values(half_right, values) for values in after])
    return Worth(policy, value(model, policy, steps), value(model, logging_policy(PARAMS), steps), q)


def terms_of(worth: Worth, logging: np.ndarray, log: Visits) -> tuple[ImportanceWeights, dict[str, Terms]]:
    """The weights of a log [visits, steps], and the terms of each estimator."""
    done = log.state, log.action
    weights = slate_weights(np.log(worth.policy[done]), np.log(logging[done]), log.here)
    rewards = log.taken.astype(np.float64)
    step = np.arange(rewards.shape[1])
    q_logged = np.where(log.here, worth.q[step, log.state, log.action], 0.0)
    q_new = np.where(log.here, np.sum(worth.policy * worth.q, axis=2)[step, log.state], 0.0)
    normalized = snips(weights, rewards)
    return weights, {
        "IPS": ips(weights, rewards),
        "SNIPS": normalized,
        "doubly robust": doubly_robust(weights, rewards, q_logged, q_new),
        "self-normalized doubly robust": self_normalized_doubly_robust(weights, rewards, q_logged, q_new),
        PAIRED: normalized.minus(on_policy(rewards)),
    }


def coverage_of(task: tuple[Worth, np.ndarray, Visits]) -> tuple[list[Coverage], float]:
    """The intervals of each log of one seed and setting; the median effective sample size of the last step."""
    worth, logging, logs = task
    covered, last = [], []
    for number, log in enumerate(Visits(*of_log) for of_log in zip(*logs, strict=True)):
        weights, terms = terms_of(worth, logging, log)
        sizes = effective_sample_size(weights)
        last.append(sizes[-1])
        for name, of_name in terms.items():
            truth = worth.value - worth.logged if name == PAIRED else worth.value
            drawn = replicates(of_name, None, RESAMPLES, number)
            for called, method in ((name, studentized), (f"{name}, percentile", percentile)):
                found = interval_of(drawn, LEVEL, method)
                covered.append(Coverage(called, truth, found.value, found.low, found.high, slate_sample_size(sizes)))
    return covered, float(np.median(last))


def tasks(worths: list[Worth], logging: np.ndarray, logs: int) -> Iterator[tuple[Worth, np.ndarray, Visits]]:
    """Of each seed, all settings: the visits of one seed are held at a time."""
    for seed in range(SEEDS):
        drawn = draw_visits(jax.random.key(seed), logs, VISITS, STEPS)
        for setting, worth in zip(SETTINGS, worths, strict=True):
            yield worth, logging, Visits(*(column[:, : setting.visits, : setting.steps] for column in drawn))


@click.command()
@click.option("--logs", type=click.IntRange(2), default=LOGS, help="Logs for each seed.")
@click.option("--processes", type=click.IntRange(1), default=2)
@publish_option
def main(logs: int, processes: int, publish: bool) -> None:
    """Measures, then prints the tables."""
    page = Page(
        "rl_coverage", "Coverage where the value of every policy is known", publish, less=less(logs=(logs, LOGS))
    )
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes to come: they would wait for each other's threads
    policies = new_policies()
    worths = [worth_of(policies[setting.policy], setting.steps) for setting in SETTINGS]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # a fork would inherit JAX's locks
        found = list(pool.imap(coverage_of, tasks(worths, logging_policy(PARAMS), logs)))
    paragraphs = [paragraph.strip().replace("\n", " ") for paragraph in (__doc__ or "").split("\n\n")[2:]]
    lines = [
        f"Seeds 0 to {SEEDS - 1}, {logs} logs of each; "
        f"{LEVEL:.0%} intervals by {RESAMPLES} bootstrap samples of visits, studentized but where percentile is said. "
        "Coverage: mean and 95 % t interval over the seeds. `truth below` and `truth above` should be "
        f"{(1 - LEVEL) / 2:.3f} each. Effective sample sizes are medians, in visits: over the steps, as the gate "
        "counts it, and of the last step alone.",
        *itertools.chain.from_iterable(("", paragraph) for paragraph in paragraphs),
    ]
    everything = [one for covered, _ in found for one in covered]
    lines += ["", "## By the effective sample size", ""]
    lines += size_table(everything, ("IPS", "SNIPS", "doubly robust", "self-normalized doubly robust", PAIRED))
    lines += ["", "## By policy, steps and visits"]
    for number, (setting, worth) in enumerate(zip(SETTINGS, worths, strict=True)):
        of_setting = found[number :: len(SETTINGS)]
        by_seed = [covered for covered, _ in of_setting]
        size = np.median([one.size for covered in by_seed for one in covered])
        last = np.median([last for _, last in of_setting])
        lines += ["", f"{setting.policy}; {setting.steps} step{'s' * (setting.steps > 1)}, {setting.visits} visits. "]
        lines[-1] += f"Truth {worth.value:.4f}, the logging policy's {worth.logged:.4f}; "
        lines[-1] += f"effective sample size {size:.0f}, last step {last:.0f}"
        lines += ["", *coverage_table(by_seed)]
    page.write(lines)


if __name__ == "__main__":
    main()
