"""Actor-critic losses by hand, and which of their parts the gradients reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.masks import NEVER
from jaxrec.rl.losses.actor_critic import (
    advantage,
    double_q_target,
    negative_q_losses,
    q_losses,
    sa2c_loss,
    snqn_loss,
    supervised_losses,
)

# Two states over three items. Probabilities of items 1 to 3 in the first: 1/2, 1/3, 1/6; the second does not count.
LOGITS = jnp.array([[NEVER, np.log(3), np.log(2), 0.0], [NEVER, 9.0, 0.0, 0.0]])
Q = jnp.array([[0.0, 2.0, 1.0, -1.0], [0.0, 7.0, 8.0, 9.0]])
ACTION = jnp.array([1, 2], jnp.int32)
NEGATIVES = jnp.array([[2, 3], [1, 3]], jnp.int32)
TARGET, NEGATIVE_TARGET = jnp.array([2.5, 100.0]), jnp.array([0.5, 100.0])
WHERE = jnp.array([True, False])
SUPERVISED, CRITIC = np.log(2), 0.5**2
NEGATIVE = (0.5 - 1.0) ** 2 + (0.5 + 1.0) ** 2
ADVANTAGE = 2.0 - (2.0 + 1.0 - 1.0) / 3


def test_parts_by_hand() -> None:
    assert float(supervised_losses(LOGITS, ACTION)[0]) == pytest.approx(SUPERVISED)
    assert float(q_losses(Q, ACTION, TARGET)[0]) == pytest.approx(CRITIC)
    assert float(negative_q_losses(Q, NEGATIVES, NEGATIVE_TARGET)[0]) == pytest.approx(NEGATIVE)
    assert float(advantage(Q, ACTION, NEGATIVES)[0]) == pytest.approx(ADVANTAGE)


def test_double_q_target_by_hand() -> None:
    """The online copy chooses the item, the other one says what it is worth; item 3 may not be chosen in the first
    state, nothing in the third."""
    q_next = jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    q_target = jnp.array([[0.0, 9.0, 5.0, 7.0], [0.0, 9.0, 5.0, 7.0], [0.0, 9.0, 5.0, 7.0]])
    allowed = jnp.array([[False, True, True, False], [False, True, True, True], [False] * 4])
    targets = double_q_target(jnp.array([1.0, 1.0, 1.0]), jnp.array([0.5, 0.0, 0.5]), q_next, q_target, allowed)
    np.testing.assert_allclose(targets, [1 + 0.5 * 5, 1.0, 1.0])


def test_losses_by_hand() -> None:
    critics = CRITIC + NEGATIVE
    arguments = (LOGITS, Q, ACTION, NEGATIVES, TARGET, NEGATIVE_TARGET)
    assert float(snqn_loss(*arguments, WHERE)) == pytest.approx(SUPERVISED + critics)
    weight = jnp.array([0.5, 1.0])
    assert float(sa2c_loss(*arguments, weight, WHERE)) == pytest.approx(0.5 * ADVANTAGE * SUPERVISED + critics)


def test_actor_weight_is_a_constant_and_the_critic_does_not_touch_the_logits() -> None:
    """Per state: the gradient of the logits is the weight times (p - one hot), that of Q is the critic's alone."""
    residual = np.array([[0, 1 / 2 - 1, 1 / 3, 1 / 6]])
    of_q = np.array([[0, -2 * 0.5, 0, 0]])
    both = (0, 1)
    arguments = (LOGITS, Q, ACTION, NEGATIVES, TARGET, NEGATIVE_TARGET)
    logits, q = jax.grad(sa2c_loss, both)(*arguments, jnp.ones(2), WHERE)
    np.testing.assert_allclose(logits[:1], ADVANTAGE * residual, atol=1e-6)
    np.testing.assert_allclose(q[:1], of_q + np.array([[0, 0, 2 * (1.0 - 0.5), 2 * (-1.0 - 0.5)]]), atol=1e-6)
    assert not np.asarray(logits[1]).any()
    assert not np.asarray(q[1]).any()


