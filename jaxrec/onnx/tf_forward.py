"""The forward pass of `jaxrec.models.hybrid.Hybrid` in TensorFlow, written so that tf2onnx makes good ONNX of it.

Importing this module imports TensorFlow; only `jaxrec.onnx.convert` does, while it converts.

Two things differ from a plain TensorFlow program. The items' arrays are inputs here and become weights of the ONNX
file after the conversion, so that the largest matrices pass through no optimizer and are stored once. And the loop of
the LSTM knows no lengths, because with them tf2onnx would leave it a loop: the conversion hands them to the fused
operator, and TensorFlow itself would be right about rows without padding only.
"""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.features import GAP_EDGES
from jaxrec.models.masks import NEVER
from jaxrec.models.new_items import FIRST_PLACES, GAP
from jaxrec.models.reranker import (
    CANDIDATES,
    COMPARED,
    CONTEXT_LIMIT,
    FEATURE_LIMIT,
    LEAST_COOCCURRENCE,
    RATING_PRIOR,
    RerankerTables,
)
from jaxrec.models.summary import DECAY, NUMBERS, SESSION_S
from jaxrec.models.trend import EVENTS_AT_ONE, LEAST_EVENTS
from jaxrec.onnx.weights import RECENT_WEIGHTS, LSTMWeights, PolicyWeights, RerankerArrays, Weights


class ItemArrays(NamedTuple):
    """`vectors` [items + 1, width], `bias` [items + 1], `neighbours` [items + 1, neighbours] int32 and their weights,
    `closeness`, of the same shape; `new` [items + 1] bool, None without new items; `reranker`: what it looks up, None
    without one."""

    vectors: Any
    bias: Any
    neighbours: Any
    closeness: Any
    new: Any = None
    reranker: RerankerTables | None = None


def item_arrays(named: dict[str, Any]) -> ItemArrays:
    """The arrays by the names of the graph's initializers."""
    return ItemArrays(
        named["item_vectors"],
        named["item_bias"],
        named["neighbour_item"],
        named["neighbour_weight"],
        named.get("new_items"),
        RerankerTables(*(named[name] for name in RerankerTables._fields)) if "encoder" in named else None,
    )


# Every weight is a NumPy array that becomes a constant inside the traced function; tf2onnx turns tensors that were
# made outside of it into inputs of the graph.


def sequence(
    weights: Weights,
    items: ItemArrays,
    *,
    item: Any,
    rating: Any,
    gap: Any,
    length: Any,
    request_gap: Any,
    trend: Any,
    exclude: Any,
    blocked: Any,
    k: Any,
    **seen: Any,
) -> dict[str, Any]:
    """A batch of histories -> state, items, scores. `seen`: the inputs of models that allow items of the history."""
    vectors = tf.gather(items.vectors, tf.transpose(item))
    recurrent, recent = _read(weights, vectors, item, rating, gap, length)
    summary = None if items.reranker is None else _summary(items.reranker, item, rating, gap, length)
    asked = _query(weights, recurrent, request_gap), recent, summary, request_gap
    best, scores = _answer(weights, items, *asked, trend, exclude, blocked, k, **seen)
    return {"state": _state(recurrent, recent, summary), "items": best, "scores": scores}


def step(
    weights: Weights,
    items: ItemArrays,
    *,
    state: Any,
    item: Any,
    rating: Any,
    gap: Any,
    request_gap: Any,
    trend: Any,
    exclude: Any,
    blocked: Any,
    k: Any,
    **seen: Any,
) -> dict[str, Any]:
    """A batch of states and one event for each -> next_state, items, scores; `seen` as above."""
    recurrent, recent = _step(weights, state, tf.gather(items.vectors, item), item, rating, gap)
    summary = None
    if items.reranker is not None:
        before = state[:, weights.recurrent_width : -RECENT_ITEMS]
        summary = _next_summary(before, tf.gather(items.reranker.encoder, item), rating, gap)
    asked = _query(weights, recurrent, request_gap), recent, summary, request_gap
    best, scores = _answer(weights, items, *asked, trend, exclude, blocked, k, **seen)
    return {"next_state": _state(recurrent, recent, summary), "items": best, "scores": scores}


def sequence_query(
    weights: Weights, *, vector: Any, item: Any, rating: Any, gap: Any, length: Any, request_gap: Any
) -> dict[str, Any]:
    """`sequence` without the items' arrays: a batch of histories and their items' vectors -> state, query."""
    recurrent, recent = _read(weights, tf.transpose(vector, [1, 0, 2]), item, rating, gap, length)
    return {"state": _state(recurrent, recent), "query": _query(weights, recurrent, request_gap)}


