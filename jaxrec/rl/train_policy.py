"""Trains a policy on top of the supervised hybrid, judging it on validation as it goes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxrec.config import RLConfig
from jaxrec.models.hybrid import Hybrid
from jaxrec.prepare import PreparedData
from jaxrec.rl.judge import case_states, decide, make_judge
from jaxrec.rl.reinforce import Scoring, frozen_scoring, make_updates, new_learner
from jaxrec.rl.rewards import RewardTables, genre_directions, shrunk_item_ratings
from jaxrec.rl.states import training_states
from jaxrec.schema import DataError
from jaxrec.train import TrainingError

METRIC = "reward_weighted_ndcg_10"


@dataclasses.dataclass(frozen=True)
class PolicyOutcome:
    """`used`: whether the policy replaces the supervised one, and `reason` why, with the figures. `step`: how many
    updates its best state took. `supervised` and `policy`: the figures of both on validation."""

    used: bool
    reason: str
    step: int
    supervised: dict[str, float]
    policy: dict[str, float]


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """`variables` of PolicyHead in its best state; `log` has one record per evaluation: means over the updates since
    the one before, and the figures on validation."""

    outcome: PolicyOutcome
    variables: Any
    log: list[dict[str, Any]]


def train_policy(hybrid: Hybrid, data: PreparedData, config: RLConfig) -> TrainedPolicy:
    """Trains from the supervised policy on, and judges every `steps_per_evaluation` updates.

    Among the states that may be used (`jaxrec.rl.judge.decide`) the one with the highest reward-weighted NDCG@10 on
    validation is kept; where there is none, the highest of all is reported.
    """
    if not len(data.split.validation):
        raise DataError("no validation case is left; the log is too short to judge a policy")
    config = dataclasses.replace(config, slate_size=min(config.slate_size, len(data.catalog)))
    device = jax.devices()[0]
    scoring = jax.device_put(_scoring(hybrid, data), device)
    item_ratings = np.asarray(scoring.tables.item_ratings)
    states = jax.device_put(training_states(hybrid, data, item_ratings, config.seed), device)
    cases = case_states(hybrid, data, data.split.validation, item_ratings)
    graphdef, learner = new_learner(scoring.item_vectors.shape[1], len(data.catalog), config)
    learner = jax.device_put(learner, device)
    updates = make_updates(graphdef, config)
    judge = make_judge(graphdef, scoring, cases, data, hybrid.lstm.config.max_length, config.rewards)
    supervised = judge(learner.head).figures()
    key = jax.random.key(config.seed)
    best: TrainedPolicy | None = None
    log: list[dict[str, Any]] = []
    with tqdm(total=config.steps, desc="train policy", unit="step") as bar:
        for start in range(0, config.steps, config.steps_per_evaluation):
            stop = min(start + config.steps_per_evaluation, config.steps)
            learner, metrics = updates(learner, scoring, states, key, stop - start)
            record = _means(jax.device_get(metrics), start)
            figures = judge(learner.head).figures()
            used, reason = decide(figures, supervised)
            log.append({"step": stop, **record, "validation": figures, "may_be_used": used})
            if best is None or (used, figures[METRIC]) > (best.outcome.used, best.outcome.policy[METRIC]):
                variables = jax.tree.map(np.array, learner.head)  # copied: the next update takes the buffers
                best = TrainedPolicy(PolicyOutcome(used, reason, stop, supervised, figures), variables, log)
            bar.update(stop - start)
            bar.set_postfix(reward=f"{record['reward']:.4f}", kl=f"{record['kl']:.4f}")
    if best is None:
        raise ValueError(f"steps is {config.steps}, expected at least 1")
    return best


def _scoring(hybrid: Hybrid, data: PreparedData) -> Scoring:
    rows = data.split.train_rows(data.histories)
    item_ratings = shrunk_item_ratings(data.histories.items[rows], data.unit_ratings()[rows], len(data.catalog))
    tables = RewardTables(jnp.asarray(genre_directions(data.catalog.genre_matrix())), jnp.asarray(item_ratings))
    return frozen_scoring(hybrid, tables)


def _means(metrics: dict[str, np.ndarray], start: int) -> dict[str, float]:
    """The mean of each metric [steps]. Raises TrainingError where one is not finite."""
    for name, values in metrics.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise TrainingError(
                f"{name} is not finite at step {start + wrong[0]} (of steps {start}..{start + len(values) - 1}); "
                "no policy was written, and the supervised one stays in use"
            )
    return {name: float(values.mean()) for name, values in metrics.items()}
