"""Ways to compute one LSTM layer, for bench/gpu.py to compare: without `starts`, which cuDNN's LSTM does not have."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import rnn

from jaxrec.models.lstm import recurrence


class Weights(NamedTuple):
    """Of a layer of `jaxrec.models.lstm.LSTM`: kernel [inputs, 4 * hidden], recurrent_kernel [hidden, 4 * hidden] and
    bias [4 * hidden], float32."""

    kernel: jax.Array
    recurrent_kernel: jax.Array
    bias: jax.Array


def loop(weights: Weights, x: jax.Array, where: np.ndarray, unroll: int) -> jax.Array:
    """By jaxrec's recurrence, with `unroll` steps in a round of the loop."""
    kernel = jnp.concatenate([weights.kernel, weights.recurrent_kernel])
    zeros = jnp.zeros((len(x), len(weights.recurrent_kernel)), x.dtype)
    h_all, _ = recurrence(unroll, kernel, weights.bias, jnp.swapaxes(x, 0, 1), (zeros, zeros), None)
    return jnp.where(where[..., None], jnp.swapaxes(h_all, 0, 1), 0.0)


def cudnn(weights: Weights, x: jax.Array, where: np.ndarray) -> jax.Array:
    """By cuDNN, whose gates have jaxrec's order."""
    kernel, recurrent_kernel, bias = weights
    inputs, hidden = len(kernel), len(recurrent_kernel)
    zeros = jnp.zeros((1, len(x), hidden), x.dtype)
    outputs, _, _ = rnn.lstm(
        x,
        zeros,
        zeros,
        jnp.concatenate([kernel.T.ravel(), recurrent_kernel.T.ravel(), bias, jnp.zeros_like(bias)]),
        jnp.maximum(jnp.sum(where, axis=1, dtype=jnp.int32), 1),  # it refuses empty rows
        input_size=inputs,
        hidden_size=hidden,
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return jnp.where(where[..., None], outputs, 0.0)


# Outputs [batch, length, hidden] of weights, x [batch, length, inputs] and where [batch, length] bool, which is True at
# real events, the first of each row. Outputs are zero elsewhere. The state before the first event is zero.
Way = Callable[[Weights, jax.Array, np.ndarray], jax.Array]
LOOPS: dict[str, Way] = {
    "scan": functools.partial(loop, unroll=1),
    "unrolled by 8": functools.partial(loop, unroll=8),
}


def ways(backend: str) -> dict[str, Way]:
    """Those of a backend of JAX, by name. `scan` is what training uses."""
    return {**LOOPS, "cudnn": cudnn} if backend == "gpu" else LOOPS