def step_query(
    weights: Weights, *, state: Any, vector: Any, item: Any, rating: Any, gap: Any, request_gap: Any
) -> dict[str, Any]:
    """`step` without the items' arrays -> next_state, query."""
    recurrent, recent = _step(weights, state, vector, item, rating, gap)
    return {"next_state": _state(recurrent, recent), "query": _query(weights, recurrent, request_gap)}


def trend(weights: Weights, *, counts: Any) -> dict[str, Any]:
    """`jaxrec.models.trend.Trend`: decayed counts [half-lives, items + 1] -> trend [items + 1]."""
    typical = tf.constant(weights.trend.typical[:, None])
    total = tf.reduce_sum(counts, axis=1, keepdims=True)
    scaled = counts * (2 * typical / tf.maximum(total + typical, np.float32(LEAST_EVENTS)))
    views = tf.stack([tf.math.log(1 + scaled / np.float32(EVENTS_AT_ONE)), tf.sqrt(scaled)])
    return {"trend": tf.reduce_sum(tf.constant(weights.trend.views[:, :, None]) * views, axis=[0, 1])}


def _read(weights: Weights, vectors: Any, item: Any, rating: Any, gap: Any, length: Any) -> tuple[Any, Any]:
    """Whole histories, vectors [length, batch, width] -> what is recurrent of the state, and the recent items."""
    batch = tf.shape(item)[0]
    nothing = tf.zeros([batch, weights.recurrent_width])
    recurrent = _advance(weights, nothing, vectors, tf.transpose(rating), tf.transpose(gap))
    timeline = tf.concat([tf.zeros([batch, RECENT_ITEMS], tf.int32), item], axis=1)
    places = tf.expand_dims(length, 1) + (RECENT_ITEMS - 1 - np.arange(RECENT_ITEMS, dtype=np.int32))
    return recurrent, tf.gather(timeline, places, batch_dims=1)


def _step(weights: Weights, state: Any, vector: Any, item: Any, rating: Any, gap: Any) -> tuple[Any, Any]:
    """One event each, vector [batch, width] -> as `_read`."""
    event = (tf.expand_dims(column, 0) for column in (vector, rating, gap))
    recurrent = _advance(weights, state[:, : weights.recurrent_width], *event)
    return recurrent, tf.concat([tf.expand_dims(item, 1), tf.cast(state[:, -RECENT_ITEMS:-1], tf.int32)], axis=1)


def _state(recurrent: Any, recent: Any, summary: Any = None) -> Any:
    parts = [recurrent] if summary is None else [recurrent, summary]
    return tf.concat([*parts, tf.cast(recent, tf.float32)], axis=1)


def _summary(tables: RerankerTables, item: Any, rating: Any, gap: Any, length: Any) -> Any:
    """`jaxrec.models.summary` of whole histories [batch, length] -> [batch, 2 * rank + NUMBERS]."""
    place = tf.expand_dims(tf.range(tf.shape(item)[1]), 0)
    count = tf.expand_dims(length, 1)
    where = place < count
    real = tf.cast(where, tf.float32)
    code = tf.gather(tables.encoder, item)
    later = tf.cast(tf.maximum(count - 1 - place, 0), tf.float32)
    weights = tf.stack([real, real * tf.exp(later * np.float32(np.log(DECAY)))], axis=1)
    codes = tf.matmul(weights, code)
    begins = tf.logical_and(where, tf.logical_or(gap < 0, gap > np.float32(SESSION_S)))
    begin = tf.reduce_max(tf.where(begins, place, 0), axis=1)
    rated = tf.cast(tf.logical_and(where, rating >= 0), tf.float32)
    last = tf.cast(place == count - 1, tf.float32)
    numbers = [
        tf.cast(length, tf.float32),
        tf.cast(length - begin, tf.float32),
        tf.reduce_sum(last * tf.maximum(gap, 0.0), axis=1),
        tf.reduce_sum(rated, axis=1),
        tf.reduce_sum(rated * rating, axis=1),
        tf.reduce_sum(last * rating, axis=1),
    ]
    return tf.concat([codes[:, 0], codes[:, 1], tf.stack(numbers, axis=1)], axis=1)


def _next_summary(before: Any, code: Any, rating: Any, gap: Any) -> Any:
    """The summary after one more event, as `jaxrec.models.summary.updated`."""
    rank = code.shape[1]
    events, session, _, rated, ratings, _ = tf.unstack(before[:, 2 * rank :], NUMBERS, axis=1)
    is_rated = tf.cast(rating >= 0, tf.float32)
    continues = tf.logical_and(gap >= 0, gap <= np.float32(SESSION_S))
    numbers = [
        events + 1,
        tf.where(continues, session, 0.0) + 1,
        tf.maximum(gap, 0.0),
        rated + is_rated,
        ratings + is_rated * rating,
        rating,
    ]
    codes = [before[:, :rank] + code, np.float32(DECAY) * before[:, rank : 2 * rank] + code]
    return tf.concat([*codes, tf.stack(numbers, axis=1)], axis=1)


