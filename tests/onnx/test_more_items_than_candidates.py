"""A catalogue with more items than a reranker has candidates: what is no candidate keeps its logit, in JAX and ONNX."""

from collections.abc import Callable

import numpy as np

from jaxrec.config import PrepareConfig
from jaxrec.data.events import Events
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import DecayedCounts
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.onnx.convert import parts_graph, sequence_graph, step_graph, trend_graph
from jaxrec.onnx.parity import check_parity, make_probe
from jaxrec.onnx.weights import extract_weights
from jaxrec.rl.logged.decisions import decide
from tests.synthetic import random_log

ITEMS = 160


def test_what_is_no_candidate_keeps_its_logit(
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
) -> None:
    data = prepare(random_log(users=60, items=ITEMS, max_events=40, seed=3), None, PrepareConfig(1, 1))
    plain = random_hybrid(data, 4, False)
    hybrid = with_random_reranker(plain, data)
    items = len(data.catalog)
    assert items > 130
    weights = extract_weights(hybrid)
    graphs = (sequence_graph(weights), step_graph(weights), parts_graph(weights), trend_graph(weights))
    found = check_parity(hybrid, *graphs, 40)
    assert found["max_abs_logit_difference"] < 1e-3

    probe = make_probe(items, 40)
    events = Events(probe.item, probe.rating, probe.gap, probe.length)
    before, after = (
        np.array(model.logits(events, probe.request_gap, exclude=probe.exclude, trend=probe.trend)[0])
        for model in (plain, hybrid)
    )
    allowed = before.copy()
    np.put_along_axis(allowed, np.asarray(probe.exclude, np.int64), NEVER, axis=1)
    allowed[:, 0] = NEVER
    order = np.argsort(-allowed, axis=1)
    rows = np.arange(len(order))[:, None]
    np.testing.assert_array_equal(after[rows, order[:, 100:]], before[rows, order[:, 100:]])
    assert np.abs(after - before)[rows, order[:, :100]].max() > 0.1

    cases = data.split.validation
    asked = decide(hybrid, data, cases, DecayedCounts.of(data), np.zeros(len(cases), bool))
    placed = asked.place >= 0
    assert 0 < placed.sum() < len(cases)
    assert (asked.rank[~placed] > 100).all()
    assert (asked.rank[placed] <= 101).all()
