"""The reranker: what it may change, what it keeps, and its features by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import MISSING_RATING
from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.models.reranker import (
    CONTEXT,
    FEATURES,
    Candidates,
    Mixed,
    Reranker,
    RerankerTables,
    candidates,
    changes,
)
from jaxrec.models.summary import Summary
from jaxrec.onnx.parity import make_probe

TABLES = RerankerTables(
    encoder=jnp.zeros((4, 1)),
    decoder=jnp.array([[0.0], [1.0], [2.0], [-1.0]]),
    part_bias=jnp.array([[0.0, 0.0], [0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
    genres=jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
    item_rating=jnp.array([0.5, 0.6, 0.7, 0.8]),
)
VECTORS = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, -1.0], [0.0, 3.0]])


def mixed(logits: list[float], timed: bool = True) -> Mixed:
    """One request after item 3, then item 1, rated 0.75."""
    return Mixed(
        logits=jnp.array([logits]),
        cooccurrence=jnp.array([[0.0, 0.0, 1.0, 0.5]]),
        trend=jnp.array([0.0, 0.2, 0.0, 0.4]),
        query=jnp.array([[2.0, 3.0]]),
        request_gap=jnp.array([np.e - 1 if timed else UNKNOWN_GAP]),
        recent=jnp.array([[1, 3] + [0] * 8], jnp.int32),
        summary=Summary.from_flat(jnp.array([[10.0, 20.0, 2.0, 1.0, 0.0, 1.0, 0.75, 0.75]])),
    )


def test_features_by_hand() -> None:
    found = candidates(mixed([NEVER, 5.0, 7.0, NEVER]), VECTORS, TABLES)
    assert found.items[0, :2].tolist() == [2, 1]
    assert found.where[0].tolist() == [True, True, False]
    of_second, of_first = (dict(zip(FEATURES, found.features[0, place].tolist(), strict=True)) for place in (1, 0))
    less = {  # of item 1 less that of item 2, halved: features are centred within the request
        "mix": 5.0 - 7.0,
        "lstm": (2 * 1 + 0.1) - (2 * 2 + 0.3),
        "content": (3 * 1 + 0.2) - (3 * -1 + 0.4),
        "cooccurrence": 0.0 - 1.0,
        "log_cooccurrence": np.log(0.001) - np.log(1.001),
        "trend": 0.2,
        "linear": 10.0 * (1 - 2),
        "linear_recent": 20.0 * (1 - 2),
        "genre_last": 1.0 - 0.0,
        "genre_recent": 0.8 - 0.4,
        "rating": 0.6 - 0.7,
    }
    for name, difference in less.items():
        assert of_second[name] == pytest.approx(difference / 2, abs=1e-5), name
        assert of_first[name] == pytest.approx(-difference / 2, abs=1e-5), name
    context = dict(zip(CONTEXT, found.context[0].tolist(), strict=True))
    assert context["timed"] == 1
    assert context["log_request_gap"] == pytest.approx(1.0)
    assert context["log_events"] == pytest.approx(np.log(3))
    assert context["log_session"] == pytest.approx(np.log(2))
    assert context["user_rating"] == pytest.approx((0.75 + 10 * 0.5) / 11)
    assert context["last_rating"] == pytest.approx(0.75)
    p = 1 / (1 + np.exp(-2.2))  # the LSTM's two logits differ by 2.2
    assert context["lstm_entropy"] == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p), abs=1e-5)


def test_without_a_time_and_without_a_rating() -> None:
    request = mixed([NEVER, 5.0, 7.0, 1.0], timed=False)
    assert request.summary is not None
    unrated = request._replace(summary=request.summary._replace(last_rating=jnp.array([MISSING_RATING])))
    context = dict(zip(CONTEXT, candidates(unrated, VECTORS, TABLES).context[0].tolist(), strict=True))
    assert context["timed"] == context["log_request_gap"] == 0
    assert context["last_rating"] == pytest.approx(context["user_rating"])


def test_candidates_share_what_the_mix_gave_them_together() -> None:
    logits = jnp.log(jnp.array([[1e-30, 0.4, 0.2, 0.4]]))
    found = Candidates(
        jnp.array([[1, 2]]), logits[:, 1:3], jnp.zeros((1, 2, len(FEATURES))), jnp.zeros((1, len(CONTEXT)))
    )
    new = changes(found, jnp.array([[0.0, jnp.log(3.0)]])).added_to(logits)
    np.testing.assert_allclose(jnp.exp(new)[0, 1:], [0.15, 0.45, 0.4], rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_hybrid_keeps_excluded_and_new_items_and_the_sum(
    small_data: PreparedData,
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    scale: float,
) -> None:
    plain = random_hybrid(small_data, 1, True)
    parts = plain.lstm, plain.content, plain.cooccurrence
    new = np.arange(len(small_data.catalog) + 1) % 5 == 1
    plain = Hybrid(*parts, plain.mix_weights(), plain.trend, new_items=new)
    reranker = with_random_reranker(plain, small_data).reranker
    assert reranker is not None
    tables, weights = reranker.tables, jax.tree.map(lambda x: scale * x, reranker.weights)
    changed = plain.with_reranker(Reranker(tables, reranker.scales, weights))
    probe = make_probe(len(small_data.catalog), 40)
    events, gap, exclude = Events(probe.item, probe.rating, probe.gap, probe.length), probe.request_gap, probe.exclude
    before, _ = plain.logits(events, gap, exclude=exclude)
    after, state = changed.logits(events, gap, exclude=exclude)
    assert state.shape[1] == 4 * plain.lstm.config.hidden + 2 * tables.encoder.shape[1] + 6 + 10
    rows = np.arange(len(exclude))[:, None]
    known = (exclude > 0) & ~new[exclude]
    np.testing.assert_array_equal(np.asarray(after)[rows, exclude][known], np.asarray(before)[rows, exclude][known])
    allowed = np.array(before[:, 1:]), np.array(after[:, 1:])
    for logits in allowed:
        logits[:, new[1:]] = NEVER
        np.put_along_axis(logits, np.maximum(exclude - 1, 0), NEVER, axis=1)
    np.testing.assert_allclose(*(np.asarray(jax.nn.logsumexp(x, axis=1)) for x in allowed), atol=1e-4)
    if scale == 0:
        np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=1e-4)
    else:
        assert np.abs(np.asarray(after - before)[:, 1:]).max() > 0.1