def _advance(weights: Weights, state: Any, vectors: Any, rating: Any, gap: Any) -> Any:
    """h and c of both models [batch, 4 * hidden] after the events, [length, batch] as the LSTM wants them."""
    views = [
        vectors,
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


def _query(weights: Weights, recurrent: Any, request_gap: Any) -> Any:
    """[batch, width]: what the items' vectors are multiplied with, the policy's shift included unless there is a
    reranker."""
    h_lstm, _, h_content, _ = tf.split(recurrent, 4, axis=1)
    bucket = _gap_bucket(request_gap)
    scale, shift = tf.gather(weights.request_scale, bucket), tf.gather(weights.request_shift, bucket)
    hidden = tf.concat([h_lstm, h_content], axis=1) * scale + shift
    query = tf.matmul(hidden, weights.projection) + weights.projection_bias
    if weights.policy is None or weights.reranker is not None:
        return query
    return query + _policy_shift(weights.policy, query)


def _answer(
    weights: Weights,
    items: ItemArrays,
    query: Any,
    recent: Any,
    summary: Any,
    request_gap: Any,
    trend: Any,
    exclude: Any,
    blocked: Any,
    k: Any,
    seen: Any = None,
    seen_score: Any = None,
) -> tuple[Any, Any]:
    """The k best items [batch, k] int32 and their logits. `seen_score` is added to those of `seen`, where there are.
    Items of `exclude` and of `blocked` ([1 or batch, items + 1] bool) are NEVER."""
    logits = tf.matmul(query, items.vectors, transpose_b=True) + items.bias
    neighbours = tf.reshape(tf.gather(items.neighbours, recent), [-1, RECENT_ITEMS * items.neighbours.shape[1]])
    decays = RECENT_WEIGHTS[:, None]
    closeness = tf.reshape(tf.gather(items.closeness, recent) * decays, tf.shape(neighbours))
    cooccurrence = None
    if items.reranker is None:
        logits = tf.tensor_scatter_nd_add(logits, _places(neighbours), closeness) + trend
    else:
        cooccurrence = tf.tensor_scatter_nd_add(tf.zeros_like(logits), _places(neighbours), closeness)
        logits = logits + cooccurrence + trend
    if seen is not None:
        logits = tf.tensor_scatter_nd_add(logits, _places(seen), seen_score)
    never = tf.fill(tf.shape(exclude), np.float32(NEVER))
    logits = tf.tensor_scatter_nd_update(logits, _places(exclude), never)
    logits = tf.where(blocked, np.float32(NEVER), logits)
    new = None if items.new is None else tf.logical_and(items.new, tf.equal(trend, 0.0))
    if weights.reranker is not None:
        logits = _reranked(
            weights.reranker, items, logits, new, cooccurrence, trend, query, request_gap, recent, summary
        )
        if weights.policy is not None:
            shift = tf.matmul(_policy_shift(weights.policy, query), items.vectors, transpose_b=True)
            logits = logits + shift + weights.policy.item_bias
    if new is not None:
        logits = _capped(logits, new)
    # Without the column of the padding, which so cannot be an answer even when all others are excluded.
    scores, columns = tf.math.top_k(logits[:, 1:], tf.squeeze(k, 0))
    return columns + 1, scores


def _reranked(
    reranker: RerankerArrays,
    items: ItemArrays,
    logits: Any,
    new: Any,
    cooccurrence: Any,
    trend: Any,
    query: Any,
    request_gap: Any,
    recent: Any,
    summary: Any,
) -> Any:
    """`jaxrec.models.reranker`: the logits, NEVER at what is excluded, with those of the candidates replaced."""
    tables = items.reranker
    assert tables is not None
    allowed = logits if new is None else tf.where(new, np.float32(NEVER), logits)
    mix, best = tf.math.top_k(allowed[:, 1:], min(CANDIDATES, items.vectors.shape[0] - 1))
    best = best + 1
    where = mix > NEVER / 2
    real = tf.cast(where, tf.float32)
    width, rank = items.vectors.shape[1], tables.encoder.shape[1]
    halves = tf.gather(items.vectors, best) * tf.expand_dims(query, 1)
    bias = tf.gather(tables.part_bias, best)
    lstm = tf.reduce_sum(halves[:, :, : width // 2], axis=2) + bias[:, :, 0]
    content = tf.reduce_sum(halves[:, :, width // 2 :], axis=2) + bias[:, :, 1]
    of_cooccurrence = tf.gather(cooccurrence, best, batch_dims=1)
    decoder, genres = tf.gather(tables.decoder, best), tf.gather(tables.genres, best)
    of_recent = tf.gather(tables.genres, recent)
    known = tf.maximum(tf.reduce_sum(tf.cast(recent > 0, tf.float32), axis=1, keepdims=True), 1.0)
    ratings = tf.gather(tables.item_rating, best)
    features = tf.stack(
        [
            tf.where(where, mix, 0.0),
            lstm,
            content,
            of_cooccurrence,
            tf.math.log(of_cooccurrence + np.float32(LEAST_COOCCURRENCE)),
            tf.gather(trend, best),
            _products(decoder, summary[:, :rank]),
            _products(decoder, summary[:, rank : 2 * rank]),
            _products(genres, of_recent[:, 0]),
            _products(genres, tf.reduce_sum(of_recent, axis=1) / known),
            ratings,
        ],
        axis=2,
    )
    mask = tf.expand_dims(real, 2)
    count = tf.maximum(tf.reduce_sum(mask, axis=1, keepdims=True), 1.0)
    features = mask * (features - tf.reduce_sum(mask * features, axis=1, keepdims=True) / count)
    scales = reranker.scales
    features = tf.clip_by_value(features / scales.features, -FEATURE_LIMIT, FEATURE_LIMIT)
    context = _context(tables, lstm, content, where, request_gap, summary[:, 2 * rank :])
    context = tf.clip_by_value((context - scales.context_mean) / scales.context, -CONTEXT_LIMIT, CONTEXT_LIMIT)
    by_request = reranker.weights.direct + tf.matmul(context, reranker.weights.by_context)
    scores = mix + _products(features, by_request)
    of_scores, of_mix = (
        tf.reduce_logsumexp(tf.where(where, x, np.float32(NEVER)), axis=1, keepdims=True) for x in (scores, mix)
    )
    new_logits = tf.where(where, scores - of_scores + of_mix, tf.gather(logits, best, batch_dims=1))
    return tf.tensor_scatter_nd_update(logits, _places(best), new_logits)


def _context(tables: RerankerTables, lstm: Any, content: Any, where: Any, request_gap: Any, numbers: Any) -> Any:
    """[batch, CONTEXT], not scaled; `numbers` [batch, NUMBERS] of the summary."""
    events, session, gap, rated, total, last = tf.unstack(numbers, NUMBERS, axis=1)
    timed = request_gap >= 0
    user_rating = (total + np.float32(RATING_PRIOR) * tables.item_rating[0]) / (rated + np.float32(RATING_PRIOR))
    of_lstm, of_content = (tf.nn.log_softmax(tf.where(where, x, np.float32(NEVER))) for x in (lstm, content))
    first = where[:, :COMPARED]
    apart = tf.where(first, tf.abs(of_lstm - of_content)[:, :COMPARED], 0.0)
    compared = tf.maximum(tf.reduce_sum(tf.cast(first, tf.float32), axis=1), 1.0)
    entropies = (-tf.reduce_sum(tf.where(where, tf.exp(p) * p, 0.0), axis=1) for p in (of_lstm, of_content))
    columns = [
        tf.cast(timed, tf.float32),
        tf.math.log(1 + tf.where(timed, request_gap, 0.0)),
        tf.math.log(1 + events),
        tf.math.log(1 + gap),
        tf.math.log(1 + session),
        user_rating,
        tf.where(last >= 0, last, user_rating),
        *entropies,
        tf.reduce_sum(apart, axis=1) / compared,
    ]
    return tf.stack(columns, axis=1)


def _products(rows: Any, vector: Any) -> Any:
    """rows [batch, n, width] and vector [batch, width] -> [batch, n]."""
    return tf.squeeze(tf.matmul(rows, tf.expand_dims(vector, 2)), 2)


def _capped(logits: Any, new: Any) -> Any:
    """`jaxrec.models.new_items.capped_logits` of logits in which what is excluded is NEVER."""
    known = tf.where(new, np.float32(NEVER), logits)[:, 1:]
    best = tf.math.top_k(known, min(FIRST_PLACES, known.shape[1])).values
    last = tf.reduce_min(tf.where(best > NEVER / 2, best, np.float32(np.inf)), axis=1, keepdims=True)
    above = tf.maximum(logits - last, 0.0)
    capped = tf.minimum(logits, last - 2 * GAP) + GAP * above / (1 + above)
    return tf.where(new, capped, logits)


def _places(items: Any) -> Any:
    """items [batch, width] -> [batch, width, 2]: their places (row, item) among the logits."""
    rows = tf.broadcast_to(tf.expand_dims(tf.range(tf.shape(items)[0]), 1), tf.shape(items))
    return tf.stack([rows, items], axis=2)


def _policy_shift(policy: PolicyWeights, query: Any) -> Any:
    inner = tf.nn.relu(tf.matmul(query, policy.inner_kernel) + policy.inner_bias)
    return tf.matmul(inner, policy.outer_kernel) + policy.outer_bias
