"""Holds the ONNX graphs against JAX on a probe batch; a model whose answers differ is not exported."""

import dataclasses
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrec.config import MISSING_RATING
from jaxrec.data.events import Events
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.trend import HALF_LIVES_S
from jaxrec.errors import ExportError
from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.features import GAP_EDGES
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.models.repeat import SeenScores
from jaxrec.onnx.convert import Graph
from jaxrec.onnx.signature import PARTS
from jaxrec.onnx.weights import RECENT_WEIGHTS, Weights

TOLERANCE = 1e-4
PROBE_SEED = 20
PROBE_ROWS = 12
PROBE_ITEMS = 50
OF_ANSWER = ("trend", "exclude", "blocked", "seen", "seen_score")
"""Inputs that the state and the query do not depend on."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A batch of requests at one moment: arrays as the inputs of `sequence.onnx`, without k. `seen` and `seen_score`:
    None for models that exclude items of the history."""

    item: np.ndarray
    rating: np.ndarray
    gap: np.ndarray
    length: np.ndarray
    request_gap: np.ndarray
    trend: np.ndarray
    exclude: np.ndarray
    blocked: np.ndarray
    seen: np.ndarray | None = None
    seen_score: np.ndarray | None = None

    def inputs(self) -> dict[str, np.ndarray]:
        """By name, those that there are."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def never(self) -> np.ndarray:
        """[rows, width] int32: all that is excluded or blocked; 0 = nothing."""
        items = np.arange(self.blocked.shape[1], dtype=np.int32)
        return np.concatenate([self.exclude, np.where(self.blocked, items, 0)], axis=1)

    def row(self, at: int) -> "Probe":
        """One row as a batch of its own, without padding."""
        one, events = slice(at, at + 1), slice(int(self.length[at]))
        return Probe(
            item=self.item[one, events],
            rating=self.rating[one, events],
            gap=self.gap[one, events],
            length=self.length[one],
            request_gap=self.request_gap[one],
            trend=self.trend,
            exclude=self.exclude[one],
            blocked=self.blocked[one],
            seen=None if self.seen is None else self.seen[one],
            seen_score=None if self.seen_score is None else self.seen_score[one],
        )


def make_probe(item_count: int, max_history: int, seed: int = PROBE_SEED, allow_seen: bool = False) -> Probe:
    """Lengths from 1 to `max_history`, the first and the last item, missing ratings, gaps at and beside the buckets'
    edges, requests with and without a time, exclusions of nothing, of the history and of the same item twice; in
    every third row a tenth of the items is blocked; with `allow_seen` scores of some items."""
    rng = np.random.default_rng(seed)
    length = np.minimum([1, 1, 2, 3, 5, 8, 13, 21, 34, 50, 89, max_history], max_history).astype(np.int32)
    shape = (PROBE_ROWS, int(length.max()))
    where = np.arange(shape[1]) < length[:, None]
    item = rng.integers(1, item_count + 1, shape)
    item[0, 0], item[1, 0], item[-1, 0], item[-1, -1] = 1, item_count, 1, item_count
    rating = rng.choice(np.array([MISSING_RATING, 0.0, 0.25, 0.5, 0.75, 1.0], np.float32), shape)
    gaps = np.concatenate(
        [GAP_EDGES, np.nextafter(GAP_EDGES[1:], np.float32(0)), np.array([3e3, 4e8, 1e12], np.float32)]
    )
    gap = rng.choice(gaps, shape)
    gap[:, 0] = UNKNOWN_GAP
    request_gap = rng.choice(gaps, PROBE_ROWS)
    request_gap[::3] = UNKNOWN_GAP
    exclude = np.zeros((PROBE_ROWS, 6), np.int64)
    exclude[1::2] = rng.integers(1, item_count + 1, (PROBE_ROWS // 2, 6))
    exclude[2, :2], exclude[3], exclude[4, 3:] = item[2, :2], 1, [item_count, 0, item_count]
    blocked = np.zeros((PROBE_ROWS, item_count + 1), bool)
    blocked[::3] = np.arange(item_count + 1) % 10 == 7
    seen = np.where(rng.random((PROBE_ROWS, 7)) < 0.3, 0, rng.integers(1, item_count + 1, (PROBE_ROWS, 7)))
    return Probe(
        item=np.where(where, item, 0).astype(np.int32),
        rating=np.where(where, rating, 0).astype(np.float32),
        gap=np.where(where, gap, 0).astype(np.float32),
        length=length,
        request_gap=request_gap.astype(np.float32),
        trend=np.where(rng.random(item_count + 1) < 0.5, 0, rng.normal(size=item_count + 1)).astype(np.float32),
        exclude=exclude.astype(np.int32),
        blocked=blocked,
        seen=seen.astype(np.int32) if allow_seen else None,
        seen_score=np.where(seen > 0, rng.normal(size=seen.shape), 0).astype(np.float32) if allow_seen else None,
    )


def check_parity(
    hybrid: Hybrid, sequence: Graph, step: Graph, parts: Graph, trend: Graph, max_history: int
) -> dict[str, Any]:
    """Runs the graphs with ONNX Runtime on the CPU beside `Hybrid.logits`, `Hybrid.parts` and `Hybrid.trend`.

    Returns what was compared, as JSON values.

    Compared within TOLERANCE: every logit, the state and the query of `sequence`, of each row alone, and of the same
    history fed to `step` event by event; the order of all items, where a pair closer than that may change places; the
    parts of every logit; and the trend of made-up counts.
    Raises ExportError.
    """
    item_count = len(hybrid.item_bias()) - 1
    probe = make_probe(item_count, max_history, allow_seen=hybrid.repeat is not None)
    logits, state, query = _jax_answer(hybrid, probe)
    session, everything = open_session(sequence), np.array([item_count], np.int64)

    answer = _run(session, **probe.inputs(), k=everything)
    differences = [_compare("sequence.onnx", answer, logits, state, probe.never())]
    of_query = _difference("sequence.onnx: queries", answer["query"], query)
    for at in range(PROBE_ROWS):
        row = probe.row(at)
        alone = _run(session, **row.inputs(), k=everything)
        name = f"sequence.onnx on row {at} alone"
        differences.append(_compare(name, alone, logits[at, None], state[at, None], row.never()))
    few = _run(session, **probe.inputs(), k=np.array([min(3, item_count)], np.int64))
    if not np.array_equal(few["items"], answer["items"][:, : few["items"].shape[1]]):
        raise ExportError("sequence.onnx: the 3 best items are not the first 3 of all items")
    del session, answer
    replayed = _replay(open_session(step), probe, everything, state.shape[1])
    differences.append(_compare("step.onnx", replayed, logits, state, probe.never()))
    of_query = max(of_query, _difference("step.onnx: queries", replayed["query"], query))
    del replayed
    counts = np.random.default_rng(PROBE_SEED).exponential(size=(len(HALF_LIVES_S), item_count + 1))
    counts = np.where(counts < 1, 0, counts).astype(np.float32)
    found = _run(open_session(trend), counts=counts)["trend"]
    of_trend = _difference("trend.onnx", found[None], np.asarray(hybrid.trend(counts))[None])
    of_parts = _parts_difference(hybrid, open_session(parts), state, probe.request_gap)
    largest = np.max(differences, axis=0)
    return {
        "max_abs_difference": max(float(largest.max()), of_query, of_trend, of_parts),
        "max_abs_logit_difference": float(largest[0]),
        "max_abs_state_difference": float(largest[1]),
        "max_abs_query_difference": of_query,
        "max_abs_trend_difference": of_trend,
        "max_abs_part_difference": of_parts,
        "tolerance": TOLERANCE,
        "probe_rows": PROBE_ROWS,
        "longest_history": int(probe.length.max()),
    }


def check_written(path: Path, graph: Graph, item_count: int, max_history: int, allow_seen: bool) -> None:
    """Runs a written `sequence.onnx` or `step.onnx`, as a server without an index opens it, beside the graph that was
    verified. Raises ExportError where the answers differ by more than TOLERANCE."""
    probe, k = make_probe(item_count, max_history, allow_seen=allow_seen), np.array([min(100, item_count)], np.int64)

    def answer(session: Any) -> dict[str, np.ndarray]:
        widths = [one.shape[1] for one in session.get_inputs() if one.name == "state"]
        return _replay(session, probe, k, *widths) if widths else _run(session, **probe.inputs(), k=k)

    expected = answer(open_session(graph))
    for name, found in answer(open_session(path)).items():
        if name != "items":  # those of equal scores may change places
            _difference(f"{path.name}: {name} of the file", found, expected[name], "those of the verified graph")


def check_query_parity(
    weights: Weights, sequence: Graph, sequence_query: Graph, step_query: Graph, max_history: int
) -> float:
    """Holds the graphs that answer a query against `sequence.onnx`, which was verified: the query with the items'
    arrays must give its logits, and both must give its state, within TOLERANCE. Returns the largest difference.

    Raises ExportError.
    """
    probe = make_probe(weights.item_count, max_history, allow_seen=weights.allow_seen)
    whole, of_sequence = open_session(sequence), open_session(sequence_query)
    answer = _run(whole, **probe.inputs(), k=np.array([min(100, weights.item_count)], np.int64))
    events = {name: array for name, array in probe.inputs().items() if name not in OF_ANSWER}
    found = _run(of_sequence, **events, vector=weights.item_vectors[probe.item])
    difference = _difference("sequence_query.onnx: states", found["state"], answer["state"])
    logits = _logits(weights, found["query"], found["state"]) + probe.trend
    if probe.seen is not None and probe.seen_score is not None:
        np.add.at(logits, (np.arange(PROBE_ROWS)[:, None], probe.seen), probe.seen_score)
    scores = np.take_along_axis(logits, answer["items"].astype(np.int64), axis=1)
    # Excluded items are last, where there are few others.
    expected = np.where(answer["scores"] > NEVER / 2, answer["scores"], scores)
    difference = max(difference, _difference("sequence_query.onnx: logits", scores, expected))
    befores = []
    for at in range(PROBE_ROWS):
        row, last = probe.row(at), probe.length[at] - 1
        before = np.zeros((1, weights.state_width), np.float32)
        if last:
            shorter = {name: getattr(row, name)[:, :last] for name in ("item", "rating", "gap")}
            rest = {name: array for name, array in row.inputs().items() if name in ("request_gap", *OF_ANSWER)}
            before = _run(whole, **shorter, length=row.length - 1, **rest, k=np.array([1], np.int64))["state"]
        befores.append(before)
    del whole, of_sequence
    of_step = open_session(step_query)
    for at, before in enumerate(befores):
        row, last = probe.row(at), probe.length[at] - 1
        event = {name: getattr(row, name)[:, last] for name in ("item", "rating", "gap")}
        vector = weights.item_vectors[event["item"]]
        stepped = _run(of_step, state=before, vector=vector, **event, request_gap=row.request_gap)
        for name in ("state", "query"):
            one = _difference(f"step_query.onnx on row {at}: {name}", stepped[name], found[name][at, None])
            difference = max(difference, one)
    return difference


def _logits(weights: Weights, query: np.ndarray, state: np.ndarray) -> np.ndarray:
    """[rows, items + 1]: what `serve` computes of them for its candidates."""
    logits = query @ weights.item_vectors.T + weights.item_bias
    recent = state[:, -RECENT_ITEMS:].astype(np.int64)
    closeness = weights.neighbour_weight[recent] * RECENT_WEIGHTS[:, None]
    rows = np.broadcast_to(np.arange(len(query))[:, None, None], closeness.shape)
    np.add.at(logits, (rows, weights.neighbour_item[recent]), closeness)
    return logits


def _jax_answer(hybrid: Hybrid, probe: Probe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    definition, weights = nnx.split(hybrid)

    @jax.jit
    def answer(
        weights: nnx.State,
        events: Events,
        request_gap: jax.Array,
        exclude: jax.Array,
        trend: jax.Array,
        seen: SeenScores | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        hybrid = nnx.merge(definition, weights)
        logits, state = hybrid.logits(events, request_gap, exclude=exclude, trend=trend, seen=seen)
        h_lstm, _, h_content, _, _ = hybrid.split_state(state)
        return logits, state, hybrid.query_at((h_lstm, h_content), request_gap)

    with jax.default_matmul_precision("highest"):
        events = Events(*(jax.numpy.asarray(x) for x in (probe.item, probe.rating, probe.gap, probe.length)))
        seen = None if probe.seen is None or probe.seen_score is None else SeenScores(probe.seen, probe.seen_score)
        request = map(jax.numpy.asarray, (probe.request_gap, probe.never(), probe.trend))
        logits, state, query = answer(weights, events, *request, seen)
    return np.asarray(logits), np.asarray(state), np.asarray(query)


def _parts_difference(hybrid: Hybrid, session: Any, state: np.ndarray, request_gap: np.ndarray) -> float:
    """How far the parts of some items' logits in `parts.onnx` are from JAX': of those with the most co-occurrence, and
    of others."""
    with jax.default_matmul_precision("highest"):
        parts = [np.asarray(part) for part in hybrid.parts(state, request_gap)]
        vectors = np.asarray(hybrid.item_vectors())
    near = np.argsort(-parts[PARTS.index("cooccurrence")][:, 1:], axis=1)[:, :PROBE_ITEMS] + 1
    rows, items = parts[0].shape
    others = np.random.default_rng(PROBE_SEED).integers(1, items, (rows, PROBE_ITEMS))
    item = np.concatenate([near, others], axis=1)
    found = _run(session, state=state, request_gap=request_gap, item=item.astype(np.int32), vector=vectors[item])[
        "parts"
    ]
    expected = [np.take_along_axis(part, item, axis=1) for part in parts]
    return max(_difference(f"parts.onnx: {name}", found[:, :, at], expected[at]) for at, name in enumerate(PARTS))


def open_session(graph: Graph | Path, threads: int = 1) -> Any:
    """ONNX Runtime on the CPU; arrays of a Graph are read where they are, as by `serve.model.graphs`. `threads` 0: as
    many as there are cores. Raises ExportError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f'the export needs ONNX Runtime: pip install "jaxrec[serve]" ({error})') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if isinstance(graph, Path):
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in graph.arrays.items()}
    with tempfile.TemporaryDirectory(prefix="jaxrec-") as folder:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        for name, value in values.items():
            (Path(folder) / f"{name}.npy").touch()  # it asks that the file exists, though it has the content
            options.add_initializer(name, value)
        session = onnxruntime.InferenceSession(
            graph.content,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if values else None,  # it would read the files
        )
    weakref.finalize(session, values.clear)  # they have to live as long
    return session


