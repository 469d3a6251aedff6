"""bench/recurrences.py: all ways compute the same, at padding too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from bench.recurrences import LOOPS, Way, Weights, cudnn, ways

BATCH, LENGTH, INPUTS, HIDDEN = 5, 9, 3, 4
WHERE = np.arange(LENGTH) < np.array([9, 4, 1, 0, 6])[:, None]


@pytest.fixture(scope="module")
def inputs() -> tuple[Weights, jax.Array]:
    rng = np.random.default_rng(2)
    shapes = (INPUTS, 4 * HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN,), (BATCH, LENGTH, INPUTS)
    *weights, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return Weights(*weights), x


def plain(weights: Weights, x: np.ndarray) -> np.ndarray:
    """Step by step, in NumPy, zeros at padding."""
    h, c, outputs = np.zeros((BATCH, HIDDEN)), np.zeros((BATCH, HIDDEN)), []
    for t in range(LENGTH):
        gates = x[:, t] @ weights.kernel + h @ weights.recurrent_kernel + weights.bias
        i, f, g, o = np.split(np.asarray(gates), 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        outputs.append(h)
    return np.where(WHERE[..., None], np.stack(outputs, axis=1), 0.0)


@pytest.mark.parametrize("way", ways(jax.default_backend()).values(), ids=ways(jax.default_backend()))
def test_outputs_equal_the_plain_ones(inputs: tuple[Weights, jax.Array], way: Way) -> None:
    np.testing.assert_allclose(way(*inputs, WHERE), plain(*inputs), atol=1e-5)


def test_cudnn_gets_the_weights_of_the_layer(
    inputs: tuple[Weights, jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the reference implementation of `jax.experimental.rnn`, which runs anywhere."""

    def reference(
        x: jax.Array, h: jax.Array, c: jax.Array, weights: jax.Array, lengths: jax.Array, **shape: int
    ) -> object:
        sizes = shape["input_size"], shape["hidden_size"], shape["num_layers"], shape["bidirectional"]
        unpacked = rnn.unpack_lstm_weights(weights, *sizes)
        return rnn.lstm_ref(x, h, c, *unpacked, lengths, *sizes[:3], shape["dropout"], sizes[3])

    monkeypatch.setattr(rnn, "lstm", reference)
    np.testing.assert_allclose(cudnn(*inputs, WHERE), plain(*inputs), atol=1e-5)


def test_only_a_gpu_has_cudnn() -> None:
    assert ways("gpu") == {**LOOPS, "cudnn": cudnn}
    assert ways("tpu") == ways("cpu") == LOOPS
