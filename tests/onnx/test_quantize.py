"""int8: graphs with the same contract and almost the same answers, or no export."""

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.errors import ExportError
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import Ranked, rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx import quantize
from jaxrec.onnx.convert import Graph
from jaxrec.onnx.model_directory import export_model
from jaxrec.onnx.parity import make_probe
from jaxrec.onnx.quantize import check_quality, compare_ranked, graph_scorer, quantize_lstms
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender


def test_scorer_of_the_graph_ranks_as_jax_does(
    small_data: PreparedData, small_hybrid: Hybrid, model_directory: Path
) -> None:
    graph = (model_directory / "sequence.onnx").read_bytes()
    cases = small_data.split.validation
    found, expected = (
        rank_cases(scorer, small_data, cases, 50, request_time=True)
        for scorer in (graph_scorer(Graph(graph), len(small_data.catalog)), hybrid_scorer(small_hybrid))
    )
    np.testing.assert_array_equal(found.top, expected.top)
    np.testing.assert_array_equal(found.ranks, expected.ranks)


@pytest.mark.parametrize("name", ["sequence", "step"])
def test_quantized_graph_keeps_the_contract(model_directory: Path, name: str) -> None:
    graph = (model_directory / f"{name}.onnx").read_bytes()
    exact, rough = (
        onnxruntime.InferenceSession(one, providers=["CPUExecutionProvider"])
        for one in (graph, quantize_lstms(Graph(graph)).content)
    )
    for of in ("get_inputs", "get_outputs"):
        described = [[(node.name, node.type, node.shape) for node in getattr(one, of)()] for one in (exact, rough)]
        assert described[0] == described[1]
    if name == "sequence":
        probe = make_probe(60, 50)
        feed = {**probe.__dict__, "k": np.array([60])}
        states = [one.run(["state"], feed)[0] for one in (exact, rough)]
        # Not the same, or nothing was quantized, and h within a few hundredths of its range of -1..1.
        assert 0 < np.abs(states[0][:, :16] - states[1][:, :16]).max() < 0.2


def ranked(ranks: list[int], top: list[list[int]]) -> Ranked:
    return Ranked(np.array(ranks), np.array(top, np.int32))


TEN = list(range(1, 11))


def test_gate_on_overlap_and_ndcg() -> None:
    exact = ranked([1, 3] * 50, [TEN] * 100)
    # 1,000 places: 10 may differ, in any order.
    figures = compare_ranked(exact, ranked([1, 3] * 50, [TEN[::-1]] * 90 + [[*TEN[:9], 11]] * 10))
    assert figures["top_10_overlap"] == pytest.approx(0.99)
    # NDCG@10 of ranks 1 and 3: (1 + 1 / log2(4)) / 2.
    assert figures["ndcg_10_float32"] == pytest.approx(0.75)
    with pytest.raises(ExportError, match=r"overlap by 0\.9890 \(expected 0\.99 or more\)"):
        compare_ranked(exact, ranked([1, 3] * 50, [TEN] * 89 + [[*TEN[:9], 11]] * 11))
    with pytest.raises(ExportError, match=r"is 0\.74500 beside 0\.75000 \(expected to fall by at most 0\.5%\)"):
        compare_ranked(exact, ranked([3, 3] + [1, 3] * 49, [TEN] * 100))
    # A model that ranks better is no worse, by however much.
    assert compare_ranked(exact, ranked([1, 1] * 50, [TEN] * 100))["ndcg_10_int8"] == 1.0


def test_a_quantized_graph_that_ranks_better_is_kept(
    small_data: PreparedData, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two graphs one ranks better, for some length of the histories; as the quantized one it is accepted, as the
    one before it is not."""
    monkeypatch.setattr(quantize, "LEAST_OVERLAP", 0.0)
    monkeypatch.setattr(quantize, "MOST_NDCG_LOSS", 1.0)
    graph = (model_directory / "sequence.onnx").read_bytes()
    both = Graph(graph), quantize_lstms(Graph(graph))
    of_lengths = ((length, check_quality(*both, small_data, length)) for length in range(50, 2, -1))
    length, figures = next((n, one) for n, one in of_lengths if one["ndcg_10_float32"] != one["ndcg_10_int8"])
    worse, better = both if figures["ndcg_10_float32"] < figures["ndcg_10_int8"] else both[::-1]
    monkeypatch.setattr(quantize, "MOST_NDCG_LOSS", 0.0)
    figures = check_quality(worse, better, small_data, length)
    assert figures["ndcg_10_float32"] < figures["ndcg_10_int8"]
    with pytest.raises(ExportError, match="expected to fall by at most"):
        check_quality(better, worse, small_data, length)


def test_a_quantized_model_that_may_repeat_is_compared_on_all_items(
    small_data: PreparedData, repeating_hybrid: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the export are those of JAX, with the scores of the items of the history; the server answers."""
    monkeypatch.setattr(quantize, "LEAST_OVERLAP", 0.0)
    monkeypatch.setattr(quantize, "MOST_NDCG_LOSS", 1.0)
    out, cases = tmp_path / "model", small_data.split.validation
    manifest = export_model(repeating_hybrid, small_data, out, training={}, metrics={}, licence="", int8=True)
    figures = manifest["parity"]["int8"]
    ranked = rank_cases(hybrid_scorer(repeating_hybrid), small_data, cases, 50, True, exclude_seen=False)
    assert figures["ndcg_10_float32"] == pytest.approx(ndcg(ranked.ranks, 10).mean())
    assert figures["top_10_overlap"] > 0.9
    recommender, histories = Recommender(read_artifact(out), "cpu"), small_data.histories
    queries = []
    for user, row in zip(cases.users, cases.rows, strict=True):
        rows = slice(histories.offsets[user], row)
        columns = histories.items[rows], histories.ratings[rows], histories.times[rows]
        events = zip(*(column.tolist() for column in columns), strict=True)
        known = [Event(recommender.catalog.item_ids[item], rating, at) for item, rating, at in events]
        queries.append(Query(known, 10, request_time=int(histories.times[row])))
    recommender.engine.use_counts(np.zeros_like(read_artifact(out).trend.counts))
    served = [answer.items for answer in recommender.recommend(queries)]
    kept = [len(np.intersect1d(*pair)) / 10 for pair in zip(served, ranked.top, strict=True)]
    assert np.mean(kept) > 0.8  # int8 depends on what is run together


def test_without_a_validation_case_nothing_is_said_to_be_kept(small_data: PreparedData) -> None:
    none = dataclasses.replace(small_data.split, validation=small_data.split.validation.at_most(0))
    with pytest.raises(ExportError, match=r"^int8: no validation case is left"):
        check_quality(Graph(b""), Graph(b""), dataclasses.replace(small_data, split=none), 50)


def test_a_model_that_gets_worse_is_not_exported(
    small_data: PreparedData,
    small_hybrid: Hybrid,
    model_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Random scores of 60 items lie so close that int8 changes some answers.
    monkeypatch.setattr(quantize, "LEAST_OVERLAP", 1.0)
    graph = (model_directory / "sequence.onnx").read_bytes()
    with pytest.raises(ExportError, match=r"^int8: on 40 validation cases"):
        check_quality(Graph(graph), quantize_lstms(Graph(graph)), small_data, 50)
    with pytest.raises(ExportError, match=r"^int8: .*export without --int8$"):
        export_model(
            *(small_hybrid, small_data, tmp_path / "model"),
            training={},
            metrics={},
            licence="",
            int8=True,
        )
    assert not (tmp_path / "model").exists()
