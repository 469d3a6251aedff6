"""What keeps a policy from giving the same few items to all users: floors of entropy and of coverage."""

import jax
import jax.numpy as jnp

from jaxrec.rl.losses.constraints import coverage_floor_loss, entropy_floor_loss
from jaxrec.rl.policy import entropy


def floor_penalty(
    logits: jax.Array, reference: jax.Array, entropy_floor: float, coverage_floor: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The cost of falling below the floors, and what they are measured by.

    Args:
        logits: [batch, items + 1] of the policy.
        reference: [batch, items + 1] of the policy that it started from.
        entropy_floor: Share of the reference's mean entropy.
        coverage_floor: Share of the reference's effective items.

    Returns:
        The penalty [], and the mean entropy (nats) and the effective items that the batch's recommendations are spread
        over, by name.
    """
    everywhere = jnp.ones(len(logits), bool)
    entropies = entropy(logits)
    _, items_before = coverage_floor_loss(reference, 1.0, everywhere)
    of_entropy = entropy_floor_loss(entropies, entropy_floor * jnp.mean(entropy(reference)), everywhere)
    of_coverage, items = coverage_floor_loss(logits, coverage_floor * items_before, everywhere)
    return of_entropy + of_coverage, {"entropy": jnp.mean(entropies), "effective_items": items}


def slate_coverage(slates: jax.Array, width: int) -> jax.Array:
    """The share of the `width` - 1 items that occur in any of the slates [..., k]."""
    seen = jnp.zeros(width).at[slates.reshape(-1)].set(1.0)
    return jnp.sum(seen[1:]) / (width - 1)
