"""The recurrence with its own gradient against the plain formula under automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.lstm import LSTM, State

BATCH, LENGTH, INPUTS, HIDDEN = 5, 7, 3, 4
COUNTS = np.array([7, 4, 1, 0, 6])
WHERE = np.arange(LENGTH) < COUNTS[:, None]


def plain(
    parameters: tuple[jax.Array, ...], x: jax.Array, state: State, starts: np.ndarray | None
) -> tuple[jax.Array, State]:
    """Step by step, choosing between the old and the new state at padding."""
    kernel, recurrent, bias = parameters
    (h, c), outputs = state, []
    for t in range(LENGTH):
        if starts is not None:
            h, c = (jnp.where(starts[:, t, None], 0.0, before) for before in (h, c))
        i, f, g, o = jnp.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
        c_t = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h_t = jax.nn.sigmoid(o) * jnp.tanh(c_t)
        outputs.append(h_t)
        valid = WHERE[:, t, None]
        h, c = jnp.where(valid, h_t, h), jnp.where(valid, c_t, c)
    return jnp.stack(outputs, axis=1), (h, c)


def ours(
    parameters: tuple[jax.Array, ...], x: jax.Array, state: State, starts: np.ndarray | None, unroll: int
) -> tuple[jax.Array, State]:
    lstm = LSTM(INPUTS, HIDDEN, rngs=nnx.Rngs(0))
    lstm.kernel[...], lstm.recurrent_kernel[...], lstm.bias[...] = parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrec.models.lstm.UNROLLED", unroll)
        return lstm(x, WHERE, state, starts)


@pytest.mark.parametrize("unroll", [1, 8])
@pytest.mark.parametrize("with_starts", [False, True])
def test_values_and_gradients_equal_the_plain_ones(with_starts: bool, unroll: int) -> None:
    rng = np.random.default_rng(0)
    starts = WHERE & (rng.random((BATCH, LENGTH)) < 0.3) if with_starts else None
    shapes = [(INPUTS, 4 * HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN,), (BATCH, LENGTH, INPUTS)]
    shapes += [(BATCH, HIDDEN)] * 2
    *parameters, x, h, c = (jnp.asarray(rng.normal(0, 0.7, shape), jnp.float32) for shape in shapes)
    of_outputs, of_h, of_c = (rng.normal(size=s).astype(np.float32) for s in [(BATCH, LENGTH, HIDDEN), *shapes[-2:]])

    def weighted(function: object) -> object:
        def value(parameters: tuple[jax.Array, ...], x: jax.Array, state: State) -> tuple[jax.Array, object]:
            outputs, (h_n, c_n) = function(parameters, x, state, starts)  # type: ignore[operator]
            outputs = jnp.where(WHERE[..., None], outputs, 0.0)
            return jnp.sum(of_outputs * outputs) + jnp.sum(of_h * h_n) + jnp.sum(of_c * c_n), (outputs, h_n, c_n)

        return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(tuple(parameters), x, (h, c))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        weighted(functools.partial(ours, unroll=unroll)),
        weighted(plain),
    )


def test_a_row_without_events_keeps_its_state() -> None:
    rng = np.random.default_rng(1)
    lstm = LSTM(INPUTS, HIDDEN, rngs=nnx.Rngs(0))
    state = (jnp.asarray(rng.normal(size=(BATCH, HIDDEN))), jnp.asarray(rng.normal(size=(BATCH, HIDDEN))))
    _, (h, c) = lstm(jnp.asarray(rng.normal(size=(BATCH, LENGTH, INPUTS))), WHERE, state)
    np.testing.assert_array_equal(h[3], state[0][3])
    np.testing.assert_array_equal(c[3], state[1][3])
    assert not np.allclose(h[2], state[0][2])