def _run(session: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The graph's outputs by name; the state after the events is `state` in both graphs."""
    names = [output.name for output in session.get_outputs()]
    answer = dict(zip(names, session.run(names, inputs), strict=True))
    return {name.removeprefix("next_"): array for name, array in answer.items()}


def _replay(session: Any, probe: Probe, k: np.ndarray, state_width: int) -> dict[str, np.ndarray]:
    """The answers after each row's last event, from states advanced one event at a time."""
    answers: dict[str, np.ndarray] = {}
    states = np.zeros((len(probe.length), state_width), np.float32)
    for t in range(int(probe.length.max())):
        rows = np.flatnonzero(probe.length > t)
        last = probe.length[rows] == t + 1
        answer = _run(
            session,
            state=states[rows],
            item=probe.item[rows, t],
            rating=probe.rating[rows, t],
            gap=probe.gap[rows, t],
            request_gap=probe.request_gap[rows],
            trend=probe.trend,
            **{
                name: array[rows]
                for name, array in probe.inputs().items()
                if name in ("exclude", "blocked", "seen", "seen_score")
            },
            k=k if last.any() else np.ones_like(k),
        )
        states[rows] = answer["state"]
        for name, array in answer.items():
            if last.any():
                whole = answers.setdefault(name, np.zeros((len(probe.length), array.shape[1]), array.dtype))
                whole[rows[last]] = array[last]
    return answers


def _compare(
    graph: str, answer: Mapping[str, np.ndarray], logits: np.ndarray, state: np.ndarray, exclude: np.ndarray
) -> tuple[float, float]:
    """The largest differences of logits and of states. `logits` [rows, items + 1] and `state` are JAX'."""
    item_count = logits.shape[1] - 1
    items, scores = answer["items"], answer["scores"]
    if not np.array_equal(np.sort(items, axis=1), np.broadcast_to(np.arange(1, item_count + 1), items.shape)):
        raise ExportError(f"{graph}: an answer with k = {item_count} does not hold each item once")
    excluded = logits.copy()
    np.put_along_axis(excluded, exclude.astype(np.int64), NEVER, axis=1)
    of_answer = np.take_along_axis(excluded, items.astype(np.int64), axis=1)
    in_order = -np.sort(-excluded[:, 1:], axis=1)
    state_difference = _difference(f"{graph}: states", answer["state"], state)
    logit_difference = _difference(f"{graph}: logits", scores, of_answer)
    _difference(f"{graph}: logits in the order of the answer", of_answer, in_order)
    return logit_difference, state_difference


def _difference(what: str, found: np.ndarray, expected: np.ndarray, other: str = "JAX") -> float:
    difference = np.abs(found - expected)
    largest = float(difference.max())
    if not largest <= TOLERANCE:  # so that NaN fails too
        row, column = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
        raise ExportError(
            f"{what} differ from {other} by up to {largest:.3g}, tolerance {TOLERANCE:g} "
            f"(row {row}, column {column}: {found[row, column]:.6g}, expected {expected[row, column]:.6g})"
        )
    return largest
