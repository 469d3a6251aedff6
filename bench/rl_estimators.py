"""How often the intervals of offline evaluation cover the truth, and what the gate lets pass, for
bench/rl_estimators.md.

    python -m bench.rl_estimators [--logs 100] [--processes 2] [--publish]

Everything is drawn from small worlds (one for each of 5 seeds) whose values are sums, so that the truth is exact. A
user has one of 5 contexts and a liking of its own, and leaves 10 decisions: its rows depend on each other. Binary
rewards, 20 actions; or slates of 3 of 8 items, where a slot's reward falls with what is alike above it.
"""

import itertools
import multiprocessing
from typing import NamedTuple

import click
import numpy as np
from scipy.special import log_softmax

from bench.coverage_tables import Coverage, coverage_table, over_seeds, size_table
from bench.estimators import bias_corrected_accelerated, ips, percentile, switch_doubly_robust
from bench.publish import Page, less, publish_option
from jaxrec.rl.ope.estimators import Terms, doubly_robust, on_policy, self_normalized_doubly_robust, snips
from jaxrec.rl.ope.gate import MINIMUM_EFFECTIVE, GateDecision, gate
from jaxrec.rl.ope.intervals import OPE_SAMPLES, IntervalMethod, interval, studentized
from jaxrec.rl.ope.sample_size import effective_sample_size, slate_sample_size
from jaxrec.rl.ope.weights import ImportanceWeights, importance_weights, slate_weights

LOGS = 100  # of each seed, of the page
SEEDS, LEVEL, RESAMPLES = 5, 0.95, 600
CONTEXTS, ACTIONS, DECISIONS, LIKING = 5, 20, 10, 0.12
ITEMS, SLOTS = 8, 3
DISCOUNTS = np.array([0.5, 0.3, 0.2])
# Users, and how far the new policy is from the logged one (standard deviation of the change of its logits).
SETTINGS = ((200, 0.3), (400, 1.0), (150, 1.0), (100, 2.0), (40, 3.0), (15, 5.0))
SLATE_SETTINGS = ((300, 0.3), (300, 0.7), (300, 1.5))


class World(NamedTuple):
    """`reward` [contexts, actions] mean rewards; `logged` [contexts, actions] log-propensities; `direction` a fixed
    change of logits of standard deviation 1; `model` a reward model that is half right."""

    reward: np.ndarray
    logged: np.ndarray
    direction: np.ndarray
    model: np.ndarray

    def policy(self, apart: float, towards_reward: float) -> np.ndarray:
        """[contexts, actions] log-propensities."""
        z = (self.reward - self.reward.mean(axis=1, keepdims=True)) / self.reward.std()
        return log_softmax(self.logged + apart * self.direction + towards_reward * z, axis=1)

    def value(self, logprobs: np.ndarray) -> float:
        return float(np.mean(np.sum(np.exp(logprobs) * self.reward, axis=1)))


class Log(NamedTuple):
    """`context`, `action`, `reward`, `user`, each [rows]."""

    context: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    user: np.ndarray


def new_world(seed: int, actions: int = ACTIONS) -> World:
    rng = np.random.default_rng([seed, 0])
    reward = rng.uniform(LIKING, 1 - LIKING, (CONTEXTS, actions)) ** 1.5
    reward = np.clip(reward, LIKING, None)
    model = 0.5 * reward + 0.5 * rng.permutation(reward.ravel()).reshape(reward.shape)
    logged = log_softmax(rng.normal(size=reward.shape), axis=1)
    return World(reward, logged, rng.normal(size=reward.shape), model)


def draw_log(world: World, users: int, rng: np.random.Generator) -> Log:
    user = np.repeat(np.arange(users), DECISIONS)
    context = rng.integers(CONTEXTS, size=users)[user]
    liking = rng.choice([-LIKING, LIKING], users)[user]
    action = (world.logged[context] + rng.gumbel(size=(len(user), ACTIONS))).argmax(axis=1)
    reward = rng.random(len(user)) < world.reward[context, action] + liking
    return Log(context, action, reward.astype(float), user)


