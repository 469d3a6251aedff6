"""A server's log moves the reranker's weights: the gradient by hand, and what a log with and without structure does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import NEVER
from jaxrec.models.reranker import CONTEXT, FEATURES, Reranked
from jaxrec.rl.config import RewardWeights, ServedConfig
from jaxrec.rl.outcome import TrainedPolicy
from jaxrec.rl.policy import sample_slates
from jaxrec.rl.rewards import RewardTables, RewardTerms
from jaxrec.rl.scoring import Scoring, new_head
from jaxrec.rl.served.policy import logged_logprobs, slot_logprobs, state_logits, state_served_logits
from jaxrec.rl.served.states import ServedStates
from jaxrec.rl.served.train import train_served
from jaxrec.rl.states import PolicyState

TEMPERATURE = 0.5
FEATURE, OF_CONTEXT = FEATURES.index("genre_last"), CONTEXT.index("log_gap")
CONFIG = ServedConfig(
    updates=100,
    batch_size=128,
    learning_rate=3e-2,
    kl_target=0.3,
    rewards=RewardWeights(hit=1.0, genre=0.0, rating=0.0),
    minimum_effective=20.0,
)


Vary = Callable[[Reranked], Reranked]


class World(NamedTuple):
    """`head`: variables of PolicyHead that change nothing."""

    graphdef: nnx.GraphDef[PolicyHead]
    head: Any
    scoring: Scoring


def new_world(items: int) -> World:
    """A mix that scores all items alike, so that the logits are what the reranker makes of them."""
    nobody, half = jnp.zeros((items + 1, 1)), jnp.full(items + 1, 0.5)
    tables = RewardTables(nobody, half, half, half)
    bias = jnp.zeros(items + 1).at[0].set(NEVER)
    scoring = Scoring(jnp.zeros((items + 1, 2)), bias, nobody.astype(jnp.int32), nobody, tables)
    return World(*new_head(2, items, hidden=2, seed=0, reranks=True), scoring)


def shown(features: np.ndarray, context: np.ndarray, scores: np.ndarray, slots: int) -> ServedStates:
    """Requests with these candidates [rows, items, ...], which are all items; nothing was shown yet."""
    rows, items = scores.shape
    every = np.tile(np.arange(1, items + 1, dtype=np.int32), (rows, 1))
    mix = np.zeros((rows, items), np.float32)
    half, single = features.astype(np.float16), context.astype(np.float32)
    nothing = np.zeros((rows, slots), np.float32)
    return ServedStates(
        state=PolicyState(
            np.zeros((rows, 2), np.float32),
            np.zeros((rows, RECENT_ITEMS), np.int32),
            Reranked(every, mix, scores.astype(np.float32), half, single),
        ),
        exclude=np.zeros((rows, 1), np.int32),
        slate=nothing.astype(np.int32),
        log_propensities=nothing,
        temperature=np.full(rows, TEMPERATURE, np.float32),
        answered=np.full(rows, slots, np.int32),
        terms=RewardTerms(*[nothing] * len(RewardTerms._fields)),
        user=np.arange(rows, dtype=np.int32),
        version=np.zeros(rows, np.int32),
        moment=np.zeros(rows, np.int32),
    )


def test_the_gradient_of_a_slate_is_that_of_finite_differences_and_of_the_formula() -> None:
    """Item 3, then item 1, of three items with the scores 0, 1 and 2. Of item 3, p_3 = e^4 / (e^0 + e^2 + e^4) at the
    temperature of 1/2, so that d log p_3 / dw = 2 (x_3 - sum_j p_j x_j); item 1 is left with item 2."""
    rng = np.random.default_rng(0)
    features, context = rng.normal(size=(1, 3, len(FEATURES))), rng.normal(size=(1, len(CONTEXT)))
    world = new_world(items=3)
    states = shown(features, context, np.array([[0.0, 1.0, 2.0]]), slots=2)._replace(slate=np.array([[3, 1]], np.int32))

    def log_weight(head: Any) -> jax.Array:
        return jnp.sum(slot_logprobs(state_logits(world.graphdef, head, world.scoring, states), states))

    x = features[0].astype(np.float16).astype(np.float64)
    odds = np.exp(np.array([0.0, 2.0, 4.0]))
    of_three, of_two = odds / odds.sum(), odds[:2] / odds[:2].sum()
    by_hand = (x[2] - of_three @ x + x[0] - of_two @ x[:2]) / TEMPERATURE
    found = jax.grad(log_weight)(world.head)
    np.testing.assert_allclose(found["direct"], by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["by_context"], np.outer(context[0], by_hand), rtol=1e-4, atol=1e-5)
    step = 1e-2
    for name, place in (("direct", (FEATURE,)), ("by_context", (OF_CONTEXT, FEATURE))):
        moved = ({**world.head, name: world.head[name].at[place].add(by)} for by in (step, -step))
        up, down = (float(log_weight(head)) for head in moved)
        assert (up - down) / (2 * step) == pytest.approx(float(found[name][place]), rel=1e-2)


def drawn_log(world: World, strength: float, users: int = 800, items: int = 20, slots: int = 3) -> ServedStates:
    """Slates of the policy that changes nothing: a request's OF_CONTEXT says whether the user likes items with a large
    FEATURE or a small one, by `strength`; other features and contexts say nothing."""
    rng = np.random.default_rng(1)
    features, context = rng.normal(size=(users, items, len(FEATURES))), rng.normal(size=(users, len(CONTEXT)))
    states = shown(features, context, 0.3 * rng.normal(size=(users, items)), slots)
    logits = state_served_logits(state_logits(world.graphdef, world.head, world.scoring, states), states)
    states = states._replace(slate=np.asarray(sample_slates(jax.random.key(0), logits, slots)))
    propensities = logged_logprobs(world.graphdef, world.head, world.scoring, states).astype(np.float32)
    of_shown = np.take_along_axis(features[:, :, FEATURE], states.slate - 1, axis=1)
    chance = 1 / (1 + np.exp(1.5 - strength * context[:, [OF_CONTEXT]] * of_shown))
    hit = (rng.random(chance.shape) < chance).astype(np.float32)
    return states._replace(log_propensities=propensities, terms=states.terms._replace(hit=hit))


def trained(strength: float, vary: Vary = lambda reranked: reranked) -> TrainedPolicy:
    """From one half of the users, evaluated on the other."""
    world = new_world(items=20)
    log = drawn_log(world, strength)
    assert log.state.reranked is not None
    log = log._replace(state=log.state._replace(reranked=vary(log.state.reranked)))
    rows = np.arange(len(log.user))
    halves = rows[::2], rows[1::2]
    return train_served(world.graphdef, world.head, world.scoring, log, halves, CONFIG)[0]


def test_a_weight_that_the_reward_depends_on_moves_and_the_policy_is_used() -> None:
    found = trained(strength=2.0)
    assert found.outcome.used, found.outcome.reason
    assert not found.head["item_bias"].any()  # the network is not trained beside it
    assert not found.head["outer"]["kernel"].any()
    by_context = found.head["by_context"]
    place = np.unravel_index(np.argmax(np.abs(by_context)), by_context.shape)
    assert place == (OF_CONTEXT, FEATURE)
    others = np.delete(by_context.ravel(), np.ravel_multi_index(place, by_context.shape))
    assert by_context[place] > 2 * np.abs(others).max()


def test_a_log_without_structure_is_refused() -> None:
    found = trained(strength=0.0)
    assert not found.outcome.used
    assert np.abs(found.head["by_context"]).max() > 0


def test_weights_of_what_the_log_barely_varies_stay() -> None:
    """A hundredth of the deviation that each has where the reranker was learned: a feature, and a context."""
    still, calm = FEATURES.index("trend"), CONTEXT.index("timed")

    def vary(reranked: Reranked) -> Reranked:
        features, context = np.array(reranked.features), np.array(reranked.context)
        features[..., still] *= 0.01
        context[:, calm] = 3 + 0.01 * context[:, calm]  # far from the mean, but always there
        return reranked._replace(features=features, context=context)

    head = trained(2.0, vary).head
    assert head["direct"][still] == 0
    assert not head["by_context"][:, still].any()
    assert not head["by_context"][calm].any()
    assert np.delete(head["direct"], still).all()
    assert np.delete(np.delete(head["by_context"], calm, axis=0), still, axis=1).all()
