"""Writes the model directory: what `serve` reads, and all that it reads."""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrec.config import SeenItems
from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.errors import ExportError
from jaxrec.evaluation.baselines import decayed_popularity
from jaxrec.files import new_directory, sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.repeat import EDGES, FEATURE_NAMES
from jaxrec.onnx.added_items import ContentHeads, added_items
from jaxrec.onnx.ann_index import FROM_ITEMS
from jaxrec.onnx.convert import parts_graph, sequence_graph, step_graph, trend_graph
from jaxrec.onnx.parity import check_parity, check_written
from jaxrec.onnx.quantize import check_quality, quantize_lstms
from jaxrec.onnx.search import externalized, make_search, write_array
from jaxrec.onnx.signature import (
    OPSET,
    PARTS,
    parts_signature,
    sequence_signature,
    step_signature,
    trend_signature,
)
from jaxrec.onnx.weights import extract_weights

MANIFEST_SCHEMA_VERSION = 5
MANIFEST_FILE = "manifest.json"
SEQUENCE_FILE = "sequence.onnx"
STEP_FILE = "step.onnx"
PARTS_FILE = "parts.onnx"
TREND_FILE = "trend.onnx"
TREND_COUNTS_FILE = "trend_counts.npy"
MODEL_CATALOG_FILE = "catalog.csv"
ITEM_VECTORS_FILE = "item_vectors.npy"
ADDED_ITEMS_FILE = "added_items.npy"
LICENCE_FILE = "DATA_LICENCE.txt"


