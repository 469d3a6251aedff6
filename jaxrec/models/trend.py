"""The trend: what many users interact with now adds to the logits of those items."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.trend import HALF_LIVES_S
from jaxrec.models.tables import FixedTable

EVENTS_AT_ONE = 0.5  # decayed events at which the logarithm's view of an item turns from linear to logarithmic
LEAST_EVENTS = 1e-6  # so that nothing is divided by 0 where there never was an event
VIEWS = 2  # of each decayed count: its logarithm and its root


class Trend(nnx.Module):
    """trend(j) = sum over half-lives h of w_1h * log(1 + c_hj / 0.5) + w_2h * sqrt(c_hj).

    c_hj is item j's decayed count, scaled by 2 T_h / (C_h + T_h): C_h is the sum of the counts of all items, T_h what
    that sum was on average when the weights were learned. So an item without recent events has trend 0, without any
    recent event every item has, and twice the traffic is not twice the trend.
    """

    def __init__(self, weights: np.ndarray, typical: np.ndarray) -> None:
        """Takes what `jaxrec.training.mix` learned.

        Args:
            weights: [VIEWS, half-lives] float32.
            typical: [half-lives] float32, T above; 0 where there were no events.
        """
        self.weights = FixedTable(jnp.asarray(weights, jnp.float32))
        self.typical = FixedTable(jnp.asarray(typical, jnp.float32))

    @classmethod
    def none(cls) -> "Trend":
        """The trend that adds nothing."""
        return cls(np.zeros((VIEWS, len(HALF_LIVES_S)), np.float32), np.zeros(len(HALF_LIVES_S), np.float32))

    @property
    def adds(self) -> bool:
        """Whether it adds anything to any item."""
        return bool(np.any(self.weights[...]))

    def __call__(self, counts: jax.Array | np.ndarray) -> jax.Array:
        """Decayed counts [..., half-lives, items + 1] float32 -> what is added to the logits [..., items + 1]."""
        counts, weights = jnp.asarray(counts), self.weights[...]
        views = trend_views(counts * traffic_scale(counts.sum(axis=-1), self.typical[...])[..., None])
        found = jnp.zeros(())
        for view, half_life in np.ndindex(weights.shape):  # compiled to one pass; a product would need all views
            found += weights[view, half_life] * views[..., view, half_life, :]
        return found


def trend_views(scaled: jax.Array) -> jax.Array:
    """Scaled counts [..., half-lives, items] -> [..., VIEWS, half-lives, items]."""
    return jnp.stack([jnp.log1p(scaled / EVENTS_AT_ONE), jnp.sqrt(scaled)], axis=-3)


def traffic_scale(total: jax.Array, typical: jax.Array) -> jax.Array:
    """What counts are multiplied with; `total` [..., half-lives] is their sum over all items, `typical` its mean."""
    return 2 * typical / jnp.maximum(total + typical, LEAST_EVENTS)
