"""The softmax losses: what they keep, and the sampled one against the full one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.evaluation.metrics import hit_rate
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import sequence_scorer
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.loop import train_model
from jaxrec.training.losses import next_item_loss, sampled_softmax_loss
from jaxrec.training.step import FULL_SOFTMAX_ITEMS, SAMPLED_ITEMS, softmax_sample
from tests.synthetic import markov_log

ITEMS, POSITIONS = 41, 300
Case = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@pytest.fixture(scope="module")
def case() -> Case:
    """queries, item vectors, item bias, target, where."""
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (POSITIONS, 8)),
        jax.random.normal(keys[1], (ITEMS + 1, 8)),
        jax.random.normal(keys[2], (ITEMS + 1,)).at[0].set(-1e30),
        jax.random.randint(keys[3], (POSITIONS,), 1, ITEMS + 1),
        jax.random.bernoulli(keys[4], 0.7, (POSITIONS,)),
    )


def test_no_array_of_all_logits_is_kept() -> None:
    positions, items, width = 4096, 20_000, 8
    shapes = [((positions, width), jnp.float32), ((items, width), jnp.float32), ((items,), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    target, where = jnp.ones(positions, jnp.int32), jnp.ones(positions, bool)
    gradient = jax.jit(jax.grad(lambda *x: next_item_loss(*x, target, where), argnums=(0, 1, 2)))
    memory = gradient.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < positions * items * 4 / 4


def test_with_all_items_sampled_it_is_the_full_softmax(case: Case) -> None:
    full = jax.value_and_grad(next_item_loss, argnums=(0, 1, 2))(*case)
    sampled = jax.value_and_grad(sampled_softmax_loss, argnums=(0, 1, 2))(*case, ITEMS, jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sampled, full)


def test_the_estimated_normalizer_and_its_gradient_are_right_on_average(case: Case) -> None:
    queries, vectors, bias, target, _ = case
    one = jnp.arange(POSITIONS) == 3  # the loss of a single position

    def full(vectors: jax.Array) -> jax.Array:
        return jnp.exp(next_item_loss(queries, vectors, bias, target, one))  # normalizer / exp(target's logit)

    def estimate(vectors: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.exp(sampled_softmax_loss(queries, vectors, bias, target, one, 6, key))

    draw = jax.jit(lambda keys: jax.lax.map(lambda key: jax.value_and_grad(estimate)(vectors, key), keys))
    estimates = draw(jax.random.split(jax.random.key(2), 4000))
    for drawn, exact in zip(estimates, jax.value_and_grad(full)(vectors), strict=True):
        error = drawn.std(axis=0) / np.sqrt(len(drawn))
        np.testing.assert_array_less(np.abs(drawn.mean(axis=0) - exact), 5 * error + 1e-5)
    assert 0 < estimates[0].std() < 3 * estimates[0].mean()  # it is an estimate, and no wild one


def test_valid_positions_alone_count(case: Case) -> None:
    queries, vectors, bias, target, where = case
    key = jax.random.key(4)
    loss = sampled_softmax_loss(queries, vectors, bias, target, where, 9, key)
    changed = jnp.where(where, target, 1), jnp.where(where[:, None], queries, 7.0)
    assert float(sampled_softmax_loss(changed[1], vectors, bias, changed[0], where, 9, key)) == float(loss)
    assert float(sampled_softmax_loss(queries, vectors, bias, target, jnp.zeros_like(where), 9, key)) == 0.0


@pytest.mark.parametrize("sampled_items", [0, ITEMS + 1])
def test_a_sample_that_cannot_be_drawn_is_named(case: Case, sampled_items: int) -> None:
    with pytest.raises(ValueError, match=f"sampled_items {sampled_items} is outside 1..{ITEMS}"):
        sampled_softmax_loss(*case, sampled_items, jax.random.key(0))


@pytest.mark.parametrize(
    ("items", "asked", "used"),
    [
        (FULL_SOFTMAX_ITEMS, None, 0),
        (FULL_SOFTMAX_ITEMS + 1, None, SAMPLED_ITEMS),
        (1_000_000, 0, 0),
        (1000, 100, 100),
        (1000, 1000, 0),
    ],
)
def test_when_the_softmax_is_sampled(items: int, asked: int | None, used: int) -> None:
    assert softmax_sample(items, asked) == used


def test_a_markov_log_is_learned_from_samples(tmp_path: Path) -> None:
    data = prepare(markov_log(users=250, items=40, events=12, stay=0.9, seed=0), None, PrepareConfig(1, 1))
    config = ModelConfig(embedding=16, hidden=32, max_length=16, input_dropout=0.0, output_dropout=0.1)
    training = TrainConfig(max_epochs=12, patience=12, batch_tokens=256, learning_rate=1e-2, sampled_items=8)
    model = train_model(TimeRatingAwareLSTM(40, config, rngs=nnx.Rngs(0)), data, training, tmp_path, "test").model
    ranks = rank_cases(sequence_scorer(model), data, data.split.test, 16, request_time=False).ranks
    assert hit_rate(ranks, 3).mean() > 0.75  # at best 0.9 and a little


@pytest.mark.parametrize("positions", [7, 300])
def test_excluded_items_are_no_candidates(positions: int) -> None:
    """Equal to the softmax over the other items, in value and gradients; the excluded ones get none."""
    rng = np.random.default_rng(positions)
    queries, vectors, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((positions, 4), (9, 4), (9,)))
    target = rng.integers(1, 9, positions).astype(np.int32)
    where = rng.random(positions) < 0.8
    exclude = rng.integers(0, 9, (positions, 3)).astype(np.int32)
    exclude = np.where(exclude == target[:, None], 0, exclude)

    def plain(queries: jax.Array, vectors: jax.Array, bias: jax.Array) -> jax.Array:
        logits = (queries @ vectors.T + bias).at[np.arange(positions)[:, None], exclude].set(-jnp.inf)
        losses = -jax.nn.log_softmax(logits)[np.arange(positions), target]
        return jnp.sum(jnp.where(where, losses, 0.0)) / where.sum()

    expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(queries, vectors, bias)
    found = jax.value_and_grad(next_item_loss, argnums=(0, 1, 2))(queries, vectors, bias, target, where, exclude)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
