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
    CONTEXT,
    CONTEXT_LIMIT,
    FEATURE_LIMIT,
    LEAST_COOCCURRENCE,
    RATING_PRIOR,
)
from jaxrec.models.summary import DECAY, NUMBERS, SESSION_S
from jaxrec.models.trend import EVENTS_AT_ONE, LEAST_EVENTS
from jaxrec.onnx.weights import RECENT_WEIGHTS, LSTMWeights, PolicyWeights, RerankerArrays, RerankerItems, Weights


class ItemArrays(NamedTuple):
    """`vectors` [items + 1, width], `bias` [items + 1], `neighbours` [items + 1, neighbours] int32 and their weights,
    `closeness`, of the same shape; `new` [items + 1] bool, None without new items; `reranker`: what it looks up, None
    without one."""

    vectors: Any
    bias: Any
    neighbours: Any
    closeness: Any
    new: Any = None
    reranker: RerankerItems | None = None


def item_arrays(named: dict[str, Any]) -> ItemArrays:
    """The arrays by the names of the graph's initializers."""
    return ItemArrays(
        named["item_vectors"],
        named["item_bias"],
        named["neighbour_item"],
        named["neighbour_weight"],
        named.get("new_items"),
        RerankerItems(*(named[name] for name in RerankerItems._fields)) if "encoder" in named else None,
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


def _summary(tables: RerankerItems, item: Any, rating: Any, gap: Any, length: Any) -> Any:
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
    rating, gap = tf.expand_dims(rating, 1), tf.expand_dims(gap, 1)
    is_rated = tf.cast(rating >= 0, tf.float32)
    continues = tf.cast(tf.logical_and(gap >= 0, gap <= np.float32(SESSION_S)), tf.float32)
    of_event = tf.concat([continues, tf.maximum(gap, 0.0), is_rated, is_rated * rating, rating], axis=1)
    stays, added = tf.split(tf.matmul(of_event, _BY_EVENT) + _ALWAYS, 2, axis=1)
    codes, numbers = tf.split(before, [2 * rank, NUMBERS], axis=1)
    kept = np.repeat(np.array([1, DECAY], np.float32), rank)
    return tf.concat([codes * kept + tf.concat([code, code], axis=1), numbers * stays + added], axis=1)


_BY_EVENT = np.zeros((5, 2 * NUMBERS), np.float32)
_BY_EVENT[np.arange(5), [1, NUMBERS + 2, NUMBERS + 3, NUMBERS + 4, NUMBERS + 5]] = 1
_ALWAYS = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0], np.float32)
"""What stays of the six numbers of a summary, and what is added to them: events, session, gap, rated, ratings, last
rating. _BY_EVENT [5, 2 * NUMBERS] is for whether the session continues, the gap, whether there is a rating, the rating
or 0, and the rating."""


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
    """`jaxrec.models.reranker`: the logits, NEVER at what is excluded, with those of the candidates replaced.

    Every operator of the graph costs a microsecond or more, which is a lot beside so few numbers. So what is alike is
    computed side by side.
    """
    assert items.reranker is not None
    allowed = logits if new is None else tf.where(new, np.float32(NEVER), logits)
    mix, columns = tf.math.top_k(allowed[:, 1:], min(CANDIDATES, items.vectors.shape[0] - 1))
    best = columns + 1
    places = _places(best)
    where = mix > NEVER / 2
    real = tf.cast(where, tf.float32)
    count = tf.maximum(tf.reduce_sum(real, axis=1, keepdims=True), 1.0)
    width, rank = items.vectors.shape[1], reranker.rank
    genres = items.reranker.candidate.shape[1] - rank - 3
    decoder, of_genres, biases, ratings = tf.split(
        tf.gather(items.reranker.candidate, best), [rank, genres, 2, 1], axis=2
    )
    products = tf.gather(items.vectors, best) * tf.expand_dims(query, 1)
    halves = tf.reduce_sum(tf.reshape(products, [-1, mix.shape[1], 2, width // 2]), axis=3)
    halves = halves + biases
    of_cooccurrence = tf.expand_dims(tf.gather_nd(cooccurrence, places), 2)
    codes = _columns(summary[:, : 2 * rank], rank)
    features = tf.concat(
        [
            tf.expand_dims(mix * real, 2),
            halves,
            of_cooccurrence,
            tf.math.log(of_cooccurrence + np.float32(LEAST_COOCCURRENCE)),
            tf.expand_dims(tf.gather(trend, best), 2),
            tf.matmul(decoder, codes),
            tf.matmul(of_genres, _recent_genres(items.reranker, recent, rank, rank + genres)),
            ratings,
        ],
        axis=2,
    )
    means = tf.matmul(tf.expand_dims(real / count, 1), features)
    features = (features - means) * (1 / reranker.scales.features)
    features = tf.clip_by_value(features, -FEATURE_LIMIT, FEATURE_LIMIT)
    context = _context(reranker, halves, where, real, request_gap, summary[:, 2 * rank :])
    by_request = tf.matmul(context, reranker.weights.by_context[_CONTEXT_ORDER]) + reranker.weights.direct
    scores = mix + tf.squeeze(tf.matmul(features, tf.expand_dims(by_request, 2)), 2)
    moved = _minus_logsumexp(tf.where(where, scores, np.float32(NEVER))) - _minus_logsumexp(mix)
    return tf.tensor_scatter_nd_add(logits, places, tf.where(where, scores - mix + moved, 0.0))


def _recent_genres(items: RerankerItems, recent: Any, first: int, last: int) -> Any:
    """[batch, genres, 2]: the genres of the last item, and the mean of those of the recent ones."""
    of_recent = tf.gather(items.candidate, recent)[:, :, first:last]
    is_one = tf.cast(recent > 0, tf.float32)
    share = is_one / tf.maximum(tf.reduce_sum(is_one, axis=1, keepdims=True), 1.0)
    is_last = tf.expand_dims(is_one, 2) * np.eye(RECENT_ITEMS, 1, dtype=np.float32)
    weights = tf.concat([is_last, tf.expand_dims(share, 2)], axis=2)
    return tf.matmul(of_recent, weights, transpose_a=True)


def _columns(row: Any, width: int) -> Any:
    """row [batch, 2 * width] -> [batch, width, 2]: its halves side by side."""
    return tf.transpose(tf.reshape(row, [-1, 2, width]), [0, 2, 1])


def _minus_logsumexp(logits: Any) -> Any:
    """[batch, 1]."""
    largest = tf.reduce_max(logits, axis=1, keepdims=True)
    return -largest - tf.math.log(tf.reduce_sum(tf.exp(logits - largest), axis=1, keepdims=True))


_CONTEXT_ORDER = np.array(
    [
        CONTEXT.index(name)
        for name in (
            "timed",
            "log_request_gap",
            "log_events",
            "log_session",
            "log_gap",
            "user_rating",
            "last_rating",
            "lstm_entropy",
            "content_entropy",
            "disagreement",
        )
    ]
)
"""The context's order in the graph, in which neighbours are computed alike."""


def _context(reranker: RerankerArrays, halves: Any, where: Any, real: Any, request_gap: Any, numbers: Any) -> Any:
    """[batch, CONTEXT], scaled, in _CONTEXT_ORDER; `numbers` [batch, NUMBERS] of the summary."""
    request_gap = tf.expand_dims(request_gap, 1)
    timed = tf.cast(request_gap >= 0, tf.float32)
    rated, ratings, last = numbers[:, 3:4], numbers[:, 4:5], numbers[:, 5:]
    user_rating = (ratings + np.float32(RATING_PRIOR * reranker.mean_rating)) / (rated + np.float32(RATING_PRIOR))
    # Of both models [batch, 2, candidates]; the product of a probability of 0 with its logarithm is 0.
    log_p = tf.nn.log_softmax(tf.where(tf.expand_dims(where, 1), tf.transpose(halves, [0, 2, 1]), np.float32(NEVER)))
    first = real[:, :COMPARED]
    apart = tf.abs(tf.reduce_sum(log_p[:, :, :COMPARED] * np.array([[1], [-1]], np.float32), axis=1))
    apart = tf.reduce_sum(first * apart, axis=1, keepdims=True)
    context = tf.concat(
        [
            timed,
            tf.math.log(tf.concat([tf.maximum(request_gap, 0.0), numbers[:, :3]], axis=1) + 1.0),
            user_rating,
            tf.where(last >= 0, last, user_rating),
            -tf.reduce_sum(tf.exp(log_p) * log_p, axis=2),
            apart / tf.maximum(tf.reduce_sum(first, axis=1, keepdims=True), 1.0),
        ],
        axis=1,
    )
    mean, scale = (values[_CONTEXT_ORDER] for values in (reranker.scales.context_mean, reranker.scales.context))
    return tf.clip_by_value((context - mean) * (1 / scale), -CONTEXT_LIMIT, CONTEXT_LIMIT)


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
