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
    without one. `parts` has `part_bias` [items + 1, 3] in place of the vectors and the bias."""

    neighbours: Any
    closeness: Any
    vectors: Any = None
    bias: Any = None
    new: Any = None
    reranker: RerankerItems | None = None
    part_bias: Any = None


def item_arrays(named: dict[str, Any]) -> ItemArrays:
    """The arrays by the names of the graph's initializers."""
    return ItemArrays(
        named["neighbour_item"],
        named["neighbour_weight"],
        named.get("item_vectors"),
        named.get("item_bias"),
        named.get("new_items"),
        RerankerItems(*(named[name] for name in RerankerItems._fields)) if "encoder" in named else None,
        named.get("part_bias"),
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
    """A batch of histories -> state, items, scores, query. `seen`: the inputs of models that allow items of the
    history."""
    vectors = tf.gather(items.vectors, tf.transpose(item))
    recurrent, recent = _read(weights, vectors, item, rating, gap, length)
    summary = None if items.reranker is None else _summary(items.reranker, item, rating, gap, length)
    asked = _query(weights, recurrent, request_gap), recent, summary, request_gap
    best, scores, query = _answer(weights, items, *asked, trend, exclude, blocked, k, **seen)
    return {"state": _state(recurrent, recent, summary), "items": best, "scores": scores, "query": query}


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
    """A batch of states and one event for each -> next_state, items, scores, query; `seen` as above."""
    recurrent, recent, before = _step(weights, state, tf.gather(items.vectors, item), item, rating, gap)
    summary = None
    if items.reranker is not None:
        codes, numbers = before
        summary = _next_summary(codes, numbers, tf.gather(items.reranker.encoder, item), rating, gap)
    asked = _query(weights, recurrent, request_gap), recent, summary, request_gap
    best, scores, query = _answer(weights, items, *asked, trend, exclude, blocked, k, **seen)
    return {"next_state": _state(recurrent, recent, summary), "items": best, "scores": scores, "query": query}


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
    recurrent, recent, _ = _step(weights, state, vector, item, rating, gap)
    return {"next_state": _state(recurrent, recent), "query": _query(weights, recurrent, request_gap)}


def trend(weights: Weights, *, counts: Any) -> dict[str, Any]:
    """`jaxrec.models.trend.Trend`: decayed counts [half-lives, items + 1] -> trend [items + 1]."""
    typical = tf.constant(weights.trend.typical[:, None])
    total = tf.reduce_sum(counts, axis=1, keepdims=True)
    scaled = counts * (2 * typical / tf.maximum(total + typical, np.float32(LEAST_EVENTS)))
    views = tf.stack([tf.math.log(1 + scaled / np.float32(EVENTS_AT_ONE)), tf.sqrt(scaled)])
    return {"trend": tf.reduce_sum(tf.constant(weights.trend.views[:, :, None]) * views, axis=[0, 1])}


def parts(
    weights: Weights, items: ItemArrays, *, state: Any, request_gap: Any, item: Any, vector: Any
) -> dict[str, Any]:
    """States [batch, width] and items [batch, count] -> parts [batch, count, 4], in the order of
    `jaxrec.onnx.signature.PARTS`."""
    recurrent, recent, _ = _split(weights, state)
    query = _supervised_query(weights, recurrent, request_gap)
    directions = tf.expand_dims(query, 2) * np.repeat(np.eye(2, 3, dtype=np.float32), weights.width // 2, axis=0)
    if weights.policy is not None:
        of_policy = np.array([0, 0, 1], np.float32)
        directions = directions + tf.expand_dims(_policy_shift(weights.policy, query), 2) * of_policy
    of_vectors = tf.matmul(vector, directions) + tf.gather(items.part_bias, item)
    neighbours, closeness = _neighbours(items, recent)
    same = tf.cast(tf.equal(tf.expand_dims(item, 2), tf.expand_dims(neighbours, 1)), tf.float32)
    is_known = tf.expand_dims(tf.minimum(tf.cast(item, tf.float32), 1.0), 2)
    of_cooccurrence = tf.matmul(same, tf.expand_dims(closeness, 2)) * is_known
    return {"parts": tf.concat([of_vectors, of_cooccurrence], axis=2)}


def _read(weights: Weights, vectors: Any, item: Any, rating: Any, gap: Any, length: Any) -> tuple[Any, Any]:
    """Whole histories, vectors [length, batch, width] -> what is recurrent of the state, and the recent items."""
    batch = tf.shape(item)[0]
    nothing = tf.zeros([batch, weights.recurrent_width // 4])
    views = (tf.expand_dims(tf.transpose(column), -1) for column in (rating, gap))
    recurrent = _advance(weights, [nothing] * 4, vectors, *views)
    timeline = tf.concat([tf.zeros([batch, RECENT_ITEMS], tf.int32), item], axis=1)
    ago = tf.expand_dims(length, 1) + (RECENT_ITEMS - 1 - np.arange(RECENT_ITEMS, dtype=np.int32))
    return recurrent, tf.gather_nd(timeline, places(ago))


def _step(weights: Weights, state: Any, vector: Any, item: Any, rating: Any, gap: Any) -> tuple[Any, Any, list[Any]]:
    """One event each, vector [batch, width] -> as `_read`, and the summary before the event, in two parts."""
    recurrent, recent, summary = _split(weights, state)
    views = (tf.reshape(column, [1, -1, 1]) for column in (rating, gap))
    recurrent = _advance(weights, recurrent, tf.expand_dims(vector, 0), *views)
    return recurrent, tf.concat([tf.expand_dims(item, 1), recent[:, :-1]], axis=1), summary


def _split(weights: Weights, state: Any) -> tuple[list[Any], Any, list[Any]]:
    """What is recurrent of a state [batch, width], in four parts, the recent items, and the summary in two parts."""
    summary = [] if weights.reranker is None else [2 * weights.reranker.rank, NUMBERS]
    of_state = tf.split(state, [weights.recurrent_width // 4] * 4 + summary + [RECENT_ITEMS], axis=1)
    return of_state[:4], tf.cast(of_state[-1], tf.int32), of_state[4:-1]


def _state(recurrent: list[Any], recent: Any, summary: tuple[Any, Any] | None = None) -> Any:
    return tf.concat([*recurrent, *(summary or ()), tf.cast(recent, tf.float32)], axis=1)


def _summary(tables: RerankerItems, item: Any, rating: Any, gap: Any, length: Any) -> tuple[Any, Any]:
    """`jaxrec.models.summary` of whole histories [batch, length] -> codes [batch, 2 * rank] and numbers
    [batch, NUMBERS]."""
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
    return tf.reshape(codes, [-1, 2 * code.shape[2]]), tf.stack(numbers, axis=1)


def _next_summary(codes: Any, numbers: Any, code: Any, rating: Any, gap: Any) -> tuple[Any, Any]:
    """The summary after one more event, as `jaxrec.models.summary.updated`."""
    event = tf.stack([rating, gap, gap], axis=1)
    flags = tf.cast(event >= _FLAGS, tf.float32)
    of_event = tf.concat([flags, tf.maximum(event, 0.0), tf.expand_dims(rating, 1)], axis=1)
    stays, added = tf.split(tf.matmul(of_event, _BY_EVENT) + _ALWAYS, 2, axis=1)
    kept = np.repeat(np.array([1, DECAY], np.float32), code.shape[1])
    return codes * kept + tf.concat([code, code], axis=1), numbers * stays + added


_FLAGS = np.array([0, 0, np.nextafter(np.float32(SESSION_S), np.float32(np.inf))], np.float32)
_BY_EVENT = np.zeros((7, 2 * NUMBERS), np.float32)
_BY_EVENT[[1, 2], 1] = 1, -1
_BY_EVENT[[4, 0, 3, 6], NUMBERS + np.arange(2, NUMBERS)] = 1
_ALWAYS = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0], np.float32)
"""What stays of the six numbers of a summary, and what is added to them: events, session, gap, rated, ratings, last
rating. _BY_EVENT [7, 2 * NUMBERS] is for whether there is a rating, whether there is a gap and whether it is longer
than a session's (_FLAGS), for the rating or 0, the gap or 0 twice, and for the rating."""


def _advance(weights: Weights, state: list[Any], vectors: Any, rating: Any, gap: Any) -> list[Any]:
    """h and c of the LSTM and of the content model, each [batch, hidden], after the events: vectors [length, batch,
    width], rating and gap [length, batch, 1], as the LSTM wants them."""
    views = [vectors, _rating_vectors(weights, rating), tf.gather(weights.gap_vectors, _gap_bucket(gap))]
    of_lstm, of_content = zip(*(tf.split(view, 2, axis=2) for view in views), strict=True)
    lstm_state = _lstm(weights.lstm, tf.concat(of_lstm, axis=2), *state[:2])
    content_state = _lstm(weights.content, tf.concat(of_content, axis=2), *state[2:])
    return [*lstm_state, *content_state]


def _rating_vectors(weights: Weights, rating: Any) -> Any:
    return tf.where(rating < 0, weights.rating_missing, rating * weights.rating_slope + weights.rating_offset)


def _gap_bucket(gap: Any) -> Any:
    """gap [..., 1] -> [...]."""
    return tf.reduce_sum(tf.cast(gap >= GAP_EDGES, tf.int32), axis=-1)


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


def _query(weights: Weights, recurrent: list[Any], request_gap: Any) -> Any:
    """[batch, width]: what the items' vectors are multiplied with, the policy's shift included unless there is a
    reranker."""
    query = _supervised_query(weights, recurrent, request_gap)
    if weights.policy is None or weights.reranker is not None:
        return query
    return query + _policy_shift(weights.policy, query)


def _supervised_query(weights: Weights, recurrent: list[Any], request_gap: Any) -> Any:
    h_lstm, _, h_content, _ = recurrent
    bucket = _gap_bucket(tf.expand_dims(request_gap, 1))
    scale, shift = tf.gather(weights.request_scale, bucket), tf.gather(weights.request_shift, bucket)
    hidden = tf.concat([h_lstm, h_content], axis=1) * scale + shift
    return tf.matmul(hidden, weights.projection) + weights.projection_bias


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
) -> tuple[Any, Any, Any]:
    """The k best items [batch, k] int32, their logits, and the query with the policy's shift. `seen_score` is added to
    those of `seen`, where there are. Items of `exclude` and of `blocked` ([1 or batch, items + 1] bool) are NEVER."""
    logits = tf.matmul(query, items.vectors, transpose_b=True) + items.bias
    neighbours, closeness = _neighbours(items, recent)
    cooccurrence = None
    if items.reranker is None:
        logits = tf.tensor_scatter_nd_add(logits, places(neighbours), closeness) + trend
    else:
        cooccurrence = tf.tensor_scatter_nd_add(tf.zeros_like(logits), places(neighbours), closeness)
        logits = logits + cooccurrence + trend
    if seen is not None:
        logits = tf.tensor_scatter_nd_add(logits, places(seen), seen_score)
    never = tf.minimum(tf.cast(exclude, tf.float32), np.float32(NEVER))
    logits = tf.tensor_scatter_nd_update(logits, places(exclude), never)
    logits = tf.where(blocked, np.float32(NEVER), logits)
    new = None if items.new is None else tf.logical_and(items.new, tf.equal(trend, 0.0))
    if weights.reranker is not None:
        logits = _reranked(
            weights.reranker, items, logits, new, cooccurrence, trend, query, request_gap, recent, summary
        )
        if weights.policy is not None:
            shift = _policy_shift(weights.policy, query)
            logits = logits + tf.matmul(shift, items.vectors, transpose_b=True) + weights.policy.item_bias
            query = query + shift
    if new is not None:
        logits = _capped(logits, new)
    # Without the column of the padding, which so cannot be an answer even when all others are excluded.
    scores, columns = tf.math.top_k(logits[:, 1:], tf.squeeze(k, 0))
    return columns + 1, scores, query


def _neighbours(items: ItemArrays, recent: Any) -> tuple[Any, Any]:
    """The neighbours of the recent items [batch, RECENT_ITEMS] side by side, and what is added to their logits."""
    in_one_row = [-1, RECENT_ITEMS * items.neighbours.shape[1]]
    closeness = tf.gather(items.closeness, recent) * RECENT_WEIGHTS[:, None]
    return tf.reshape(tf.gather(items.neighbours, recent), in_one_row), tf.reshape(closeness, in_one_row)


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
    # Padding is NEVER, so it is no real candidate.
    mix, best = tf.math.top_k(allowed, min(CANDIDATES, items.vectors.shape[0] - 1))
    of_best = places(best)
    # [batch, 1, candidates]: 0 where there is a candidate, otherwise far below all scores.
    lack = tf.expand_dims(mix - tf.maximum(mix, np.float32(NEVER / 2)), 1)
    width, decoder = items.vectors.shape[1], tf.gather(items.reranker.decoder, best)
    of_genres, biases, ratings = tf.split(tf.gather(items.reranker.attributes, best), _widths(items.reranker), axis=2)
    query_halves = tf.expand_dims(query, 2) * np.repeat(np.eye(2, dtype=np.float32), width // 2, axis=0)
    halves = tf.matmul(tf.gather(items.vectors, best), query_halves) + biases
    of_cooccurrence = tf.expand_dims(tf.gather_nd(cooccurrence, of_best), 2)
    codes, numbers = summary
    features = tf.concat(
        [
            tf.expand_dims(mix, 2),
            halves,
            of_cooccurrence,
            tf.math.log(of_cooccurrence + np.float32(LEAST_COOCCURRENCE)),
            tf.expand_dims(tf.gather(trend, best), 2),
            tf.matmul(decoder, tf.reshape(codes, [-1, 2, reranker.rank]), transpose_b=True),
            tf.matmul(of_genres, _recent_genres(items.reranker, recent), transpose_b=True),
            ratings,
        ],
        axis=2,
    )
    means = tf.matmul(tf.nn.softmax(lack), features)
    features = (features - means) * (1 / reranker.scales.features)
    features = _clipped(features, FEATURE_LIMIT)
    context = _context(reranker, halves, lack, request_gap, numbers)
    by_request = tf.matmul(context, reranker.weights.by_context[_CONTEXT_ORDER]) + reranker.weights.direct
    # NEVER is so large that it stays what it is: where there is no candidate, 0 is added.
    scores = mix + tf.squeeze(tf.matmul(features, tf.expand_dims(by_request, 2)), 2)
    change = tf.nn.log_softmax(scores) - tf.nn.log_softmax(mix)
    return tf.tensor_scatter_nd_add(logits, of_best, change)


def _recent_genres(items: RerankerItems, recent: Any) -> Any:
    """[batch, 2, genres]: the genres of the last item, and the mean of those of the recent ones. Those of padding are
    zero."""
    of_recent = tf.gather(items.attributes, recent)[:, :, : _widths(items)[0]]
    known = tf.expand_dims(tf.minimum(tf.cast(recent, tf.float32), 1.0), 1)
    return tf.matmul(tf.nn.softmax(known * (-np.float32(NEVER) * _LAST_AND_ALL)), of_recent)


def _widths(items: RerankerItems) -> list[int]:
    """Of the attributes: genres, biases, mean rating."""
    return [items.attributes.shape[1] - 3, 2, 1]


_LAST_AND_ALL = np.stack([np.eye(RECENT_ITEMS)[0], np.ones(RECENT_ITEMS)]).astype(np.float32)


def _clipped(values: Any, limit: float) -> Any:
    return tf.raw_ops.ClipByValue(t=values, clip_value_min=-limit, clip_value_max=limit)


_OF_NUMBERS = np.zeros((1 + NUMBERS, 8), np.float32)
_OF_NUMBERS[[0, 0, 1, 2, 3, 5, 4, 6], np.arange(8)] = 1
"""From the request gap and the numbers of a summary to: the request gap twice, events, session, gap, ratings, rated,
last rating."""
_CONTEXT_ORDER = np.array(
    [
        CONTEXT.index(name)
        for name in (
            "log_request_gap",
            "log_events",
            "log_session",
            "log_gap",
            "timed",
            "user_rating",
            "last_rating",
            "lstm_entropy",
            "content_entropy",
            "disagreement",
        )
    ]
)
"""The context's order in the graph, in which neighbours are computed alike."""


def _context(reranker: RerankerArrays, halves: Any, lack: Any, request_gap: Any, numbers: Any) -> Any:
    """[batch, CONTEXT], scaled, in _CONTEXT_ORDER.

    Args:
        reranker: Its scales and the mean rating.
        halves: [batch, candidates, 2], the models' logits.
        lack: [batch, 1, candidates], 0 for real candidates, which come first; otherwise far below all scores.
        request_gap: [batch].
        numbers: [batch, NUMBERS] of the summary.
    """
    known = tf.concat([tf.maximum(tf.expand_dims(request_gap, 1), -1.0), numbers], axis=1)
    prior = np.float32(RATING_PRIOR)
    linear = tf.matmul(known, _OF_NUMBERS) + np.array([1] * 5 + [prior * reranker.mean_rating, prior, 0], np.float32)
    timed, logs, ratings, rated, last = tf.split(linear, [1, 4, 1, 1, 1], axis=1)
    user_rating = ratings / rated
    # Of both models [batch, 2, candidates]; the product of a probability of 0 with its logarithm is 0.
    log_p = tf.nn.log_softmax(tf.transpose(halves, [0, 2, 1]) + lack)
    first = np.where(np.arange(halves.shape[1]) < COMPARED, 0, NEVER).astype(np.float32)
    apart = tf.abs(tf.matmul(np.array([[1, -1]], np.float32), log_p)) * tf.nn.softmax(lack + first)
    context = tf.concat(
        [
            tf.math.log(tf.maximum(logs, 1.0)),
            tf.minimum(timed, 1.0),
            user_rating,
            tf.where(last >= 0, last, user_rating),
            tf.reduce_sum(tf.concat([tf.exp(log_p) * log_p, apart], axis=1), axis=2),  # the entropies negative
        ],
        axis=1,
    )
    mean, scale = (values[_CONTEXT_ORDER] for values in (reranker.scales.context_mean, reranker.scales.context))
    sign = np.array([-1 if "entropy" in CONTEXT[place] else 1 for place in _CONTEXT_ORDER], np.float32)
    scaled = tf.matmul(context, np.diag(sign / scale).astype(np.float32)) - (mean / scale).astype(np.float32)
    return _clipped(scaled, CONTEXT_LIMIT)


def _capped(logits: Any, new: Any) -> Any:
    """`jaxrec.models.new_items.capped_logits` of logits in which what is excluded is NEVER."""
    known = tf.where(new, np.float32(NEVER), logits)[:, 1:]
    best = tf.math.top_k(known, min(FIRST_PLACES, known.shape[1])).values
    last = tf.reduce_min(tf.where(best > NEVER / 2, best, np.float32(np.inf)), axis=1, keepdims=True)
    above = tf.maximum(logits - last, 0.0)
    capped = tf.minimum(logits, last - 2 * GAP) + GAP * above / (1 + above)
    return tf.where(new, capped, logits)


def places(items: Any) -> Any:
    """items [batch, width] -> [batch, width, 2]: their places (row, item) among the logits."""
    rows = tf.broadcast_to(tf.expand_dims(tf.range(tf.shape(items)[0]), 1), tf.shape(items))
    return tf.stack([rows, items], axis=2)


def _policy_shift(policy: PolicyWeights, query: Any) -> Any:
    inner = tf.nn.relu(tf.matmul(query, policy.inner_kernel) + policy.inner_bias)
    return tf.matmul(inner, policy.outer_kernel) + policy.outer_bias
