"""Training losses. `where` marks valid entries; sums are divided by their number, never by the padded length."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrec.models.features import Array

CHUNK = 256  # positions whose logits exist at the same time: few enough for the cache, many enough for the product


def next_item_loss(
    queries: jax.Array, item_vectors: jax.Array, item_bias: jax.Array, target: Array, where: Array
) -> jax.Array:
    """Mean full-softmax cross-entropy (nats) of the next item over valid positions; 0 where there are none.

    queries [..., width], item_vectors [items + 1, width], item_bias [items + 1], target [...] int32, where [...] bool.

    The logits of CHUNK positions at a time are computed, turned into the chunk's gradients (softmax minus one-hot)
    in the same pass, and forgotten: no [..., items] array is kept for the backward pass.
    """
    width = queries.shape[-1]
    flat, targets, valid = queries.reshape(-1, width), jnp.ravel(target), jnp.ravel(where)
    missing = -len(flat) % CHUNK
    return _chunked_loss(
        jnp.pad(flat, ((0, missing), (0, 0))),
        item_vectors,
        item_bias,
        jnp.pad(targets, (0, missing)),
        jnp.pad(valid, (0, missing)),
    )


@jax.custom_vjp
def _chunked_loss(
    queries: jax.Array, item_vectors: jax.Array, item_bias: jax.Array, target: jax.Array, where: jax.Array
) -> jax.Array:
    return _loss_and_gradients(queries, item_vectors, item_bias, target, where)[0]


def _loss_and_gradients(
    queries: jax.Array, item_vectors: jax.Array, item_bias: jax.Array, target: jax.Array, where: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """The loss, and its gradients with respect to queries, item vectors and item bias."""

    def chunk(carry: Any, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        vectors_gradient, bias_gradient, total = carry
        query, index, valid = inputs
        logits = query @ item_vectors.T + item_bias
        highest = jnp.max(logits, axis=1, keepdims=True)  # subtracted so that exp cannot overflow
        exponentials = jnp.exp(logits - highest)
        normalizer = jnp.sum(exponentials, axis=1, keepdims=True)
        target_logit = jnp.take_along_axis(logits, index[:, None], axis=1)
        losses = (highest + jnp.log(normalizer) - target_logit)[:, 0]
        scale = jnp.where(valid[:, None], 1.0 / normalizer, 0.0)
        gradient = (exponentials * scale).at[jnp.arange(CHUNK), index].add(-valid.astype(logits.dtype))
        carry = (
            vectors_gradient + gradient.T @ query,
            bias_gradient + jnp.sum(gradient, axis=0),
            total + jnp.sum(jnp.where(valid, losses, 0.0)),
        )
        return carry, gradient @ item_vectors

    zeros = (jnp.zeros_like(item_vectors), jnp.zeros_like(item_bias), jnp.zeros((), queries.dtype))
    chunks = (queries.reshape(-1, CHUNK, queries.shape[1]), target.reshape(-1, CHUNK), where.reshape(-1, CHUNK))
    (vectors_gradient, bias_gradient, total), query_gradients = jax.lax.scan(chunk, zeros, chunks)
    count = jnp.maximum(jnp.sum(where), 1)
    gradients = (query_gradients.reshape(queries.shape) / count, vectors_gradient / count, bias_gradient / count)
    return total / count, gradients


def _backward(
    gradients: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    of_queries, of_vectors, of_bias = gradients
    return of_queries * cotangent, of_vectors * cotangent, of_bias * cotangent, None, None


_chunked_loss.defvjp(_loss_and_gradients, _backward)
