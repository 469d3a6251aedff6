"""The next-item loss over a mesh: positions split over the data axis, items over the item axis.

Each device meets its positions with its items. The log-sum-exp is put together over the item axis, chunk by chunk, so
that no device ever holds the logits of a position for all items, nor the item vectors of another shard.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxrec.models.features import Array
from jaxrec.models.masks import NEVER
from jaxrec.training.losses import next_item_loss
from jaxrec.training.sharding import DATA_AXIS, ITEM_AXIS

CHUNK = 256  # positions whose logits exist at the same time on a device
Loss = Callable[[jax.Array, jax.Array, jax.Array, Array, Array, Array], jax.Array]
LossAndGradients = tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]


def loss_over(mesh: Mesh) -> Loss:
    """`next_item_loss` for arrays laid out over `mesh`; it and its gradients equal the plain ones but for rounding.

    The first axis of queries, target and where must divide by the data axis, the items' rows by the item axis.
    """
    if mesh.size == 1:
        return next_item_loss
    positions, items = PartitionSpec(DATA_AXIS), PartitionSpec(ITEM_AXIS)
    loss_and_gradients = jax.shard_map(
        _of_replica if mesh.shape[ITEM_AXIS] == 1 else _of_shard,
        mesh=mesh,
        in_specs=(positions, items, items, positions, positions, positions),
        out_specs=(PartitionSpec(), (positions, items, items)),
        check_vma=False,
    )

    @jax.custom_vjp
    def loss(
        queries: jax.Array, item_vectors: jax.Array, item_bias: jax.Array, target: Any, where: Any, exclude: Any
    ) -> Any:
        return loss_and_gradients(queries, item_vectors, item_bias, target, where, exclude)[0]

    loss.defvjp(loss_and_gradients, _backward)
    return loss


def _backward(gradients: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[Any, ...]:
    return (*[gradient * cotangent for gradient in gradients], None, None, None)


def _of_replica(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: jax.Array,
    where: jax.Array,
    exclude: jax.Array,
) -> LossAndGradients:
    """On a device that holds all items: its own loss and gradients, weighted by its share of the valid positions."""
    count = jnp.sum(where)
    share = count / jnp.maximum(jax.lax.psum(count, DATA_AXIS), 1)
    loss, (of_queries, of_vectors, of_bias) = jax.value_and_grad(next_item_loss, argnums=(0, 1, 2))(
        queries, item_vectors, item_bias, target, where, exclude
    )
    loss, of_vectors, of_bias = jax.lax.psum((loss * share, of_vectors * share, of_bias * share), DATA_AXIS)
    return loss, (of_queries * share, of_vectors, of_bias)


def _of_shard(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: jax.Array,
    where: jax.Array,
    exclude: jax.Array,
) -> LossAndGradients:
    """On a device that holds the items of its shard. A chunk's logits become its gradients (softmax minus one-hot)
    in the same pass, as soon as the shards have agreed on the normalizer."""
    shape, width = queries.shape, queries.shape[-1]
    missing = -queries[..., 0].size % CHUNK
    query = jnp.pad(queries.reshape(-1, width), ((0, missing), (0, 0))).reshape(-1, CHUNK, width)
    index = jnp.pad(jnp.ravel(target), (0, missing)).reshape(-1, CHUNK)
    valid = jnp.pad(jnp.ravel(where), (0, missing)).reshape(-1, CHUNK)
    excluded = exclude.reshape(*shape[:-1], -1)
    excluded = jnp.pad(excluded.reshape(-1, excluded.shape[-1]), ((0, missing), (0, 0)))
    first = jax.lax.axis_index(ITEM_AXIS) * len(item_vectors)
    index = index - first  # rows of this shard
    # An index of another shard becomes one past the end, which a scatter drops; a negative one would wrap around.
    outside = (excluded < first) | (excluded >= first + len(item_vectors))
    excluded = jnp.where(outside, len(item_vectors), excluded - first).reshape(-1, CHUNK, excluded.shape[-1])
    over_items = functools.partial(jax.lax.psum, axis_name=ITEM_AXIS)

    def chunk(carry: Any, inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        of_vectors, of_bias, total = carry
        query, index, valid, excluded = inputs
        logits = query @ item_vectors.T + item_bias
        logits = logits.at[jnp.arange(CHUNK)[:, None], excluded].set(NEVER, mode="drop")
        highest = jax.lax.pmax(jnp.max(logits, axis=1), ITEM_AXIS)
        exponentials = jnp.exp(logits - highest[:, None])
        here = (index >= 0) & (index < len(item_vectors))
        row = jnp.where(here, index, 0)
        target_logit = jnp.where(here, jnp.take_along_axis(logits, row[:, None], axis=1)[:, 0], 0.0)
        normalizer, target_logit = over_items((jnp.sum(exponentials, axis=1), target_logit))
        losses = highest + jnp.log(normalizer) - target_logit
        scale = jnp.where(valid, 1.0 / normalizer, 0.0)
        one_hot = -(valid & here).astype(logits.dtype)
        gradient = (exponentials * scale[:, None]).at[jnp.arange(CHUNK), row].add(one_hot)
        total = total + jnp.sum(jnp.where(valid, losses, 0.0))
        return (of_vectors + gradient.T @ query, of_bias + jnp.sum(gradient, axis=0), total), gradient @ item_vectors

    zeros = (jnp.zeros_like(item_vectors), jnp.zeros_like(item_bias), jnp.zeros((), queries.dtype))
    (of_vectors, of_bias, total), of_queries = jax.lax.scan(chunk, zeros, (query, index, valid, excluded))
    of_queries = over_items(of_queries.reshape(-1, width)[: queries[..., 0].size].reshape(shape))
    of_vectors, of_bias, total, count = jax.lax.psum((of_vectors, of_bias, total, jnp.sum(where)), DATA_AXIS)
    count = jnp.maximum(count, 1)
    return total / count, (of_queries / count, of_vectors / count, of_bias / count)
