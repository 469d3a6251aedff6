"""The imitation loss by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.masks import NEVER
from jaxrec.rl.losses.imitation import imitation_loss


def test_imitation_loss_by_hand() -> None:
    """Uniform over two items, then over three; the third target is excluded, the fourth has no weight."""
    logits = jnp.array([[NEVER, 0, 0, NEVER], [NEVER, 0, 0, 0], [NEVER, 0, 0, NEVER], [NEVER, 9, 0, 0]], jnp.float32)
    target, weight = jnp.array([1, 2, 3, 2], jnp.int32), jnp.array([1.0, 0.25, 1.0, 0.0])
    expected = (1.0 * np.log(2) + 0.25 * np.log(3)) / 1.25
    assert float(imitation_loss(logits, target, weight)) == pytest.approx(expected, rel=1e-6)
    assert float(imitation_loss(logits[2:3], target[2:3], weight[2:3])) == 0.0
