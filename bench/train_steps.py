"""One training step three ways, with the same shapes, weights, data, loss and optimizer: ours, plain JAX, PyTorch.

The network: item embedding -> two LSTM layers -> logits against the embedding (tied) plus a bias -> full softmax
cross-entropy of the next item at every valid position -> Adam. Gates in the order input, forget, candidate, output,
which is PyTorch's, too. PyTorch is not a dependency of jaxrec: `pip install torch==2.13.0+cpu` for this benchmark.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrec.models.lstm import LSTM
from jaxrec.training.losses import next_item_loss

LEARNING_RATE = 1e-3


class Shape(NamedTuple):
    """`width`: of the embedding and of each LSTM layer; `items` without padding."""

    items: int = 3706
    width: int = 128
    layers: int = 2
    batch: int = 128
    length: int = 50

    @property
    def positions(self) -> int:
        return self.batch * self.length

    @property
    def flop(self) -> int:
        """Floating-point operations of the step's matrix products: forward once, backward twice (for both factors)."""
        head = self.positions * self.width * (self.items + 1)
        recurrence = self.layers * self.positions * 2 * self.width * 4 * self.width
        return 3 * 2 * (head + recurrence)


Weights = dict[str, np.ndarray]
Step = Callable[[], float]  # one update; returns the loss before it


def random_weights(shape: Shape, seed: int = 0) -> Weights:
    """`item` [items + 1, width] (row 0, padding, is zero), `item_bias`, and per layer `kernel_N`, `recurrent_N` and
    `bias_N`, as in `jaxrec.models.lstm.LSTM`."""
    rng = np.random.default_rng(seed)
    width = shape.width
    weights = {
        "item": rng.normal(0, 0.1, (shape.items + 1, width)),
        "item_bias": np.concatenate([[-1e30], rng.normal(0, 0.1, shape.items)]),
    }
    weights["item"][0] = 0
    for layer in range(shape.layers):
        for name in ("kernel", "recurrent"):
            weights[f"{name}_{layer}"] = rng.normal(0, width**-0.5, (width, 4 * width))
        weights[f"bias_{layer}"] = rng.normal(0, 0.1, 4 * width)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def random_batch(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Items and next items, each [batch, length] int32: popularity as 1 / (rank + 10), one row in eight padded at its
    end, about 1 % in all, which is what `jaxrec.data.batches` leaves."""
    rng = np.random.default_rng(seed)
    popularity = 1 / (np.arange(shape.items) + 10)
    events = 1 + rng.choice(shape.items, (shape.batch, shape.length + 1), p=popularity / popularity.sum())
    lengths = np.full(shape.batch, shape.length)
    lengths[::8] -= rng.integers(1, max(2, shape.length // 6), len(lengths[::8]))
    where = np.arange(shape.length) < lengths[:, None]
    item, target = events[:, :-1], events[:, 1:]
    return np.where(where, item, 0).astype(np.int32), np.where(where, target, 0).astype(np.int32)


def our_step(
    weights: Weights,
    item: np.ndarray,
    target: np.ndarray,
    dtype: jnp.dtype = jnp.float32,
) -> Step:
    """With jaxrec's recurrence and loss, as `our_loss`; parameters and moments are float32."""
    return _jax_step(our_loss(weights, item, target, dtype), weights)


def our_loss(
    weights: Weights,
    item: np.ndarray,
    target: np.ndarray,
    dtype: jnp.dtype = jnp.float32,
) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """The loss as a function of the weights, by jaxrec's recurrence and loss, computed in `dtype`."""
    layers = []
    for layer in range(sum(name.startswith("kernel") for name in weights)):
        lstm = LSTM(*np.array(weights[f"kernel_{layer}"].shape) // (1, 4), rngs=nnx.Rngs(0))
        layers.append(nnx.split(lstm)[0])
    where = target > 0

    def loss_of(params: dict[str, jax.Array]) -> jax.Array:
        params = {name: value.astype(dtype) for name, value in params.items()}
        x = params["item"][item]
        for layer, graphdef in enumerate(layers):
            names = {"kernel": "kernel", "recurrent_kernel": "recurrent", "bias": "bias"}
            lstm = nnx.merge(graphdef, {ours: params[f"{name}_{layer}"] for ours, name in names.items()})
            x, _ = lstm(x, where)
        return next_item_loss(x, params["item"], params["item_bias"], target, where)

    return loss_of


def plain_jax_step(weights: Weights, item: np.ndarray, target: np.ndarray) -> Step:
    """As one writes it: a scan over time per layer, the logits of all positions, optax's cross-entropy."""

    def lstm(x: jax.Array, kernel: jax.Array, recurrent: jax.Array, bias: jax.Array) -> jax.Array:
        def step(carry: Any, x_t: jax.Array) -> tuple[Any, jax.Array]:
            h, c = carry
            i, f, g, o = jnp.split(x_t @ kernel + h @ recurrent + bias, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], recurrent.shape[0]))
        return jnp.swapaxes(jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))[1], 0, 1)

    def loss_of(params: dict[str, jax.Array]) -> jax.Array:
        x = params["item"][item]
        for layer in range(sum(name.startswith("kernel") for name in params)):
            x = lstm(x, params[f"kernel_{layer}"], params[f"recurrent_{layer}"], params[f"bias_{layer}"])
        logits = x @ params["item"].T + params["item_bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.sum(jnp.where(target > 0, losses, 0.0)) / jnp.sum(target > 0)

    return _jax_step(loss_of, weights)


def _jax_step(loss_of: Callable[[dict[str, jax.Array]], jax.Array], weights: Weights) -> Step:
    optimizer = optax.adam(LEARNING_RATE)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = {name: jnp.array(value) for name, value in weights.items()}
    state = [params, optimizer.init(params)]

    def step() -> float:
        *state[:], loss = update(*state)
        return float(loss)

    return step


def torch_step(weights: Weights, item: np.ndarray, target: np.ndarray, threads: int, device: str = "cpu") -> Step:
    """PyTorch's `nn.LSTM` and fused Adam; on `cuda` by cuDNN, with products as exact as JAX has them by default."""
    import torch

    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    count, width = weights["item"].shape
    layers = sum(name.startswith("kernel") for name in weights)
    embedding = torch.nn.Embedding(count, width, padding_idx=0)
    bias = torch.nn.Parameter(torch.from_numpy(weights["item_bias"].copy()))
    lstm = torch.nn.LSTM(width, width, layers, batch_first=True)
    with torch.no_grad():
        embedding.weight.copy_(torch.from_numpy(weights["item"]))
        for layer in range(layers):
            getattr(lstm, f"weight_ih_l{layer}").copy_(torch.from_numpy(weights[f"kernel_{layer}"].T))
            getattr(lstm, f"weight_hh_l{layer}").copy_(torch.from_numpy(weights[f"recurrent_{layer}"].T))
            getattr(lstm, f"bias_ih_l{layer}").copy_(torch.from_numpy(weights[f"bias_{layer}"]))
            getattr(lstm, f"bias_hh_l{layer}").zero_()
    embedding, lstm = embedding.to(device), lstm.to(device)
    bias = torch.nn.Parameter(bias.detach().to(device))
    optimizer = torch.optim.Adam([*embedding.parameters(), bias, *lstm.parameters()], lr=LEARNING_RATE, fused=True)
    items, targets = (torch.from_numpy(each).long().to(device) for each in (item, target.ravel()))

    def step() -> float:
        optimizer.zero_grad()
        outputs, _ = lstm(embedding(items))
        logits = torch.nn.functional.linear(outputs.flatten(0, 1), embedding.weight, bias)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=0)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
