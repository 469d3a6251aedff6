"""The recurrence: one LSTM layer over right-padded sequences (Hochreiter and Schmidhuber 1997, with forget gate)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.models.features import Array


class LSTM(nnx.Module):
    """Gates in the order input, forget, candidate, output, as in Flax and Keras (ONNX has i, o, f, c).

    The input's product with its kernel is one matrix product over all steps; only the hidden state's runs in the scan.
    """

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        orthogonal = jax.nn.initializers.orthogonal(column_axis=0)
        self.kernel = nnx.Param(jax.nn.initializers.glorot_uniform()(rngs.params(), (inputs, 4 * hidden)))
        blocks = [orthogonal(rngs.params(), (hidden, hidden)) for _ in range(4)]
        self.recurrent_kernel = nnx.Param(jnp.concatenate(blocks, axis=1))
        forget_open = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)  # Jozefowicz et al. 2015, section 3.2
        self.bias = nnx.Param(forget_open)
        self.hidden = hidden

    def __call__(
        self,
        x: jax.Array,
        where: Array,
        state: tuple[jax.Array, jax.Array] | None = None,
        starts: Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x [batch, length, inputs], where [batch, length] -> outputs [batch, length, hidden], (h, c) [batch, hidden].

        The final state is the one after each row's last real event: padding leaves it as it is. Where `starts`
        [batch, length] is True, another sequence begins: the state before it is forgotten.
        """
        recurrent_kernel = self.recurrent_kernel[...]
        gates_x = x @ self.kernel[...] + self.bias[...]
        if state is None:
            zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
            state = (zeros, zeros)

        carry_0: tuple[jax.Array, jax.Array] = state

        def step(
            carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array, jax.Array | None]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h_tm1, c_tm1 = carry
            gates_t, where_t, starts_t = inputs
            if starts_t is not None:
                h_tm1 = jnp.where(starts_t[:, None], 0.0, h_tm1)
                c_tm1 = jnp.where(starts_t[:, None], 0.0, c_tm1)
            i, f, g, o = jnp.split(gates_t + h_tm1 @ recurrent_kernel, 4, axis=-1)
            c_t = jax.nn.sigmoid(f) * c_tm1 + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_t = jax.nn.sigmoid(o) * jnp.tanh(c_t)
            valid = where_t[:, None]
            return (jnp.where(valid, h_t, h_tm1), jnp.where(valid, c_t, c_tm1)), h_t

        time_first = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (gates_x, where, starts))
        final, outputs = jax.lax.scan(step, carry_0, time_first)
        return jnp.swapaxes(outputs, 0, 1), final
