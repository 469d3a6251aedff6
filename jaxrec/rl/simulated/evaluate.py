"""Judges a policy in a simulator that did not train it, beside the policy it started from, and decides which is used.

NDCG@10 on validation is compared with the supervised models': were it compared with the policy it started from, each of
many runs that are let pass could lose a little more of it.

Every simulated user asks REQUESTS times in a visit, and pays VISITS visits, each from the events that it came with. The
same random numbers decide for both policies. Slates are the best items, as a server without `--explore` shows them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.rl.logged.evaluate import Decision, Judged, compare, signed
from jaxrec.rl.logged.learner import slate_coverage
from jaxrec.rl.policy import greedy_slates, sample_slates
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.policy import RecommenderParams, RecommenderPolicy
from jaxrec.rl.simulated.recommender import RecommenderObservation, RecommenderState

REQUESTS, VISITS = 10, 5
NDCG_LOSS = 0.01  # of the supervised models' NDCG@10: what a policy that is used may lose of it on average


class Played(NamedTuple):
    """Means over requests and visits by user, [users] float64: `reward`, `taken` (0 or 1) and `rating` (0..1, 0 where
    nothing was taken). `coverage`: the share of the catalogue that a visit of all users was shown, on average."""

    reward: np.ndarray
    taken: np.ndarray
    rating: np.ndarray
    coverage: float


class Measured(NamedTuple):
    """A policy in the judging simulator, and on the logged cases of validation."""

    played: Played
    logged: Judged

    def figures(self) -> dict[str, float]:
        """Means, by name. The reward is that of the simulated users."""
        means = {name: float(np.mean(column)) for name, column in self.played._asdict().items()}
        return {**means, "ndcg_10": self.logged.figures()["ndcg_10"]}


Play = Callable[[RecommenderParams], Played]


def make_play(
    environment: Environment,
    first: tuple[RecommenderState, RecommenderObservation],
    policy: RecommenderPolicy,
    seed: int,
    drawn: bool = False,
) -> Play:
    """play(parameters of the policy) -> what all users [users, ...], who start at `first`, made of it. With `drawn` the
    slates are drawn from the policy instead of its best items. Nobody leaves early."""
    users = len(first[1].recurrent)

    @jax.jit
    def visit(params: RecommenderParams, key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
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

        _, (earned, slates) = jax.lax.scan(request, first, jax.random.split(key, REQUESTS))
        shown = slate_coverage(slates, environment.item_count + 1)
        return {name: column.mean(axis=0) for name, column in earned.items()}, shown

    def play(params: RecommenderParams) -> Played:
        keys = jax.random.split(jax.random.key(seed), VISITS)
        visits = [jax.device_get(visit(params, key)) for key in keys]

        def mean(name: str) -> np.ndarray:
            return np.stack([earned[name] for earned, _ in visits]).mean(axis=0, dtype=np.float64)

        coverage = float(np.mean([shown for _, shown in visits]))
        return Played(mean("reward"), mean("taken"), mean("rating"), coverage)

    return play


def decide(new: Measured, before: Measured, supervised: Judged) -> Decision:
    """Whether the new policy is used instead of the one it started from, `before`.

    It is used if and only if the 95 % interval of its paired gain in mean reward per request, over the users, lies
    above 0, the interval of its paired difference in NDCG@10 from the `supervised` models does not lie below 0, and
    the mean of that is not more than NDCG_LOSS of their NDCG@10 lower.
    """
    figures, figures_before, ndcg_supervised = new.figures(), before.figures(), supervised.figures()["ndcg_10"]
    gain = bootstrap(new.played.reward - before.played.reward, resample(np.arange(len(new.played.reward))))
    difference = compare(new.logged, supervised)["ndcg_10"]
    held = {
        "a higher reward of the simulated users": gain.low > 0,
        "an NDCG@10 that is not lower than the supervised models'": difference.high >= 0,
        f"one that is at most {NDCG_LOSS:.0%} lower": difference.mean >= -NDCG_LOSS * ndcg_supervised,
    }
    told = (
        f"reward per request {figures['reward']:.4f} against {figures_before['reward']:.4f}, {signed(gain)} over "
        f"{len(new.played.reward)} judging users; NDCG@10 on validation {figures['ndcg_10']:.4f} against "
        f"{ndcg_supervised:.4f} of the supervised models, {signed(difference)}"
    )
    differences = {"reward": gain, "ndcg_10": difference}
    if all(held.values()):
        return Decision(True, f"the new policy is used: {told}", differences)
    failed = " and ".join(label for label, kept in held.items() if not kept)
    return Decision(False, f"the policy that was in use stays: not shown is {failed}: {told}", differences)
