"""Training losses: the softmax over all items, in full or sampled, on one device or split over a mesh.

`where` marks valid positions; sums are divided by their number, never by the padded length. No loss keeps an array of
all positions' logits: POSITIONS_PER_CHUNK positions at a time are scored and forgotten.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxrec.models.features import Array
from jaxrec.models.masks import NEVER
from jaxrec.training.sharding import DATA_AXIS, ITEM_AXIS

POSITIONS_PER_CHUNK = 256  # whose logits exist at the same time: few enough for the cache, many for the product
Gradients = tuple[jax.Array, jax.Array, jax.Array]


def next_item_loss(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: Array,
    where: Array,
    exclude: Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Mean full-softmax cross-entropy of the next item over valid positions.

    The logits of a chunk are turned into the chunk's gradients (softmax minus one-hot) in the same pass. Over a mesh,
    positions are split over its data axis and items over its item axis: each device scores its positions against its
    items, and the log-sum-exp is put together over the item axis. So no device holds the logits of a position for all
    items, nor the item vectors of another shard. The result is that of one device but for rounding.

    Args:
        queries: [..., width] float32.
        item_vectors: [items + 1, width] float32; row 0 is padding.
        item_bias: [items + 1] float32.
        target: [...] int32, the next item of each position.
        where: [...] bool, the valid positions.
        exclude: [..., excluded] int32, items that are no candidates at a position (0 = none). It must not hold the
            position's target.
        mesh: what the arrays are laid out over (`jaxrec.training.sharding.data_mesh`); None is one device. The first
            axis of queries, target, where and exclude must divide by its data axis, the rows of the item tables by
            its item axis.

    Returns:
        [] float32, in nats; 0 where no position is valid.
    """
    _assert_shapes(queries, item_vectors, item_bias, target, where)
    return _full_softmax(mesh, queries, item_vectors, item_bias, target, where, exclude)


