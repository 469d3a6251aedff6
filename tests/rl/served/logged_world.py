"""Two states, five items and slates of two: a served log small enough that every value is a sum over all of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import NEVER
from jaxrec.rl.config import RewardWeights, ServedConfig
from jaxrec.rl.rewards import RewardTables, RewardTerms, rank_discounts
from jaxrec.rl.scoring import Scoring, new_head
from jaxrec.rl.served.policy import logged_logprobs
from jaxrec.rl.served.states import ServedStates
from jaxrec.rl.states import PolicyState
from tests.rl.enumeration import all_slates

ITEMS, SLOTS, TEMPERATURE = 5, 2, 0.7
LOGITS = np.array([[0.0, 1.0, 0.5, 0.0, -0.5, -1.0], [0.0, -0.5, 0.0, 0.5, 0.5, 0.2]])  # [state, item], padding first
TAKEN = np.array([[0.0, 0.1, 0.2, 0.3, 0.9, 0.6], [0.0, 0.7, 0.1, 0.2, 0.3, 0.8]])  # probability of a hit
RATING = np.array([0.5, 0.9, 0.1, 0.4, 0.6, 0.3])
NOVELTY = np.array([0.0, 0.1, 0.3, 0.5, 0.2, 0.8])
CONFIG = ServedConfig(minimum_effective=5.0, rewards=RewardWeights(hit=1.0, genre=0.0, rating=0.0))


class World(NamedTuple):
    """`current` and `new`: variables of PolicyHead; the new one prefers what is taken."""

    graphdef: nnx.GraphDef[PolicyHead]
    current: Any
    new: Any
    scoring: Scoring


def new_world() -> World:
    """The query of a state is its unit vector, so that an item's vector holds its logits in both."""
    nobody, half = jnp.zeros((ITEMS + 1, 1)), jnp.full(ITEMS + 1, 0.5)
    tables = RewardTables(nobody, jnp.asarray(RATING, jnp.float32), half, jnp.asarray(NOVELTY, jnp.float32))
    vectors, bias = jnp.asarray(LOGITS.T, jnp.float32), jnp.zeros(ITEMS + 1).at[0].set(NEVER)
    graphdef, current = new_head(2, ITEMS, hidden=2, seed=0)
    new = {**current, "item_bias": jnp.asarray(TAKEN.mean(axis=0), jnp.float32)}
    return World(graphdef, current, new, Scoring(vectors, bias, nobody.astype(jnp.int32), nobody, tables))


def shown(world: World, state: np.ndarray, slate: np.ndarray, reward: np.ndarray) -> ServedStates:
    """What the current policy showed in state [rows] int, slate [rows, k] int with reward [rows, k] of each slot; each
    row by a user of its own."""
    rows = len(state)
    terms = RewardTerms(*(np.zeros(slate.shape, np.float32) for _ in RewardTerms._fields))
    states = ServedStates(
        state=PolicyState(np.eye(2, dtype=np.float32)[state], np.zeros((rows, RECENT_ITEMS), np.int32)),
        exclude=np.zeros((rows, 1), np.int32),
        slate=slate.astype(np.int32),
        log_propensities=np.zeros(slate.shape, np.float32),
        temperature=np.full(rows, TEMPERATURE, np.float32),
        answered=np.full(rows, slate.shape[1], np.int32),
        terms=terms._replace(hit=reward.astype(np.float32)),
        user=np.arange(rows, dtype=np.int32),
        version=np.zeros(rows, np.int32),
        moment=np.zeros(rows, np.int32),
    )
    propensities = logged_logprobs(world.graphdef, world.current, world.scoring, states)
    return states._replace(log_propensities=propensities.astype(np.float32))


def every_slate(world: World) -> tuple[ServedStates, np.ndarray]:
    """Each state and slate once, with its expected reward, and the probability of each [rows] under the current
    policy; the states are as likely."""
    slates = np.asarray(all_slates(ITEMS, SLOTS))
    state, slate = np.repeat([0, 1], len(slates)), np.tile(slates, (2, 1))
    states = shown(world, state, slate, TAKEN[state[:, None], slate])
    return states, 0.5 * np.exp(states.log_propensities.sum(axis=1, dtype=np.float64))


def value(world: World, policy: Any) -> float:
    """What a policy earns: the sum over all states and slates."""
    states, _ = every_slate(world)
    logprobs = logged_logprobs(world.graphdef, policy, world.scoring, states)
    return float(0.5 * np.exp(logprobs.sum(axis=1)) @ (np.asarray(states.terms.hit) @ rank_discounts(SLOTS)))


def draw(world: World, rows: int, seed: int) -> ServedStates:
    """A log of the current policy, with hits that are 0 or 1."""
    rng, (every, probability) = np.random.default_rng(seed), every_slate(world)
    log = every.at(rng.choice(len(probability), rows, p=probability / probability.sum()))
    hit = (rng.random((rows, SLOTS)) < log.terms.hit).astype(np.float32)
    return log._replace(terms=log.terms._replace(hit=hit), user=np.arange(rows, dtype=np.int32))


def concatenated(*logs: ServedStates) -> ServedStates:
    return jax.tree.map(lambda *columns: np.concatenate(columns), *logs)
