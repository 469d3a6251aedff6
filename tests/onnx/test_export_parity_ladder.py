"""NumPy reference = Flax = jit = `sequence.onnx` = `step.onnx`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.data.events import Events
from jaxrec.models.cooccurrence import RECENT_DECAY, RECENT_ITEMS
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.onnx.parity import Probe, make_probe

NEVER = float(np.float32(-1e30))


def bucket(gap: float) -> int:
    """0: unknown; 1: below a second; then [2**k, 2**(k + 1)) is k + 2, up to 31."""
    if gap < 1:
        return 0 if gap < 0 else 1
    return min(math.frexp(gap)[1] + 1, 31)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def array(parameter: nnx.Variable) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def reference_item_vectors(model: TimeRatingAwareLSTM) -> np.ndarray:
    vectors = array(model.item_embedding)
    if isinstance(model, TimeRatingAwareContentModel):
        vectors = vectors + array(model.genre_matrix) @ array(model.genre_projection.kernel)
    vectors[0] = 0
    return vectors


def reference_encode(
    model: TimeRatingAwareLSTM, item: np.ndarray, rating: np.ndarray, gap: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """h and c after the events of one history."""
    vectors = reference_item_vectors(model)
    kernel, recurrent_kernel = array(model.lstm.kernel), array(model.lstm.recurrent_kernel)
    h = c = np.zeros(len(recurrent_kernel))
    for item_t, rating_t, gap_t in zip(item, rating, gap, strict=True):
        of_rating = (
            array(model.rating.missing)
            if rating_t < 0
            else rating_t * array(model.rating.slope) + array(model.rating.offset)
        )
        x_t = np.concatenate([vectors[item_t], of_rating, array(model.gap.table)[bucket(gap_t)]])
        i, f, g, o = np.split(x_t @ kernel + h @ recurrent_kernel + array(model.lstm.bias), 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    return h, c


def reference_query(model: TimeRatingAwareLSTM, h: np.ndarray, request_gap: float) -> np.ndarray:
    vector = array(model.request_gap.table)[bucket(request_gap)]
    scale = 1 + vector @ array(model.request_scale.kernel) + array(model.request_scale.bias)
    shift = vector @ array(model.request_shift.kernel) + array(model.request_shift.bias)
    return (h * scale + shift) @ array(model.projection.kernel) + array(model.projection.bias)


def reference(hybrid: Hybrid, history: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Logits [items + 1] and state of one row without padding."""
    weights = hybrid.mix_weights()
    queries, vectors, biases, state = [], [], [], []
    for model, part in ((hybrid.lstm, weights.lstm), (hybrid.content, weights.content)):
        h, c = reference_encode(model, history.item[0], history.rating[0], history.gap[0])
        queries.append(part * reference_query(model, h, history.request_gap[0]))
        biases.append(part * array(model.item_bias_table))
        vectors.append(reference_item_vectors(model))
        state += [h, c]
    query, bias = np.concatenate(queries), biases[0] + biases[1]
    mixed, of_mix = query, bias
    if hybrid.policy is not None:
        policy = hybrid.policy
        inner = np.maximum(query @ array(policy.inner.kernel) + array(policy.inner.bias), 0)
        query = query + inner @ array(policy.outer.kernel) + array(policy.outer.bias)
        bias = bias + array(policy.item_bias)
    vectors_of_both = np.concatenate(vectors, axis=1)
    cooccurrence = np.zeros(len(bias))
    recent = history.item[0][::-1][:RECENT_ITEMS]
    items = np.asarray(hybrid.cooccurrence.neighbour_item[...])
    closeness = array(hybrid.cooccurrence.neighbour_weight)
    for age, item in enumerate(recent):
        for neighbour, weight in zip(items[item], closeness[item], strict=True):
            cooccurrence[neighbour] += weights.cooccurrence * RECENT_DECAY**age * weight
    logits = vectors_of_both @ mixed + of_mix + cooccurrence + history.trend
    new = np.zeros(len(logits), bool)
    if hybrid.new_items is not None:
        new = np.asarray(hybrid.new_items[...]) & (history.trend == 0)
    summary = reference_summary(hybrid, history) if hybrid.reranker is not None else []
    if hybrid.reranker is not None:
        parts = vectors_of_both * mixed
        width = parts.shape[1] // 2
        halves = parts[:, :width].sum(axis=1) + biases[0], parts[:, width:].sum(axis=1) + biases[1]
        rerank(hybrid, history, logits, new, halves, cooccurrence, summary)
    logits += vectors_of_both @ (query - mixed) + bias - of_mix
    logits[0] = NEVER
    if hybrid.new_items is not None:
        known = [logits[i] for i in range(1, len(logits)) if not new[i] and i not in history.never()[0]]
        tenth = sorted(known)[-10]
        above = np.maximum(logits - tenth, 0)
        logits = np.where(new, np.minimum(logits, tenth - 0.002) + 0.001 * above / (1 + above), logits)
    return logits, np.concatenate([*state, summary, np.pad(recent, (0, RECENT_ITEMS - len(recent)))])