def test_targets_and_weights_are_constants() -> None:
    """The targets would otherwise learn to fit the values, and the weight to shrink the actor's loss."""
    reward, discount = jnp.ones(2), jnp.full(2, 0.5)

    def target(reward: jax.Array, discount: jax.Array, q_next: jax.Array, q_next_target: jax.Array) -> jax.Array:
        return jnp.sum(double_q_target(reward, discount, q_next, q_next_target, jnp.ones(Q.shape, bool)))

    def losses(target: jax.Array, negative_target: jax.Array) -> jax.Array:
        return jnp.sum(q_losses(Q, ACTION, target) + negative_q_losses(Q, NEGATIVES, negative_target))

    def actor(weight: jax.Array, target: jax.Array, negative_target: jax.Array) -> jax.Array:
        return sa2c_loss(LOGITS, Q, ACTION, NEGATIVES, target, negative_target, weight, jnp.ones(2, bool))

    def of_advantage(q: jax.Array) -> jax.Array:
        return jnp.sum(advantage(q, ACTION, NEGATIVES))

    for loss, inputs in (
        (target, (reward, discount, Q, Q + 1)),
        (losses, (TARGET, NEGATIVE_TARGET)),
        (actor, (jnp.ones(2), TARGET, NEGATIVE_TARGET)),
        (of_advantage, (Q,)),
    ):
        for gradient in jax.grad(loss, tuple(range(len(inputs))))(*inputs):
            np.testing.assert_array_equal(gradient, 0.0)


def test_entries_that_do_not_count_may_hold_anything() -> None:
    """NaN in every input of the second state: values and gradients are those of the first alone."""
    bad = jnp.array([1.0, jnp.nan])
    logits, q = LOGITS * bad[:, None], Q * bad[:, None]
    both = (0, 1)
    for loss, inputs in (
        (snqn_loss, (ACTION, NEGATIVES, TARGET * bad, NEGATIVE_TARGET * bad)),
        (sa2c_loss, (ACTION, NEGATIVES, TARGET * bad, NEGATIVE_TARGET * bad, bad)),
    ):
        value, gradients = jax.value_and_grad(loss, both)(logits, q, *inputs, WHERE)
        clean = [jnp.nan_to_num(x) for x in inputs]
        expected, expected_gradients = jax.value_and_grad(loss, both)(LOGITS, Q, *clean, WHERE)
        assert float(value) == pytest.approx(float(expected))
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            assert np.isfinite(gradient).all()
            np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_without_negatives_to_tell_apart_the_advantage_is_zero() -> None:
    np.testing.assert_allclose(advantage(jnp.full((2, 4), 3.0), ACTION, NEGATIVES), 0.0, atol=1e-6)


def test_q_learning_finds_the_exact_values() -> None:
    """A chain of two states without noise: item 1 stays and pays 1, item 2 moves on and pays 0; in the second state
    item 1 pays 3 and ends. With γ = 0.5: Q(2, 1) = 3, Q(2, 2) = 0.5 * 3, Q(1, 2) = 0.5 * 3, Q(1, 1) = 1 + 0.5 * 2."""
    state = jnp.array([0, 0, 1, 1])
    action = jnp.array([1, 2, 1, 2], jnp.int32)
    reward = jnp.array([1.0, 0.0, 3.0, 0.0])
    following, discount = jnp.array([0, 1, 0, 1]), jnp.array([0.5, 0.5, 0.0, 0.5])
    allowed = jnp.broadcast_to(jnp.array([False, True, True]), (4, 3))

    def loss(table: jax.Array) -> jax.Array:
        target = double_q_target(reward, discount, table[following], table[following], allowed)
        return jnp.sum(q_losses(table[state], action, target))

    table = jnp.zeros((2, 3))
    step = jax.jit(lambda table: table - 0.25 * jax.grad(loss)(table))
    for _ in range(100):
        table = step(table)
    np.testing.assert_allclose(table[:, 1:], [[2.0, 1.5], [3.0, 1.5]], atol=1e-4)
