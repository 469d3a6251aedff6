"""The exported graphs of three random models, converted once."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from jaxrec.data.catalog import Catalog
from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx.convert import sequence_graph, step_graph
from jaxrec.onnx.weights import extract_weights
from tests.once import made_once


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model and its graphs, run by ONNX Runtime."""

    hybrid: Hybrid = dataclasses.field(repr=False)
    sequence_bytes: bytes = dataclasses.field(repr=False)
    step_bytes: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def _sessions(self) -> list[onnxruntime.InferenceSession]:
        graphs = (self.sequence_bytes, self.step_bytes)
        return [onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]) for graph in graphs]

    @property
    def item_count(self) -> int:
        return len(self.hybrid.item_bias()) - 1

    @property
    def everything(self) -> np.ndarray:
        """The k that answers all items."""
        return np.array([self.item_count])

    def sequence(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return _run(self._sessions[0], inputs)

    def step(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return _run(self._sessions[1], inputs)


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.fixture(scope="session", params=["policy", "supervised", "no genres", "new items", "reranked"])
def exported(
    request: pytest.FixtureRequest,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    model_directory: Path,
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """A model with a policy head, one without, one whose catalogue has no genres, one with new items, and one with new
    items, a reranker and a policy head that shifts its weights."""
    if request.param == "policy":
        return _exported(small_hybrid, model_directory)
    if request.param == "no genres":
        bare = Catalog(small_data.catalog.ids, small_data.catalog.titles, ((),) * len(small_data.catalog))
        small_data = dataclasses.replace(small_data, catalog=bare)
    hybrid = random_hybrid(small_data, 2, False)
    if request.param == "new items":
        parts = hybrid.lstm, hybrid.content, hybrid.cooccurrence
        new = np.arange(len(small_data.catalog) + 1) % 4 == 1
        hybrid = Hybrid(*parts, hybrid.mix_weights(), hybrid.trend, new_items=new)
    if request.param == "reranked":
        parts = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence, small_hybrid.mix_weights()
        new = np.arange(len(small_data.catalog) + 1) % 4 == 1
        hybrid = Hybrid(*parts, small_hybrid.trend, small_hybrid.policy, new)
        hybrid = with_random_reranker(hybrid, small_data)

    def convert(folder: Path) -> None:
        weights = extract_weights(hybrid)
        folder.mkdir()
        (folder / "sequence.onnx").write_bytes(sequence_graph(weights).whole())
        (folder / "step.onnx").write_bytes(step_graph(weights).whole())

    return _exported(hybrid, made_once(tmp_path_factory, f"graphs of {request.param}", convert))


def _exported(hybrid: Hybrid, folder: Path) -> Exported:
    return Exported(hybrid, *((folder / name).read_bytes() for name in ("sequence.onnx", "step.onnx")))
