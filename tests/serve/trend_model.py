"""A model directory with a trend for tests, out of one that was exported without."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serve.model.trend import HALF_LIVES_S

COUNTED_UNTIL = 1_010_000_000
WEIGHTS = np.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625], np.float32)
"""The trend of an item is the sum over the half-lives of weight * log(1 + count)."""


def with_trend(directory: Path, out: Path) -> Path:
    """The directory itself if it has a trend, else `out`: a copy with one, and counts of 1, 2, 3, ... 1 for the items.

    All of those have decayed to nothing since.
    """
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    if "trend" in manifest:
        return directory
    shutil.copytree(directory, out)
    items = manifest["item_count"]
    counts = np.zeros((len(HALF_LIVES_S), items + 1), np.float32)
    counts[:, 1:] = 1 + np.arange(items) % 3
    np.save(out / "trend_counts.npy", counts)
    for name in ("sequence", "step"):
        _add_input(out / f"{name}.onnx", items)
    onnx.save(_trend_graph(items), out / "trend.onnx")
    manifest["schema_version"] = 2
    manifest["trend"] = {
        "file": "trend.onnx",
        "counts": "trend_counts.npy",
        "half_lives_s": list(HALF_LIVES_S),
        "counted_until": COUNTED_UNTIL,
    }
    manifest["graphs"]["trend"] = {"file": "trend.onnx"}
    for path in out.iterdir():
        if path.name != "manifest.json":
            content = path.read_bytes()
            manifest["files"][path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out


def _add_input(path: Path, items: int) -> None:
    """Adds the trend to the bias of the items, wherever a graph uses that."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["biased" if name == "item_bias" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Add", ["item_bias", "trend"], ["biased"]))
    model.graph.input.append(helper.make_tensor_value_info("trend", TensorProto.FLOAT, [items + 1]))
    path.write_bytes(model.SerializeToString())


def _trend_graph(items: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Add", ["counts", "one"], ["above_zero"]),
        helper.make_node("Log", ["above_zero"], ["logarithms"]),
        helper.make_node("MatMul", ["weights", "logarithms"], ["trend"]),
    ]
    graph = helper.make_graph(
        nodes,
        "trend",
        [helper.make_tensor_value_info("counts", TensorProto.FLOAT, [len(HALF_LIVES_S), items + 1])],
        [helper.make_tensor_value_info("trend", TensorProto.FLOAT, [items + 1])],
        [numpy_helper.from_array(np.float32(1), "one"), numpy_helper.from_array(WEIGHTS, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
