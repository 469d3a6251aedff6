"""Training losses. `where` marks valid entries; sums are divided by their number, never by the padded length."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.features import Array
from jaxrec.models.masks import NEVER

CHUNK = 256  # positions whose logits exist at the same time: few enough for the cache, many enough for the product


def next_item_loss(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: Array,
    where: Array,
    exclude: Array | None = None,
) -> jax.Array:
    """Mean full-softmax cross-entropy (nats) of the next item over valid positions; 0 where there are none.

    queries [..., width], item_vectors [items + 1, width], item_bias [items + 1], target [...] int32, where [...] bool;
    exclude [..., excluded] int32: items that are no candidates at a position (0 = none). The target must not be one.

    The logits of CHUNK positions at a time are computed, turned into the chunk's gradients (softmax minus one-hot)
    in the same pass, and forgotten: no [..., items] array is kept for the backward pass.
    """
    flat, targets, valid = _flat(queries, target, where)
    missing = -len(flat) % CHUNK
    return _chunked_loss(
        jnp.pad(flat, ((0, missing), (0, 0))),
        item_vectors,
        item_bias,
        jnp.pad(targets, (0, missing)),
        jnp.pad(valid, (0, missing)),
        None if exclude is None else jnp.pad(exclude.reshape(len(flat), -1), ((0, missing), (0, 0))),
    )


def sampled_softmax_loss(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: Array,
    where: Array,
    sampled_items: int,
    key: jax.Array,
) -> jax.Array:
    """`next_item_loss` with a normalizer that is estimated from `sampled_items` items, drawn anew by each call and
    shared by its positions: for catalogues so large that the logits of all items take too long.

    Importance sampling (Bengio and Senécal 2008, section III), with the proposal's log-probability taken off the
    sampled logits (logQ correction: Yi et al. 2019, equation 3). Deviation: the target is not estimated. It enters
    with its own exponential, and is left out where it is drawn. The proposal is uniform and stratified: one item from
    each of `sampled_items` groups of neighbours, so that no item comes twice, the estimated normalizer's expectation
    is the full one, and with as many samples as items it is the full softmax itself.
    Raises ValueError unless 1 <= sampled_items <= items.
    """
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

    missing = -len(flat) % CHUNK
    of_positions = (flat, targets, valid, vectors[sampled_items:], biases[sampled_items:])
    chunks = [
        jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))).reshape(-1, CHUNK, *x.shape[1:]) for x in of_positions
    ]
    total, _ = jax.lax.scan(chunk, jnp.zeros((), queries.dtype), tuple(chunks))
    return total / jnp.maximum(jnp.sum(where), 1)


def _flat(queries: jax.Array, target: Array, where: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[positions, width], [positions], [positions]."""
    return queries.reshape(-1, queries.shape[-1]), jnp.ravel(target), jnp.ravel(where)


@jax.custom_vjp
def _chunked_loss(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: jax.Array,
    where: jax.Array,
    exclude: jax.Array | None,
) -> jax.Array:
    return _loss_and_gradients(queries, item_vectors, item_bias, target, where, exclude)[0]


def _loss_and_gradients(
    queries: jax.Array,
    item_vectors: jax.Array,
    item_bias: jax.Array,
    target: jax.Array,
    where: jax.Array,
    exclude: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """The loss, and its gradients with respect to queries, item vectors and item bias."""
    # Both products that read the transposed vectors, and the gradient that is added up transposed, are then plain
    # row-major products, which XLA:CPU runs 8 % faster than the same with a transposed factor.
    transposed = item_vectors.T

    def chunk(carry: Any, inputs: tuple[jax.Array, jax.Array, jax.Array, Any]) -> tuple[Any, jax.Array]:
        vectors_gradient, bias_gradient, total = carry
        query, index, valid, excluded = inputs
        logits = query @ transposed + item_bias
        if excluded is not None:
            logits = logits.at[jnp.arange(CHUNK)[:, None], excluded].set(NEVER)
        highest = jnp.max(logits, axis=1)  # subtracted so that exp cannot overflow
        exponentials = jnp.exp(logits - highest[:, None])
        normalizer = jnp.sum(exponentials, axis=1)
        target_logit = jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0]
        losses = highest + jnp.log(normalizer) - target_logit
        # The gradient of the logits is `scale * difference`; scaling the small factors spares a pass over the items.
        scale = jnp.where(valid, 1.0 / normalizer, 0.0)
        difference = exponentials.at[jnp.arange(CHUNK), index].add(-normalizer)
        carry = (
            vectors_gradient + (query * scale[:, None]).T @ difference,
            bias_gradient + scale @ difference,
            total + jnp.sum(jnp.where(valid, losses, 0.0)),
        )
        return carry, (difference @ item_vectors) * scale[:, None]

    zeros = (jnp.zeros_like(transposed), jnp.zeros_like(item_bias), jnp.zeros((), queries.dtype))
    chunks = jax.tree.map(lambda x: x.reshape(-1, CHUNK, *x.shape[1:]), (queries, target, where, exclude))
    (vectors_gradient, bias_gradient, total), query_gradients = jax.lax.scan(chunk, zeros, chunks)
    count = jnp.maximum(jnp.sum(where), 1)
    gradients = (query_gradients.reshape(queries.shape) / count, vectors_gradient.T / count, bias_gradient / count)
    return total / count, gradients


def _backward(
    gradients: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    of_queries, of_vectors, of_bias = gradients
    return of_queries * cotangent, of_vectors * cotangent, of_bias * cotangent, None, None, None


_chunked_loss.defvjp(_loss_and_gradients, _backward)
