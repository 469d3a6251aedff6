"""Evaluates a policy in a simulator that did not train it, beside the policy it started from; decides which is used.

NDCG@10 on validation is compared with that of the supervised models. If it were compared with the policy that training
started from, each of many accepted trainings could lose a little more of it.

Every simulated user makes REQUESTS requests in an episode, and has EPISODES episodes, each from its first events on.
The random numbers are the same for both policies. Slates are the best items, as a server without `--explore` shows
them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.rl.cases import CaseResults, compare, signed
from jaxrec.rl.constraints import slate_coverage
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.rl.policy import greedy_slates, sample_slates
from jaxrec.rl.scoring import PolicyParams
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.policy import RecommenderPolicy
from jaxrec.rl.simulated.recommender import RecommenderObservation, RecommenderState

REQUESTS, EPISODES = 10, 5
NDCG_LOSS = 0.01  # of the supervised models' NDCG@10: the mean loss that a policy in use may have


class RolloutResults(NamedTuple):
    """Means over requests and episodes by user, [users] float64: `reward`, `taken` (0 or 1) and `rating` (0..1, 0 where
    nothing was chosen). `coverage`: the share of the catalogue that is shown in an episode of all users, on average."""

    reward: np.ndarray
    taken: np.ndarray
    rating: np.ndarray
    coverage: float


class SimulatedResults(NamedTuple):
    """A policy in the simulator for evaluation, and on the logged cases of validation."""

    rollouts: RolloutResults
    logged: CaseResults

    def figures(self) -> dict[str, float]:
        """Means, by name. The reward is that of the simulated users."""
        by_name = {name: float(np.mean(column)) for name, column in self.rollouts._asdict().items()}
        return {**by_name, "ndcg_10": self.logged.figures()["ndcg_10"]}


def rollout_evaluator(
    environment: Environment,
    first: tuple[RecommenderState, RecommenderObservation],
    policy: RecommenderPolicy,
    seed: int,
    drawn: bool = False,
) -> Callable[[PolicyParams], RolloutResults]:
    """evaluate(parameters of the policy) -> the results of all users [users, ...], who start at `first`. With `drawn`
    slates are drawn from the policy instead of its best items. Users do not leave early."""
    users = len(first[1].recurrent)

    @jax.jit
    def episode(params: PolicyParams, key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        def request(
            at: tuple[RecommenderState, RecommenderObservation], key: jax.Array
        ) -> tuple[tuple[RecommenderState, RecommenderObservation], tuple[dict[str, jax.Array], jax.Array]]:
            state, observation = at
            slate_key, step_key = jax.random.split(key)
            allowed = jax.vmap(environment.recommendable)(observation)
            logits = policy.logits(params, jax.vmap(environment.features)(observation), allowed)
            size = environment.slate_size
            slates = sample_slates(slate_key, logits, size) if drawn else greedy_slates(logits, size)
            keys = jax.random.split(step_key, users)
            state, observation, reward, _ = jax.vmap(environment.step)(state, slates, keys)
            terms = jax.vmap(environment.terms)(observation, reward)
            shown = jnp.where(jnp.take_along_axis(allowed, slates, axis=-1), slates, 0)
            return (state, observation), ({"reward": reward, **terms}, shown)

        _, (rewards, slates) = jax.lax.scan(request, first, jax.random.split(key, REQUESTS))
        shown = slate_coverage(slates, environment.item_count + 1)
        return {name: column.mean(axis=0) for name, column in rewards.items()}, shown

    def evaluate(params: PolicyParams) -> RolloutResults:
        keys = jax.random.split(jax.random.key(seed), EPISODES)
        episodes = [jax.device_get(episode(params, key)) for key in keys]

        def mean(name: str) -> np.ndarray:
            return np.stack([rewards[name] for rewards, _ in episodes]).mean(axis=0, dtype=np.float64)

        coverage = float(np.mean([shown for _, shown in episodes]))
        return RolloutResults(mean("reward"), mean("taken"), mean("rating"), coverage)

    return evaluate


def simulated_outcome(new: SimulatedResults, before: SimulatedResults, supervised: CaseResults) -> PolicyOutcome:
    """Whether the new policy is used instead of the one it started from, `before`.

    It is used if and only if the 95 % interval of its paired gain in mean reward per request, over the users, lies
    above 0, the interval of its paired difference in NDCG@10 from the `supervised` models does not lie below 0, and
    the mean of that difference is a loss of at most NDCG_LOSS of their NDCG@10.
    """
    results, results_before, ndcg_supervised = new.figures(), before.figures(), supervised.figures()["ndcg_10"]
    gain = bootstrap(new.rollouts.reward - before.rollouts.reward, resample(np.arange(len(new.rollouts.reward))))
    difference = compare(new.logged, supervised)["ndcg_10"]
    conditions = {
        "the reward of the simulated users did not improve significantly": gain.low > 0,
        "NDCG@10 fell significantly below the supervised models'": difference.high >= 0,
        f"NDCG@10 fell by more than {NDCG_LOSS:.0%}": difference.mean >= -NDCG_LOSS * ndcg_supervised,
    }
    shown = (
        f"reward per request {results['reward']:.4f} against {results_before['reward']:.4f}, {signed(gain)} over "
        f"{len(new.rollouts.reward)} users; NDCG@10 on validation {results['ndcg_10']:.4f} against "
        f"{ndcg_supervised:.4f} of the supervised models, {signed(difference)}"
    )
    failed = " and ".join(label for label, holds in conditions.items() if not holds)
    return PolicyOutcome(
        not failed,
        f"keeping the policy in use: {failed}: {shown}" if failed else f"the new policy is used: {shown}",
        {"policy": results, "before": results_before, "supervised": {"ndcg_10": ndcg_supervised}},
        {"reward": dataclasses.asdict(gain), "ndcg_10": dataclasses.asdict(difference)},
    )