def reference_summary(hybrid: Hybrid, history: Probe) -> np.ndarray:
    """Sums over one history: of the events' codes, also decayed, and the numbers of `jaxrec.models.summary`."""
    assert hybrid.reranker is not None
    encoder = np.asarray(hybrid.reranker.tables.encoder, np.float64)
    code, decayed, session, rated = np.zeros(encoder.shape[1]), np.zeros(encoder.shape[1]), 0, []
    for item, rating, gap in zip(history.item[0], history.rating[0], history.gap[0], strict=True):
        code, decayed = code + encoder[item], 0.93 * decayed + encoder[item]
        session = session + 1 if 0 <= gap <= 3600 else 1
        rated += [rating] if rating >= 0 else []
    events, last_gap = history.item.shape[1], max(history.gap[0, -1], 0)
    numbers = [events, session, last_gap, len(rated), sum(rated), history.rating[0, -1]]
    return np.concatenate([code, decayed, numbers])


def rerank(
    hybrid: Hybrid,
    history: Probe,
    logits: np.ndarray,
    new: np.ndarray,
    halves: tuple[np.ndarray, np.ndarray],
    cooccurrence: np.ndarray,
    summary: np.ndarray,
) -> None:
    """Ranks the 100 items with the highest logits anew, in place, without what is excluded and new items."""
    assert hybrid.reranker is not None
    tables, scales, weights = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), part)
        for part in (hybrid.reranker.tables, hybrid.reranker.scales, hybrid.reranker.weights)
    )
    allowed = [i for i in range(1, len(logits)) if not new[i] and i not in history.never()[0]]
    best = sorted(allowed, key=lambda i: -logits[i])[:100]
    rank = tables.encoder.shape[1]
    events, session, gap, rated, ratings, last = summary[2 * rank :]
    recent = [item for item in history.item[0][::-1][:RECENT_ITEMS] if item]
    of_recent = np.mean([tables.genres[item] for item in recent], axis=0)
    features = np.array(
        [
            [
                logits[i],
                halves[0][i],
                halves[1][i],
                cooccurrence[i],
                np.log(cooccurrence[i] + 0.001),
                history.trend[i],
                tables.decoder[i] @ summary[:rank],
                tables.decoder[i] @ summary[rank : 2 * rank],
                tables.genres[i] @ tables.genres[recent[0]],
                tables.genres[i] @ of_recent,
                tables.item_rating[i],
            ]
            for i in best
        ]
    )
    features = np.clip((features - features.mean(axis=0)) / scales.features, -6, 6)
    log_p = []
    for half in halves:
        shares = np.exp(half[best] - half[best].max())
        log_p.append(np.log(shares / shares.sum()))
    user_rating = (ratings + 10 * tables.item_rating[0]) / (rated + 10)
    request_gap = history.request_gap[0]
    context = [
        request_gap >= 0,
        np.log1p(max(request_gap, 0)),
        np.log1p(events),
        np.log1p(gap),
        np.log1p(session),
        user_rating,
        last if last >= 0 else user_rating,
        *(-(np.exp(p) * p).sum() for p in log_p),
        np.abs(log_p[0] - log_p[1])[:10].mean(),
    ]
    context = np.clip((np.array(context, float) - scales.context_mean) / scales.context, -4, 4)
    mix = logits[best]
    direct, by_context = weights
    if hybrid.policy is not None:
        direct, by_context = direct + array(hybrid.policy.direct), by_context + array(hybrid.policy.by_context)
    scores = mix + features @ (direct + context @ by_context)
    logits[best] = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
    logits[best] += np.log(np.exp(mix - mix.max()).sum()) + mix.max()


