"""Anchors by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.sequence import NEVER
from jaxrec.rl.objectives.anchors import anchor_loss, next_kl_coefficient


def test_anchor_loss_by_hand() -> None:
    """Uniform over two items, then over three; the third target is excluded, the fourth has no weight."""
    logits = jnp.array([[NEVER, 0, 0, NEVER], [NEVER, 0, 0, 0], [NEVER, 0, 0, NEVER], [NEVER, 9, 0, 0]], jnp.float32)
    target, weight = jnp.array([1, 2, 3, 2], jnp.int32), jnp.array([1.0, 0.25, 1.0, 0.0])
    expected = (1.0 * np.log(2) + 0.25 * np.log(3)) / 1.25
    assert float(anchor_loss(logits, target, weight)) == pytest.approx(expected, rel=1e-6)
    assert float(anchor_loss(logits[2:3], target[2:3], weight[2:3])) == 0.0


def test_kl_coefficient_follows_the_kl_to_its_target() -> None:
    one = jnp.float32(1.0)
    assert float(next_kl_coefficient(one, jnp.float32(0.1), 0.1)) == pytest.approx(1.0)
    assert float(next_kl_coefficient(one, jnp.float32(0.11), 0.1)) == pytest.approx(1.0 + 0.1 * 0.1)
    assert float(next_kl_coefficient(one, jnp.float32(5.0), 0.1)) == pytest.approx(1.0 + 0.1 * 0.2)
    assert float(next_kl_coefficient(one, jnp.float32(0.0), 0.1)) == pytest.approx(1.0 - 0.1 * 0.2)