def export_model(
    hybrid: Hybrid,
    data: PreparedData,
    out: Path,
    *,
    training: dict[str, Any],
    metrics: dict[str, Any],
    licence: str,
    int8: bool = False,
    index: bool | None = None,
    heads: ContentHeads | None = None,
) -> dict[str, Any]:
    """Converts `hybrid`, verifies the graphs against JAX, and writes the model directory `out`; returns its manifest.

    Args:
        hybrid: the model. The manifest names its policy: "reinforce" with a policy head or a reranker, else
            "supervised".
        data: that it was trained on.
        out: replaced, if it exists, once the new directory is complete.
        training: summary of JSON values for the manifest.
        metrics: likewise.
        licence: the text about the data's licence.
        int8: whether the LSTMs are quantized, once the float32 graphs were verified; refused where that costs quality
            (`jaxrec.onnx.quantize`).
        index: whether an approximate index of the items is added (`jaxrec.onnx.ann_index`); None: from FROM_ITEMS items
            on, unless the hybrid has a reranker, which needs the whole graphs. The cap of new items is part of the
            whole graphs alone: beside an index their vectors are zero, so that
            they rank low (`Hybrid.without_new_items`). One line on the terminal says so with their number.
        heads: what says of items that come after the export how they rank; None: nothing does, and they rank low until
            the trend of their first events lifts them.

    Raises:
        ExportError: the model, its graphs or a summary are not fit to be exported; nothing is written then.
    """
    summaries = {"dataset": data.summary(), "training": training, "metrics": metrics}
    _require_json(summaries)
    indexed = _is_indexed(hybrid, index)
    new = None if hybrid.new_items is None else np.asarray(hybrid.new_items[...])
    if indexed and new is not None:
        count = int(new.sum())
        end = "the trend of their first events lifts them" if hybrid.trend.adds else "the next training"
        tqdm.write(
            f"index: {count} new items (without training events) have zero vectors in it, since it cannot keep them "
            f"below the first ten places: they rank low, above known items with a lower score only, until {end} "
            "(to rank them by their features: --index never)"
        )
        hybrid = hybrid.without_new_items()
    weights = extract_weights(hybrid)
    if weights.item_count != len(data.catalog):
        raise ExportError(f"the model knows {weights.item_count} items, the catalogue has {len(data.catalog)}")
    max_history = min(hybrid.lstm.config.max_length, hybrid.content.config.max_length)
    sequence, step, parts = sequence_graph(weights), step_graph(weights), parts_graph(weights)
    trend = trend_graph(weights)
    parity = check_parity(hybrid, sequence, step, parts, trend, max_history)
    counts = DecayedCounts.of(data)
    latest, added = counts.until(counts.last_time), added_items(hybrid, data, heads)
    search = None
    if indexed:
        search = make_search(weights, sequence, np.asarray(hybrid.trend(latest)), data, max_history, int8)
        parity["max_abs_query_difference"] = max(parity["max_abs_query_difference"], search.parity)
    if int8:
        quantized = quantize_lstms(sequence)
        parity["int8"] = check_quality(sequence, quantized, data, max_history, hybrid.repeat)
        sequence, step = quantized, quantize_lstms(step)
    widths = weights.state_width, weights.width
    graphs = {
        "sequence": {"file": SEQUENCE_FILE, **sequence_signature(*widths, weights.allow_seen).to_json()},
        "step": {"file": STEP_FILE, **step_signature(*widths, weights.allow_seen).to_json()},
        "parts": {"file": PARTS_FILE, "columns": PARTS, **parts_signature(*widths).to_json()},
        "trend": {"file": TREND_FILE, **trend_signature(len(HALF_LIVES_S)).to_json()},
    }
    if search is not None:
        graphs |= search.graphs

    with new_directory(out, MANIFEST_FILE) as folder:
        write_array(folder / ITEM_VECTORS_FILE, weights.item_vectors)
        if search is not None:
            search.write(folder)
        for name, graph in ((SEQUENCE_FILE, sequence), (STEP_FILE, step), (PARTS_FILE, parts)):
            (folder / name).write_bytes(graph.whole() if search is None else externalized(graph, folder))
        for name, graph in ((SEQUENCE_FILE, sequence), (STEP_FILE, step)):
            check_written(folder / name, graph, weights.item_count, max_history, weights.allow_seen)
        (folder / TREND_FILE).write_bytes(trend.content)
        write_array(folder / TREND_COUNTS_FILE, latest)
        write_array(folder / ADDED_ITEMS_FILE, added.rows)
        _write_catalog(data, new, folder / MODEL_CATALOG_FILE)
        (folder / LICENCE_FILE).write_text(licence.rstrip() + "\n", encoding="utf-8")
        files = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())}
        now = datetime.datetime.now(datetime.UTC)
        scale = data.config.rating_scale
        manifest = {
            "schema_version": MANIFEST_SCHEMA_VERSION,
            "model_version": f"{now:%Y%m%dT%H%M%SZ}-{_digest(files)[:8]}",
            "created": f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "policy": policy_name(hybrid),
            "reranker": hybrid.reranker is not None,
            "opset": OPSET,
            "item_count": weights.item_count,
            "max_history": max_history,
            "rating_scale": None if scale is None else {"minimum": scale.minimum, "maximum": scale.maximum},
            "genres": list(data.catalog.genres),
            "graphs": graphs,
            "trend": {
                "file": TREND_FILE,
                "counts": TREND_COUNTS_FILE,
                "half_lives_s": HALF_LIVES_S,
                "counted_until": counts.last_time,
            },
            "added_items": {"file": ADDED_ITEMS_FILE, **added.encoding()},
            "seen": _seen_section(hybrid),
            **({} if search is None else {"index": search.summary}),
            "files": files,
            **summaries,
            "parity": parity,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    return json.loads(text)


def policy_name(hybrid: Hybrid) -> str:
    """The name of a model's policy in its manifest."""
    return "supervised" if hybrid.policy is None and hybrid.reranker is None else "reinforce"


def _seen_section(hybrid: Hybrid) -> dict[str, Any]:
    """Whether items of the history may be answered, and if so what is added to their logits: by feature the edges of
    its buckets, and a number for each bucket, without and with the request time where that matters."""
    if hybrid.repeat is None:
        return {"items": SeenItems.EXCLUDE.value}
    features = zip(FEATURE_NAMES, EDGES, hybrid.repeat.tables(), strict=True)
    tables = {name: {"edges": list(edges), "scores": scores} for name, edges, scores in features}
    return {"items": SeenItems.ALLOW.value, **tables}


def _is_indexed(hybrid: Hybrid, index: bool | None) -> bool:
    """Whether an index is added. Raises ExportError where one is asked for and cannot be."""
    if hybrid.reranker is None:
        return len(hybrid.item_bias()) > FROM_ITEMS if index is None else index
    if index:
        raise ExportError(
            "the run uses a reranker, which cannot be exported together with an index of the items; export without "
            "--index always"
        )
    if len(hybrid.item_bias()) > FROM_ITEMS:
        tqdm.write(
            "index: none is added, since the run uses a reranker, which needs all items' scores; answers of a "
            "catalogue of this size are slower without an index"
        )
    return False


def _require_json(summaries: dict[str, dict[str, Any]]) -> None:
    for name, summary in summaries.items():
        try:
            json.dumps(summary, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ExportError(f"{name} must hold JSON values only: {error}") from error


def _write_catalog(data: PreparedData, new: np.ndarray | None, path: Path) -> None:
    """`new` [items + 1] bool: the items that the model was not trained on; None: there are none."""
    frame = data.catalog.to_frame()
    frame["popularity"] = data.train_popularity()[1:]
    frame["recent_popularity"] = decayed_popularity(data)[1:]
    frame["new"] = 0 if new is None else new[1:].astype(np.int8)
    frame.to_csv(path, index=False, encoding="utf-8", lineterminator="\n")


def _digest(files: dict[str, dict[str, Any]]) -> str:
    digests = "".join(f"{name} {entry['sha256']}\n" for name, entry in files.items())
    return hashlib.sha256(digests.encode()).hexdigest()
