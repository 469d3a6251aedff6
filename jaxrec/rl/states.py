"""The state that a policy sees: the supervised query vector after a history, and the most recent items."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.events import Events
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid

Results = TypeVar("Results")


def state_query(hybrid: Hybrid, state: jax.Array, request_gap: Array) -> tuple[jax.Array, jax.Array]:
    """Query [batch, width] and recent items [batch, RECENT] int32 of the hybrid's recurrent state [batch, ...], at a
    request `request_gap` [batch] seconds after the last event."""
    h_lstm, _, h_content, _, recent = hybrid.split_state(state)
    return hybrid.supervised_query((h_lstm, h_content), jnp.asarray(request_gap)), recent


@functools.partial(jax.jit, static_argnums=0)
def encode_histories(
    graphdef: nnx.GraphDef[Hybrid], variables: nnx.State, events: Events, request_gap: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the hybrid makes of whole histories.

    Args:
        graphdef: Structure of the hybrid, and `variables` its arrays (`nnx.split`).
        variables: See `graphdef`.
        events: [batch, length] histories.
        request_gap: [variants, batch] float32 seconds from the last event to the request.

    Returns:
        Queries [variants, batch, width], recent items [batch, RECENT] int32, and the recurrent state [batch, ...].
    """
    model = nnx.merge(graphdef, variables)
    _, state = model.encode(events)
    queries = jnp.stack([state_query(model, state, gap)[0] for gap in request_gap])
    return queries, model.split_state(state)[-1], state


@functools.partial(jax.jit, static_argnums=0)
def encode_positions(
    graphdef: nnx.GraphDef[Hybrid], variables: nnx.State, events: Events, request_gap: Array
) -> jax.Array:
    """[batch, length, width]: the query after each event; `request_gap` [batch, length] seconds until the next one."""
    model = nnx.merge(graphdef, variables)
    outputs, _ = model.encode(events)
    return model.supervised_query(outputs, jnp.asarray(request_gap))


def by_batches(compute: Callable[[np.ndarray], Results], count: int, size: int) -> Results:
    """Concatenates compute(rows [size] int64) over all `count` rows, as NumPy arrays [count, ...].

    The last batch repeats the last row, so that one shape is compiled.
    """
    found = []
    for start in range(0, count, size):
        found.append(jax.device_get(compute(np.minimum(np.arange(start, start + size), count - 1))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)
