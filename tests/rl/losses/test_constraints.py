"""Floors of entropy and of coverage by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.masks import NEVER
from jaxrec.rl.losses.constraints import coverage_floor_loss, entropy_floor_loss


def test_entropy_floor_by_hand() -> None:
    entropies = jnp.array([0.5, 2.0, 0.0])
    assert float(entropy_floor_loss(entropies, 1.0, jnp.ones(3, bool))) == pytest.approx((0.5 + 0 + 1) / 3)
    assert float(entropy_floor_loss(entropies, 1.0, jnp.array([True, True, False]))) == pytest.approx((0.5 + 0) / 2)
    gradient = jax.grad(entropy_floor_loss)(entropies, 1.0, jnp.ones(3, bool))
    np.testing.assert_allclose(gradient, [-1 / 3, 0, -1 / 3])


def test_coverage_floor_by_hand() -> None:
    """Two states that are certain of different items cover two items, of the same one item; uniform over four, four."""
    certain = jnp.array([[NEVER, 50.0, 0, 0, 0], [NEVER, 0, 50.0, 0, 0], [NEVER, 50.0, 0, 0, 0]])
    for rows, items in (([True, True, False], 2), ([True, False, True], 1)):
        loss, effective = coverage_floor_loss(certain, 4.0, jnp.array(rows))
        assert float(effective) == pytest.approx(items, rel=1e-5)
        assert float(loss) == pytest.approx(np.log(4 / items), rel=1e-5)
    loss, effective = coverage_floor_loss(jnp.zeros((3, 5)).at[:, 0].set(NEVER), 3.0, jnp.ones(3, bool))
    assert float(effective) == pytest.approx(4)
    assert float(loss) == 0.0


def test_masked_states_may_hold_anything() -> None:
    where = jnp.array([True, False])
    gradient = jax.grad(entropy_floor_loss)(jnp.array([0.5, jnp.nan]), 1.0, where)
    np.testing.assert_array_equal(gradient, [-1.0, 0.0])
    logits = jnp.array([[NEVER, 3.0, 0.0], [jnp.nan] * 3])
    gradient = jax.grad(lambda x: coverage_floor_loss(x, 2.0, where)[0])(logits)
    assert np.isfinite(gradient).all()
    assert float(gradient[0, 1]) > 0


def test_coverage_floor_of_no_state_is_zero() -> None:
    nothing = jnp.zeros(2, bool)
    value, gradient = jax.value_and_grad(lambda x: coverage_floor_loss(x, 4.0, nothing)[0])(jnp.zeros((2, 5)))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0.0)
    assert float(coverage_floor_loss(jnp.zeros((2, 5)), 4.0, nothing)[1]) == 0.0


def test_coverage_floor_pushes_towards_the_items_left_out() -> None:
    logits, where = jnp.array([[NEVER, 3.0, 0.0], [NEVER, 3.0, 0.0]]), jnp.ones(2, bool)
    gradient = jax.grad(lambda x: coverage_floor_loss(x, 2.0, where)[0])(logits)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[:, 1] > 0).all()
    assert (np.asarray(gradient)[:, 2] < 0).all()
