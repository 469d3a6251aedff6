"""The forward pass of `jaxrec.models.hybrid.Hybrid` in TensorFlow, written so that tf2onnx makes good ONNX of it.

Importing this module imports TensorFlow; only `jaxrec.export.convert` does, while it converts.

Two things differ from a plain TensorFlow program. The items' arrays are inputs here and become weights of the ONNX
file after the conversion, so that the largest matrix passes through no optimizer and is stored once. And the loop of
the LSTM knows no lengths, because with them tf2onnx would leave it a loop: the conversion hands them to the fused
operator, and TensorFlow itself would be right about rows without padding only.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from jaxrec.export.weights import LSTMWeights, PolicyWeights, Weights
from jaxrec.models.features import GAP_EDGES
from jaxrec.models.sequence import NEVER

# Every weight is a NumPy array that becomes a constant inside the traced function; tf2onnx turns tensors that were
# made outside of it into inputs of the graph.


def sequence(
    weights: Weights,
    *,
    item_vectors: Any,
    item_bias: Any,
    item: Any,
    rating: Any,
    gap: Any,
    request_gap: Any,
    exclude: Any,
    k: Any,
) -> dict[str, Any]:
    """A batch of histories -> state, items, scores."""
    nothing = tf.zeros([tf.shape(item)[0], weights.state_width])
    state = _advance(weights, item_vectors, nothing, tf.transpose(item), tf.transpose(rating), tf.transpose(gap))
    items, scores = _answer(weights, item_vectors, item_bias, state, request_gap, exclude, k)
    return {"state": state, "items": items, "scores": scores}


def step(
    weights: Weights,
    *,
    item_vectors: Any,
    item_bias: Any,
    state: Any,
    item: Any,
    rating: Any,
    gap: Any,
    request_gap: Any,
    exclude: Any,
    k: Any,
) -> dict[str, Any]:
    """A batch of states and one event for each -> next_state, items, scores."""
    event = (tf.expand_dims(column, 0) for column in (item, rating, gap))
    state = _advance(weights, item_vectors, state, *event)
    items, scores = _answer(weights, item_vectors, item_bias, state, request_gap, exclude, k)
    return {"next_state": state, "items": items, "scores": scores}


def _advance(weights: Weights, item_vectors: Any, state: Any, item: Any, rating: Any, gap: Any) -> Any:
    """The state [batch, 4 * hidden] after the events, [length, batch] as the LSTM wants them."""
    views = [
        tf.gather(item_vectors, item),
        _rating_vectors(weights, tf.expand_dims(rating, -1)),
        tf.gather(weights.gap_vectors, _gap_bucket(gap)),
    ]
    of_lstm, of_content = zip(*(tf.split(view, 2, axis=2) for view in views), strict=True)
    h_lstm, c_lstm, h_content, c_content = tf.split(state, 4, axis=1)
    lstm_state = _lstm(weights.lstm, tf.concat(of_lstm, axis=2), h_lstm, c_lstm)
    content_state = _lstm(weights.content, tf.concat(of_content, axis=2), h_content, c_content)
    return tf.concat([*lstm_state, *content_state], axis=1)


def _rating_vectors(weights: Weights, rating: Any) -> Any:
    return tf.where(rating < 0, weights.rating_missing, rating * weights.rating_slope + weights.rating_offset)


def _gap_bucket(gap: Any) -> Any:
    return tf.reduce_sum(tf.cast(tf.expand_dims(gap, -1) >= GAP_EDGES, tf.int32), axis=-1)


def _lstm(weights: LSTMWeights, x: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """Final (h, c) [batch, hidden] of x [length, batch, inputs].

    tf2onnx knows an LSTM by this very shape of the loop, down to the order of the factors and the outputs that
    nobody reads.
    """
    length = tf.shape(x)[0]
    inputs = tf.TensorArray(tf.float32, size=length).unstack(x)
    outputs = tf.TensorArray(tf.float32, size=length)
    kernel, recurrent_kernel = tf.constant(weights.kernel), tf.constant(weights.recurrent_kernel)
    bias = tf.constant(weights.bias)

    def body(t: Any, outputs: Any, h_tm1: Any, c_tm1: Any) -> tuple[Any, Any, Any, Any]:
        gates = tf.nn.bias_add(tf.matmul(inputs.read(t), kernel) + tf.matmul(h_tm1, recurrent_kernel), bias)
        i, f, g, o = tf.split(gates, 4, axis=1)
        c_t = tf.sigmoid(f) * c_tm1 + tf.sigmoid(i) * tf.tanh(g)
        h_t = tf.sigmoid(o) * tf.tanh(c_t)
        return t + 1, outputs.write(t, h_t), h_t, c_t

    _, _, h, c = tf.while_loop(lambda t, *_: t < length, body, (0, outputs, h, c))
    return h, c


def _answer(
    weights: Weights, item_vectors: Any, item_bias: Any, state: Any, request_gap: Any, exclude: Any, k: Any
) -> tuple[Any, Any]:
    """The k best items [batch, k] int32 and their logits."""
    h_lstm, _, h_content, _ = tf.split(state, 4, axis=1)
    scale = tf.gather(weights.request_scale, _gap_bucket(request_gap))
    query = tf.matmul(tf.concat([h_lstm, h_content], axis=1) * scale, weights.projection) + weights.projection_bias
    if weights.policy is not None:
        query += _policy_shift(weights.policy, query)
    logits = tf.matmul(query, item_vectors, transpose_b=True) + item_bias
    rows = tf.broadcast_to(tf.expand_dims(tf.range(tf.shape(exclude)[0]), 1), tf.shape(exclude))
    never = tf.fill(tf.shape(exclude), np.float32(NEVER))
    logits = tf.tensor_scatter_nd_update(logits, tf.stack([rows, exclude], axis=2), never)
    # Without the column of the padding, which so cannot be an answer even when all others are excluded.
    scores, columns = tf.math.top_k(logits[:, 1:], tf.squeeze(k, 0))
    return columns + 1, scores


def _policy_shift(policy: PolicyWeights, query: Any) -> Any:
    inner = tf.nn.relu(tf.matmul(query, policy.inner_kernel) + policy.inner_bias)
    return tf.matmul(inner, policy.outer_kernel) + policy.outer_bias