def terms_of(world: World, log: Log, new: np.ndarray) -> tuple[ImportanceWeights, dict[str, Terms]]:
    row = log.context, log.action
    weights, capped = (importance_weights(new[row], world.logged[row], cap) for cap in (None, 10.0))
    robust = (log.reward, world.model[row], np.sum(np.exp(new) * world.model, axis=1)[log.context])
    return weights, {
        "IPS": ips(weights, log.reward),
        "IPS, weights capped at 10": ips(capped, log.reward),
        "SNIPS": snips(weights, log.reward),
        "doubly robust": doubly_robust(weights, *robust),
        "self-normalized doubly robust": self_normalized_doubly_robust(weights, *robust),
        "switch-DR, threshold 10": switch_doubly_robust(weights, *robust, 10.0),
    }


def action_coverage(task: tuple[int, int, float, int]) -> list[Coverage]:
    seed, users, apart, logs = task
    world, rng = new_world(seed), np.random.default_rng([seed, 1, users, int(10 * apart)])
    new = world.policy(apart, 0.5)
    truth, before = world.value(new), world.value(world.logged)
    covered = []
    for number in range(logs):
        log = draw_log(world, users, rng)
        weights, terms = terms_of(world, log, new)
        size = float(effective_sample_size(weights, log.user))

        both = terms["SNIPS"].minus(on_policy(log.reward))
        asked: list[tuple[str, Terms, float, np.ndarray | None, IntervalMethod]] = [
            *((name, of_name, truth, log.user, studentized) for name, of_name in terms.items()),
            ("SNIPS, gain over the log (paired)", both, truth - before, log.user, studentized),
            ("SNIPS, percentile", terms["SNIPS"], truth, log.user, percentile),
            ("SNIPS, BCa", terms["SNIPS"], truth, log.user, bias_corrected_accelerated),
            ("IPS, percentile", terms["IPS"], truth, log.user, percentile),
            ("SNIPS, rows taken as independent", terms["SNIPS"], truth, None, studentized),
        ]
        for name, of_name, true_value, groups, method in asked:
            found = interval(of_name, groups, LEVEL, RESAMPLES, number, method)
            covered.append(Coverage(name, true_value, found.value, found.low, found.high, size))
    return covered


def slate_rewards(reward: np.ndarray, slates: np.ndarray) -> np.ndarray:
    """Mean discounted rewards [..., slots] of slates [..., slots] for reward [..., items] of the context: a slot's
    falls to 60 % for each item above it of the same kind (items are of two kinds, even and odd)."""
    kind = slates % 2
    alike = np.stack([np.sum(kind[..., :k] == kind[..., k : k + 1], axis=-1) for k in range(SLOTS)], axis=-1)
    return DISCOUNTS * np.take_along_axis(reward, slates, axis=-1) * 0.6**alike


