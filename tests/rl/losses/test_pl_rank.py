"""PL-Rank-2 against the expectation over all rankings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.masks import NEVER
from jaxrec.rl.losses.pl_rank import pl_rank_gradient, pl_rank_loss

DISCOUNTS = jnp.array([1.0, 0.5])


def expected_reward(scores: jax.Array, rewards: jax.Array, items: list[int]) -> jax.Array:
    """The sum over all rankings of two of `items`, each with its probability."""
    total = jnp.zeros(())
    for first, second in itertools.permutations(items, 2):
        all_of = jax.nn.logsumexp(scores[jnp.array(items)])
        rest = jax.nn.logsumexp(scores[jnp.array([item for item in items if item != first])])
        probability = jnp.exp(scores[first] - all_of + scores[second] - rest)
        total += probability * (DISCOUNTS[0] * rewards[first] + DISCOUNTS[1] * rewards[second])
    return total


@pytest.mark.parametrize("items", [[0, 1, 2, 3], [0, 2, 3]])
def test_the_mean_of_many_samples_is_the_gradient_of_the_expected_reward(items: list[int]) -> None:
    scores, rewards = jnp.array([0.3, -1.0, 1.2, 0.0]), jnp.array([1.0, 0.2, 0.1, 0.7])
    exact = jax.grad(expected_reward)(scores, rewards, items)
    where = jnp.isin(jnp.arange(4), jnp.array(items))
    rows = 20_000
    sampled = pl_rank_gradient(
        jax.random.key(0), jnp.tile(jnp.where(where, scores, NEVER), (rows, 1)), jnp.tile(rewards, (rows, 1)), DISCOUNTS
    )
    error = np.asarray(sampled.std(axis=0)) / np.sqrt(rows)
    np.testing.assert_array_less(np.abs(np.asarray(sampled.mean(axis=0)) - exact), 4 * error + 1e-6)
    assert np.all(np.asarray(sampled)[:, ~np.asarray(where)] == 0)


def test_the_loss_has_that_gradient_per_row_and_none_for_items_that_cannot_be_placed() -> None:
    scores, rewards = jnp.array([[0.3, -1.0, 1.2, 0.0]] * 2), jnp.array([[1.0, 0.2, 0.1, 0.7]] * 2)
    where = jnp.array([[True, True, True, True], [True, False, True, True]])
    found = jax.grad(pl_rank_loss, argnums=1)(jax.random.key(0), scores, rewards, where, DISCOUNTS, 20_000)
    for row, items in enumerate(([0, 1, 2, 3], [0, 2, 3])):
        exact = -jax.grad(expected_reward)(scores[row], rewards[row], items) / 2
        np.testing.assert_allclose(found[row], exact, atol=0.005)
    assert found[1, 1] == 0


def test_fewer_items_than_places() -> None:
    one = pl_rank_gradient(jax.random.key(0), jnp.zeros((1, 1)), jnp.ones((1, 1)), DISCOUNTS)
    np.testing.assert_allclose(one, [[0.0]], atol=1e-6)  # the only ranking has probability 1
