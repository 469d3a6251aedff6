"""The weight of the KL penalty by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.rl.losses.kl_penalty import next_kl_weight, next_weight_by_cost


def test_kl_weight_follows_the_kl_to_its_target() -> None:
    one = jnp.float32(1.0)
    assert float(next_kl_weight(one, jnp.float32(0.1), 0.1)) == pytest.approx(1.0)
    assert float(next_kl_weight(one, jnp.float32(0.11), 0.1)) == pytest.approx(1.0 + 0.1 * 0.1)
    assert float(next_kl_weight(one, jnp.float32(5.0), 0.1)) == pytest.approx(1.0 + 0.1 * 0.2)
    assert float(next_kl_weight(one, jnp.float32(0.0), 0.1)) == pytest.approx(1.0 - 0.1 * 0.2)


def test_the_weight_rises_while_the_budget_is_exceeded() -> None:
    """By 3 % at most, and by half of that if the excess is half of 0.002 nats; a gain lowers it."""
    two = jnp.float32(2.0)
    assert float(next_weight_by_cost(two, jnp.float32(0.1), 0.1)) == pytest.approx(2.0)
    assert float(next_weight_by_cost(two, jnp.float32(0.101), 0.1)) == pytest.approx(2.0 * np.exp(0.015))
    assert float(next_weight_by_cost(two, jnp.float32(5.0), 0.1)) == pytest.approx(2.0 * np.exp(0.03))
    assert float(next_weight_by_cost(two, jnp.float32(-5.0), 0.0)) == pytest.approx(2.0 * np.exp(-0.03))