def slate_logprobs(logits: np.ndarray, slates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of slates [rows, slots]: each slot's log-probability given the slots above [rows, slots], and the distribution
    that it was drawn from [rows, slots, items]."""
    taken = np.zeros_like(logits, bool)
    each, distributions = [], []
    for k in range(SLOTS):
        logprobs = log_softmax(np.where(taken, -np.inf, logits), axis=1)
        each.append(np.take_along_axis(logprobs, slates[:, k : k + 1], axis=1)[:, 0])
        distributions.append(np.exp(logprobs))
        taken = taken | (np.arange(logits.shape[1]) == slates[:, k : k + 1])
    return np.stack(each, axis=1), np.stack(distributions, axis=1)


def slate_coverage(task: tuple[int, int, float, int]) -> list[Coverage]:
    seed, users, apart, logs = task
    world, rng = new_world(seed, ITEMS), np.random.default_rng([seed, 2, users, int(10 * apart)])
    new = world.policy(apart, 0.5)
    every = np.array(list(itertools.permutations(range(ITEMS), SLOTS)))
    truth = 0.0
    for context in range(CONTEXTS):
        repeated = np.broadcast_to(new[context], (len(every), ITEMS))
        probability = np.exp(slate_logprobs(repeated, every)[0].sum(axis=1))
        rewards = slate_rewards(np.broadcast_to(world.reward[context], repeated.shape), every)
        truth += float(probability @ rewards.sum(axis=1)) / CONTEXTS
    covered = []
    for number in range(logs):
        user = np.repeat(np.arange(users), 2)
        context = rng.integers(CONTEXTS, size=users)[user]
        noise = rng.gumbel(size=(len(user), ITEMS))
        slates = np.argsort(-(world.logged[context] + noise), axis=1)[:, :SLOTS]
        mean = slate_rewards(world.reward[context], slates) / DISCOUNTS
        rewards = DISCOUNTS * (rng.random(mean.shape) < mean)
        logged, _ = slate_logprobs(world.logged[context], slates)
        ours, distributions = slate_logprobs(new[context], slates)
        weights, near = slate_weights(ours, logged), slate_weights(ours, logged, lookback=1)
        model = DISCOUNTS[:, None] * world.model[context][:, None]  # of each slot and item, blind to what is above
        q_logged = np.take_along_axis(model, slates[:, :, None], axis=2)[:, :, 0]
        robust = (weights, rewards, q_logged, np.sum(distributions * model, axis=2))
        size = slate_sample_size(effective_sample_size(weights, user), DISCOUNTS)
        for name, terms in {
            "RIPS, not normalized": ips(weights, rewards),
            "RIPS": snips(weights, rewards),
            "RIPS, lookback of 1 slot (biased)": snips(near, rewards),
            "whole slates (SIPS), self-normalized": snips(
                importance_weights(ours.sum(axis=1), logged.sum(axis=1)), rewards.sum(axis=1)
            ),
            "Cascade-DR": doubly_robust(*robust),
            "Cascade-DR, self-normalized": self_normalized_doubly_robust(*robust),
        }.items():
            found = interval(terms, user, LEVEL, RESAMPLES, number)
            covered.append(Coverage(name, truth, found.value, found.low, found.high, size))
    return covered


class Case(NamedTuple):
    """What the gate is asked: a policy, by how much the log's propensities are made wrong (a factor), and what share of
    the policy goes to an action that the logged one never takes and that earns nothing (`missing`)."""

    name: str
    users: int
    apart: float
    towards_reward: float
    factor: float
    missing: float = 0.0


CASES = (
    Case("better, near", 300, 0.3, 0.5, 1.0),
    Case("better, apart", 300, 1.0, 0.5, 1.0),
    Case("as good as the logged one", 300, 1.0, 0.0, 1.0),
    Case("as good as the logged one, far, in a small log", 40, 3.0, 0.0, 1.0),
    Case("as good as the logged one, further, in a tiny log", 15, 5.0, 0.0, 1.0),
    Case("worse, near", 300, 0.3, -0.5, 1.0),
    Case("better, near, logged propensities 1.3 times too small", 300, 0.3, 0.5, 1.3),
    Case("10 % of it was never logged", 300, 1.2, 0.1, 1.0, 0.1),
    Case("worse, 25 % of it was never logged", 300, 1.2, 0.3, 1.0, 0.25),
)


def ask_gate(task: tuple[int, Case, int]) -> list[tuple[str, float, GateDecision, bool]]:
    """(case, true gain, decision, whether the interval alone would have let it pass) of each log."""
    seed, case, logs = task
    world, rng = new_world(seed), np.random.default_rng([seed, 3, CASES.index(case)])
    before, new = world.value(world.logged), world.policy(case.apart, case.towards_reward)
    if case.towards_reward == 0.0:  # a mixture of a better and a worse policy that is worth what the log is
        better, worse = (np.exp(world.policy(case.apart, sign * 4.0)) for sign in (1, -1))
        high, low = (world.value(np.log(policy)) for policy in (better, worse))
        share = (before - low) / (high - low)
        new = np.log(share * better + (1 - share) * worse)
    decided = []
    for _ in range(logs):
        log = draw_log(world, case.users, rng)
        row = log.context, log.action
        weights = importance_weights(np.log1p(-case.missing) + new[row], world.logged[row] - np.log(case.factor))
        worth, logged = snips(weights, log.reward), on_policy(log.reward)
        decision = gate(worth, logged, weights, log.user)
        gain = decision.gain or interval(worth.minus(logged), log.user)
        decided.append((case.name, (1 - case.missing) * world.value(new) - before, decision, gain.low > 0))
    return decided


def gate_table(asked: list[list[list[tuple[str, float, GateDecision, bool]]]]) -> list[str]:
    lines = [
        "| the new policy is | true gain | effective sample size | may be used | refused: sample size | refused: mean "
        "weight | refused: no gain shown | refused: none at worst | by the interval alone |",
        "|---" * 9 + "|",
    ]
    for by_seed in asked:
        every = [one for seed in by_seed for one in seed]
        used = over_seeds([np.mean([decision.used for _, _, decision, _ in seed]) for seed in by_seed])
        reasons = [
            np.mean([phrase in decision.reason for _, _, decision, _ in every])
            for phrase in (
                "the effective sample size is",
                "the propensities are not",
                "is not shown",
                "the log may lack",
            )
        ]
        size = np.median([decision.effective_sample_size for _, _, decision, _ in every])
        gains = [seed[0][1] for seed in by_seed]
        alone = np.mean([passed for *_, passed in every])
        lines.append(
            f"| {every[0][0]} | {min(gains):+.3f} to {max(gains):+.3f} | {size:.0f} | {used} | "
            + " | ".join(f"{share:.3f}" for share in (*reasons, alone))
            + " |"
        )
    return lines


@click.command()
@click.option("--logs", type=click.IntRange(2), default=LOGS, help="Logs for each seed and setting.")
@click.option("--processes", type=click.IntRange(1), default=2)
@publish_option
def main(logs: int, processes: int, publish: bool) -> None:
    """Measures, then prints the tables."""
    page = Page("rl_estimators", "Offline evaluation where the truth is known", publish, less=less(logs=(logs, LOGS)))
    seeds = range(SEEDS)
    with multiprocessing.Pool(processes) as pool:
        asked = pool.map(ask_gate, [(s, case, logs) for case in CASES for s in seeds], 1)
        actions = pool.map(action_coverage, [(s, *setting, logs) for setting in SETTINGS for s in seeds], 1)
        slates = pool.map(slate_coverage, [(s, *setting, logs) for setting in SLATE_SETTINGS for s in seeds], 1)
    lines = [
        f"Seeds 0 to {SEEDS - 1}, each a world of its own, {logs} logs of each; {LEVEL:.0%} intervals by "
        f"{RESAMPLES} bootstrap samples of users ({OPE_SAMPLES}, the default, in the gate), studentized but where "
        "another method is named. Coverage: mean and 95 % t interval over the seeds. `truth below` and `truth above` "
        f"should be {(1 - LEVEL) / 2:.3f} each. The reward model of the doubly robust estimators is half right.",
        "",
        "In short: where the effective sample size is in the hundreds, IPS, SNIPS, doubly robust and RIPS cover "
        "the truth about as often as they say, resampled by user. Rows taken as independent cover it less often. "
        "Caps, switching and a short lookback buy narrow intervals with a bias, which no interval knows of. With "
        "few effective users percentile intervals are too narrow; studentized ones, which are the default, grow "
        "wide instead, until those of doubly robust and of the gain are too narrow as well: the gate refuses "
        "before. The estimators are those of Open Bandit Pipeline to 1e-6 "
        "(tests/rl/ope/test_open_bandit_pipeline.py).",
        "",
        "## Single actions",
    ]
    for number, (users, apart) in enumerate(SETTINGS):
        by_seed = actions[number * SEEDS : (number + 1) * SEEDS]
        size = np.median([one.size for covered in by_seed for one in covered])
        lines += ["", f"{users} users of {DECISIONS} decisions, policies {apart:g} apart; "]
        lines[-1] += f"effective sample size {size:.0f} users (median)"
        lines += ["", *coverage_table(by_seed)]
    lines += ["", "## What a small effective sample size does", ""]
    lines += ["The same logs, by the effective sample size of each.", ""]
    flat = [one for covered in actions for one in covered]
    gain = "SNIPS, gain over the log (paired)"
    lines += size_table(flat, ("IPS", "IPS, percentile", "SNIPS", "SNIPS, percentile", "doubly robust", gain))
    lines += ["", "## Slates"]
    for number, (users, apart) in enumerate(SLATE_SETTINGS):
        by_seed = slates[number * SEEDS : (number + 1) * SEEDS]
        size = np.median([one.size for covered in by_seed for one in covered])
        lines += ["", f"{users} users of 2 slates of {SLOTS} of {ITEMS} items, policies {apart:g} apart; "]
        lines[-1] += f"effective sample size {size:.0f} users over the slots (median)"
        lines += ["", *coverage_table(by_seed)]
    lines += [
        "",
        "## The gate",
        "",
        f"{OPE_SAMPLES} bootstrap samples. "
        f"SNIPS against the log, effective sample size of at least {MINIMUM_EFFECTIVE:g} users, gain above 0 at "
        f"{LEVEL:.0%}, with what was never logged at the least reward as well (`none at worst` where only that is not "
        "shown). Shares of the logs; the last column is what a gate that only looks at the interval would let pass.",
        "",
        *gate_table([asked[number * SEEDS : (number + 1) * SEEDS] for number in range(len(CASES))]),
    ]
    page.write(lines)


if __name__ == "__main__":
    main()
