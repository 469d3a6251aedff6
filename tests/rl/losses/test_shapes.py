"""Inputs that would broadcast to a wrong loss are refused."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from jaxrec.rl.losses.clipped_surrogate import clipped_surrogate_loss
from jaxrec.rl.losses.constraints import entropy_floor_loss
from jaxrec.rl.losses.imitation import imitation_loss
from jaxrec.rl.losses.off_policy import capped_importance_weights, top_k_off_policy_loss
from jaxrec.rl.losses.policy_gradient import baseline_loss, reinforce_loss
from jaxrec.rl.policy import kl_divergence, slate_logprobs

ROWS, SLOTS, MASK = jnp.ones(3), jnp.ones((3, 2)), jnp.ones((3, 2), bool)
ITEMS = jnp.array([1, 2, 1], jnp.int32)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (reinforce_loss, (SLOTS, SLOTS, ROWS[:, None], MASK)),
        (baseline_loss, (ROWS[:, None], SLOTS, MASK)),
        (clipped_surrogate_loss, (SLOTS, ROWS[:, None], MASK, 2.0)),
        (capped_importance_weights, (SLOTS, ROWS[:, None])),
        (top_k_off_policy_loss, (ROWS, ROWS, ROWS[:1], MASK[:, 0], 2)),
        (entropy_floor_loss, (ROWS, 1.0, MASK[:1, 0])),
        (imitation_loss, (SLOTS, ITEMS, ROWS[:1])),
        (kl_divergence, (SLOTS, SLOTS[:1])),
        (slate_logprobs, (SLOTS, ITEMS)),
    ],
)
def test_shapes_that_differ_are_refused(function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...]) -> None:
    with pytest.raises(AssertionError):
        function(*arguments)
