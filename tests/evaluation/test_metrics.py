"""Ranks and metrics against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrec.evaluation.metrics import MISS, coverage, hit_rate, ndcg, rank_of_target, reciprocal_rank
from jaxrec.training.losses import next_item_loss

# Column 0 is padding. Item:   1    2    3    4    5
SCORES = jnp.array([[9.0, 0.5, 0.9, 0.1, 0.7, 0.7], [9.0, 0.5, 0.9, 0.1, 0.7, 0.7]])


def test_rank_by_hand() -> None:
    nothing = jnp.zeros((2, 1), jnp.int32)
    assert rank_of_target(SCORES, jnp.array([2, 3]), nothing).tolist() == [1, 5]


def test_ties_count_against_the_target() -> None:
    assert rank_of_target(SCORES, jnp.array([4, 5]), jnp.zeros((2, 1), jnp.int32)).tolist() == [3, 3]


def test_excluded_items_are_no_competitors() -> None:
    exclude = jnp.array([[2, 4, 0], [2, 0, 0]])
    assert rank_of_target(SCORES, jnp.array([5, 3]), exclude).tolist() == [1, 4]


def test_a_target_that_cannot_be_recommended_is_a_miss_for_every_k() -> None:
    """Excluded, unknown, or with a score that is not a number."""
    excluded = rank_of_target(SCORES, jnp.array([2, 2]), jnp.array([[2, 0], [2, 3]]))
    unknown = rank_of_target(SCORES, jnp.array([0, 0]), jnp.zeros((2, 1), jnp.int32))
    not_a_number = rank_of_target(jnp.full((1, 6), jnp.nan), jnp.array([1]), jnp.zeros((1, 1), jnp.int32))
    ranks = np.concatenate([excluded, unknown, not_a_number])
    assert ranks.tolist() == [MISS] * 5
    for figure in (hit_rate(ranks, 10**9), ndcg(ranks, 10**9), reciprocal_rank(ranks)):
        assert figure.tolist() == [0.0] * 5


def test_equal_scores_rank_last() -> None:
    assert rank_of_target(jnp.zeros((1, 6)), jnp.array([1]), jnp.zeros((1, 1), jnp.int32)).tolist() == [5]


def test_metrics_by_hand() -> None:
    ranks = np.array([1, 2, 10, 11])
    assert hit_rate(ranks, 10).tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(ndcg(ranks, 10), [1, 1 / math.log2(3), 1 / math.log2(11), 0])
    np.testing.assert_allclose(reciprocal_rank(ranks), [1, 1 / 2, 1 / 10, 1 / 11])
    assert coverage(np.array([[1, 2], [2, 3]]), item_count=6) == 3 / 6
    assert coverage(np.array([[1, 0], [0, 0]]), item_count=1) == 1.0  # 0: nothing was left to recommend


def test_loss_by_hand() -> None:
    item_vectors = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    bias = jnp.array([-1e30, 0.0, 0.5])
    query = jnp.array([[[1.0, 1.0], [3.0, 0.0]]])  # logits 1, 2.5 and 3, 0.5
    losses = [math.log(math.e + math.exp(2.5)) - 1, math.log(math.exp(3) + math.exp(0.5)) - 0.5]
    target = jnp.array([[1, 2]])
    both = next_item_loss(query, item_vectors, bias, target, jnp.array([[True, True]]))
    assert float(both) == pytest.approx(sum(losses) / 2, rel=1e-6)
    one = next_item_loss(query, item_vectors, bias, target, jnp.array([[False, True]]))
    assert float(one) == pytest.approx(losses[1], rel=1e-6)
    assert float(next_item_loss(query, item_vectors, bias, target, jnp.array([[False, False]]))) == 0.0


@pytest.mark.parametrize("positions", [1, 256, 300])
def test_chunked_loss_and_its_gradients_equal_the_plain_ones(positions: int) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    queries = 3 * jax.random.normal(keys[0], (positions, 8))
    item_vectors, bias = jax.random.normal(keys[1], (40, 8)), jax.random.normal(keys[2], (40,)).at[0].set(-1e30)
    target = jax.random.randint(keys[3], (positions,), 1, 40)
    where = jax.random.bernoulli(keys[4], 0.7, (positions,))

    def plain(queries: jax.Array, item_vectors: jax.Array, bias: jax.Array) -> jax.Array:
        logits = queries @ item_vectors.T + bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return 2.5 * jnp.sum(jnp.where(where, losses, 0.0)) / jnp.maximum(where.sum(), 1)

    def chunked(queries: jax.Array, item_vectors: jax.Array, bias: jax.Array) -> jax.Array:
        return 2.5 * next_item_loss(queries, item_vectors, bias, target, where)

    ours, theirs = (jax.value_and_grad(f, argnums=(0, 1, 2))(queries, item_vectors, bias) for f in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
