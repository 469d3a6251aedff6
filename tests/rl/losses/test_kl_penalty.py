"""The weight of the KL penalty by hand."""

import jax.numpy as jnp
import pytest

from jaxrec.rl.losses.kl_penalty import next_kl_weight


def test_kl_weight_follows_the_kl_to_its_target() -> None:
    one = jnp.float32(1.0)
    assert float(next_kl_weight(one, jnp.float32(0.1), 0.1)) == pytest.approx(1.0)
    assert float(next_kl_weight(one, jnp.float32(0.11), 0.1)) == pytest.approx(1.0 + 0.1 * 0.1)
    assert float(next_kl_weight(one, jnp.float32(5.0), 0.1)) == pytest.approx(1.0 + 0.1 * 0.2)
    assert float(next_kl_weight(one, jnp.float32(0.0), 0.1)) == pytest.approx(1.0 - 0.1 * 0.2)
