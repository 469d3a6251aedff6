"""The clipped surrogate: by hand, and its gradient against the policy gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.rl.losses.clipped_surrogate import clipped_surrogate_loss

LOGITS = jnp.array([0.5, -0.3, 0.0, 1.0])
REWARDS = jnp.array([0.4, 0.9, 0.3, 0.5])
BETA = jnp.array([0.1, 0.2, 0.3, 0.4])


def test_by_hand() -> None:
    """Two rows of two slots, cap 2: 1.5 * 1, 2 * 1 (of 3), 2 * -1 (of 3) and 1/2 * -2 (of 1/4): all end at the cap, and
    what is bad at its inverse, too."""
    ratios = jnp.array([[1.5, 3.0], [3.0, 0.25]])
    advantages = jnp.array([[1.0, 1.0], [-1.0, -2.0]])
    loss = clipped_surrogate_loss(jnp.log(ratios), advantages, jnp.ones((2, 2), bool), cap=2.0)
    np.testing.assert_allclose(loss, -((1.5 + 2.0) + (-2.0 - 1.0)) / 2, rtol=1e-6)


def test_gradient_ends_at_the_bounds() -> None:
    """d/d(log w) is w A inside the bounds, and 0 beyond them, but for what is good and has become rare."""
    ratios = jnp.array([[1.5, 3.0, 1.5, 3.0, 0.25, 0.25]])
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0, -1.0, 1.0]])
    gradient = jax.grad(clipped_surrogate_loss)(jnp.log(ratios), advantages, jnp.ones((1, 6), bool), 2.0)
    np.testing.assert_allclose(-gradient, [[1.5, 0.0, -1.5, 0.0, 0.0, 0.25]], rtol=1e-6)


def test_without_a_bound_in_reach_it_is_the_policy_gradient() -> None:
    """Every item is logged once and counts β: the gradient is that of sum_a π(a) r(a), whatever the baseline."""

    def surrogate(logits: jax.Array, baseline: float) -> jax.Array:
        ratios = jax.nn.log_softmax(logits) - jnp.log(BETA)
        losses = jax.vmap(
            lambda r, a: clipped_surrogate_loss(r[None, None], a[None, None], jnp.ones((1, 1), bool), 1e3)
        )
        return -BETA @ losses(ratios, REWARDS - baseline)

    def value(logits: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits) @ REWARDS

    for baseline in (0.0, 0.7):
        found = jax.grad(surrogate)(LOGITS, baseline)
        np.testing.assert_allclose(found, jax.grad(value)(LOGITS), rtol=1e-5, atol=1e-7)


def test_slots_that_do_not_count_and_extreme_ratios_leave_it_finite() -> None:
    ratios = jnp.array([[0.0, jnp.nan], [500.0, -500.0], [jnp.inf, 0.0], [500.0, -500.0]])
    advantages = jnp.array([[1.0, jnp.nan], [1.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])
    where = jnp.array([[True, False], [True, True], [False, False], [True, True]])
    loss, gradient = jax.value_and_grad(clipped_surrogate_loss)(ratios, advantages, where, 2.0)
    np.testing.assert_allclose(loss, -(1.0 + (2.0 + 0.0) + (-2.0 - 0.5)) / 3, atol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~np.asarray(where)], 0.0)


def test_a_cap_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="the cap is 1, expected above 1"):
        clipped_surrogate_loss(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1), bool), 1)