@pytest.fixture(scope="module")
def probe() -> Probe:
    return make_probe(item_count=60, max_history=50, seed=7)


@pytest.fixture(scope="module")
def expected(exported, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    rows = [reference(exported.hybrid, probe.row(at)) for at in range(len(probe.length))]
    logits, state = zip(*rows, strict=True)
    return np.stack(logits), np.stack(state)


def unscrambled(answer: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [rows, items] in the order of the items."""
    logits = np.full_like(answer["scores"], np.nan)
    np.put_along_axis(logits, answer["items"].astype(np.int64) - 1, answer["scores"], axis=1)
    return logits


def without(logits: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """Logits [rows, items + 1] -> [rows, items], NEVER where excluded."""
    logits = logits.copy()
    np.put_along_axis(logits, exclude.astype(np.int64), NEVER, axis=1)
    return logits[:, 1:]


@pytest.mark.parametrize("jit", [False, True], ids=["flax", "jit"])
def test_flax_equals_the_formulas(exported, probe: Probe, expected, jit: bool) -> None:
    definition, weights = nnx.split(exported.hybrid)

    def answer(weights, events, request_gap, exclude, trend):
        return nnx.merge(definition, weights).logits(events, request_gap, exclude=exclude, trend=trend)

    events = Events(*(jnp.asarray(x) for x in (probe.item, probe.rating, probe.gap, probe.length)))
    request = map(jnp.asarray, (probe.request_gap, probe.never(), probe.trend))
    logits, state = (jax.jit(answer) if jit else answer)(weights, events, *request)
    np.testing.assert_allclose(logits[:, 1:], expected[0][:, 1:], rtol=0, atol=1e-4)
    assert (logits[:, 0] < -9e29).all()
    np.testing.assert_allclose(state, expected[1], rtol=0, atol=1e-4)


def test_sequence_equals_the_formulas(exported, probe: Probe, expected) -> None:
    answer = exported.sequence(**vars(probe), k=exported.everything)
    np.testing.assert_allclose(answer["state"], expected[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(unscrambled(answer), without(expected[0], probe.never()), rtol=0, atol=1e-4)
    assert (np.diff(answer["scores"], axis=1) <= 0).all()


def test_step_by_step_equals_the_formulas(exported, probe: Probe, expected) -> None:
    for at in range(len(probe.length)):
        row = probe.row(at)
        state = np.zeros((1, expected[1].shape[1]), np.float32)
        for t in range(row.item.shape[1]):
            answer = exported.step(
                state=state,
                item=row.item[:, t],
                rating=row.rating[:, t],
                gap=row.gap[:, t],
                request_gap=row.request_gap,
                trend=row.trend,
                exclude=row.exclude,
                blocked=row.blocked,
                k=exported.everything,
            )
            state = answer["next_state"]
        np.testing.assert_allclose(state[0], expected[1][at], rtol=0, atol=1e-4)
        wanted = without(expected[0][at, None], row.never())
        np.testing.assert_allclose(unscrambled(answer), wanted, rtol=0, atol=1e-4)