def sampled_softmax_loss(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: Array,
    where: Array,
    sampled_items: int,
    key: jax.Array,
) -> jax.Array:
    """`next_item_loss` with a normalizer that is estimated from a sample of the items: for catalogues so large that the
    logits of all items take too long.

    Importance sampling (Bengio and Senécal 2008, section III), with the proposal's log-probability taken off the
    sampled logits (logQ correction: Yi et al. 2019, equation 3). Deviation: the target is not estimated. It enters
    with its own exponential, and is left out where it is drawn. The proposal is uniform and stratified: one item from
    each of `sampled_items` groups of neighbours, so that no item comes twice, the estimated normalizer's expectation
    is the full one, and with as many samples as items it is the full softmax itself.

    Args:
        queries: [..., width] float32.
        item_vectors: [items + 1, width] float32; row 0 is padding.
        item_bias: [items + 1] float32.
        target: [...] int32, the next item of each position.
        where: [...] bool, the valid positions.
        sampled_items: how many items are drawn, once for all positions.
        key: of the draw.

    Returns:
        [] float32, in nats; 0 where no position is valid.

    Raises:
        ValueError: sampled_items is outside 1..items.
    """
    _assert_shapes(queries, item_vectors, item_bias, target, where)
    items = len(item_vectors) - 1
    if not 1 <= sampled_items <= items:
        raise ValueError(f"sampled_items {sampled_items} is outside 1..{items}, the items of the catalogue")
    edges = np.arange(sampled_items + 1, dtype=np.int64) * items // sampled_items
    sampled = 1 + jax.random.randint(key, (sampled_items,), edges[:-1].astype(np.int32), edges[1:].astype(np.int32))
    log_expected_count = -np.log(np.diff(edges)).astype(np.float32)

    flat, targets, valid = _flat(queries, target, where)
    # One lookup for both, because the gradient of each lookup is an array as large as the table.
    vectors, biases = (table[jnp.concatenate([sampled, targets])] for table in (item_vectors, item_bias))
    sampled_vectors, sampled_bias = vectors[:sampled_items], biases[:sampled_items] - log_expected_count

    @jax.checkpoint  # the backward pass computes a chunk's logits again instead of keeping them
    def chunk(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        query, index, valid, vector, bias = inputs
        target_logit = jnp.sum(query * vector, axis=1) + bias
        logits = query @ sampled_vectors.T + sampled_bias
        logits = jnp.where(sampled == index[:, None], NEVER, logits)
        losses = jnp.logaddexp(jax.nn.logsumexp(logits, axis=1), target_logit) - target_logit
        return total + jnp.sum(jnp.where(valid, losses, 0.0)), None

    chunks = [_in_chunks(x) for x in (flat, targets, valid, vectors[sampled_items:], biases[sampled_items:])]
    total, _ = jax.lax.scan(chunk, jnp.zeros((), queries.dtype), tuple(chunks))
    return total / jnp.maximum(jnp.sum(where), 1)


def _assert_shapes(
    queries: jax.Array, item_vectors: jax.Array, item_bias: jax.Array, target: Array, where: Array
) -> None:
    chex.assert_rank([item_vectors, item_bias], [2, 1])
    chex.assert_equal_shape([target, where])
    chex.assert_shape(queries, (*target.shape, item_vectors.shape[1]))


def _flat(queries: jax.Array, target: Array, where: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[positions, width], [positions], [positions]."""
    return queries.reshape(-1, queries.shape[-1]), jnp.ravel(target), jnp.ravel(where)


def _in_chunks(x: jax.Array) -> jax.Array:
    """[positions, ...] -> [chunks, POSITIONS_PER_CHUNK, ...], filled up with zeros."""
    missing = -len(x) % POSITIONS_PER_CHUNK
    return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))).reshape(-1, POSITIONS_PER_CHUNK, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _full_softmax(mesh: Mesh | None, *arrays: Any) -> jax.Array:
    return _over_mesh(mesh, *arrays)[0]


def _over_mesh(mesh: Mesh | None, *arrays: Any) -> tuple[jax.Array, Gradients]:
    if mesh is None or mesh.size == 1:
        return _loss_and_gradients(*arrays)
    positions, items = PartitionSpec(DATA_AXIS), PartitionSpec(ITEM_AXIS)
    item_axis = ITEM_AXIS if mesh.shape[ITEM_AXIS] > 1 else None
    return jax.shard_map(
        functools.partial(_loss_and_gradients, data_axis=DATA_AXIS, item_axis=item_axis),
        mesh=mesh,
        in_specs=(positions, items, items, positions, positions, positions),
        out_specs=(PartitionSpec(), (positions, items, items)),
        check_vma=False,
    )(*arrays)


def _backward(mesh: Mesh | None, gradients: Gradients, cotangent: jax.Array) -> tuple[Any, ...]:
    return (*[gradient * cotangent for gradient in gradients], None, None, None)


_full_softmax.defvjp(_over_mesh, _backward)


def _loss_and_gradients(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: jax.Array,
    where: jax.Array,
    exclude: jax.Array | None,
    data_axis: str | None = None,
    item_axis: str | None = None,
) -> tuple[jax.Array, Gradients]:
    """The loss, and its gradients with respect to queries, item vectors and item bias.

    With `item_axis` the items are one device's shard, with `data_axis` the positions are.
    """
    flat, index, valid = _flat(queries, target, where)
    excluded: Any = None if exclude is None else exclude.reshape(len(flat), -1)
    if item_axis is not None:
        first, rows = jax.lax.axis_index(item_axis) * len(item_vectors), len(item_vectors)

        def in_shard(item: jax.Array) -> jax.Array:
            # An item of another shard becomes one past the end, which a scatter drops; a negative one would wrap.
            return jnp.where((item < first) | (item >= first + rows), rows, item - first)

        index, excluded = jax.tree.map(in_shard, (index, excluded))
    # Both products that read the transposed vectors, and the gradient that is added up transposed, are then plain
    # row-major products, which XLA:CPU runs 8 % faster than the same with a transposed factor.
    transposed = item_vectors.T

    def chunk(carry: Any, inputs: tuple[jax.Array, jax.Array, jax.Array, Any]) -> tuple[Any, jax.Array]:
        vectors_gradient, bias_gradient, total = carry
        query, index, valid, excluded = inputs
        logits = query @ transposed + item_bias
        if excluded is not None:
            logits = logits.at[jnp.arange(POSITIONS_PER_CHUNK)[:, None], excluded].set(NEVER, mode="drop")
        # Subtracted so that exp cannot overflow.
        highest = _over(jax.lax.pmax, item_axis, jnp.max(logits, axis=1))
        exponentials = jnp.exp(logits - highest[:, None])
        target_logit = jnp.take_along_axis(logits, index[:, None], axis=1, mode="fill", fill_value=0.0)[:, 0]
        normalizer, target_logit = _over(jax.lax.psum, item_axis, (jnp.sum(exponentials, axis=1), target_logit))
        losses = highest + jnp.log(normalizer) - target_logit
        # The gradient of the logits is `scale * difference`; scaling the small factors spares a pass over the items.
        scale = jnp.where(valid, 1.0 / normalizer, 0.0)
        difference = exponentials.at[jnp.arange(POSITIONS_PER_CHUNK), index].add(-normalizer, mode="drop")
        carry = (
            vectors_gradient + (query * scale[:, None]).T @ difference,
            bias_gradient + scale @ difference,
            total + jnp.sum(jnp.where(valid, losses, 0.0)),
        )
        return carry, (difference @ item_vectors) * scale[:, None]

    zeros = (jnp.zeros_like(transposed), jnp.zeros_like(item_bias), jnp.zeros((), queries.dtype))
    chunks = jax.tree.map(_in_chunks, (flat, index, valid, excluded))
    sums, query_gradients = jax.lax.scan(chunk, zeros, chunks)
    of_queries = query_gradients.reshape(-1, flat.shape[1])[: len(flat)].reshape(queries.shape)
    of_queries = _over(jax.lax.psum, item_axis, of_queries)
    (of_vectors, of_bias, total), count = _over(jax.lax.psum, data_axis, (sums, jnp.sum(where)))
    count = jnp.maximum(count, 1)
    return total / count, (of_queries / count, of_vectors.T / count, of_bias / count)


def _over(collective: Any, axis: str | None, tree: Any) -> Any:
    """A collective over a mesh axis; without one, what is there is all."""
    return tree if axis is None else collective(tree, axis)
