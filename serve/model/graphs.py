"""The ONNX graphs of a model: their signatures, and sessions of ONNX Runtime that keep them."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serve.model.directory import Artifact, IndexFiles
from serve.model.manifest import ArtifactError, ModelInfo
from serve.settings import Provider, SearchBy

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# Name to dtype, as the model directory's contract has them.
Signature = dict[str, str]


_REQUEST = {"request_gap": "float", "exclude": "int32", "k": "int64"}
_RANKING = {"items": "int32", "scores": "float"}
# What the items' vectors are multiplied with.
QUERY = "query"
_EVENTS = {"item": "int32", "rating": "float", "gap": "float"}
# What is added to the logits of each item, the same for all rows.
TREND = "trend"
# Items that are never answered: a row for all, or one for each.
BLOCKED = "blocked"
# What is added to items of the history, of models that may answer them.
SEEN: Signature = {"seen": "int32", "seen_score": "float"}
SEQUENCE_INPUTS: Signature = {**_EVENTS, "length": "int32", **_REQUEST, TREND: "float", BLOCKED: "bool"}
SEQUENCE_OUTPUTS: Signature = {"state": "float", **_RANKING, QUERY: "float"}
STEP_INPUTS: Signature = {"state": "float", **_EVENTS, **_REQUEST, TREND: "float", BLOCKED: "bool"}
# A graph cannot call an output as one of its inputs, hence not `state`.
STEP_OUTPUTS: Signature = {"next_state": "float", **_RANKING, QUERY: "float"}
PARTS_INPUTS: Signature = {"state": "float", "request_gap": "float", "item": "int32", "vector": "float"}
PARTS_OUTPUTS: Signature = {"parts": "float"}
TREND_INPUTS: Signature = {"counts": "float"}
TREND_OUTPUTS: Signature = {TREND: "float"}
# The graphs of a directory with an index, which answer a query.
_QUERY_REQUEST = {"vector": "float", "request_gap": "float"}
SEQUENCE_QUERY_INPUTS: Signature = {**_EVENTS, "length": "int32", **_QUERY_REQUEST}
SEQUENCE_QUERY_OUTPUTS: Signature = {"state": "float", "query": "float"}
STEP_QUERY_INPUTS: Signature = {"state": "float", **_EVENTS, **_QUERY_REQUEST}
STEP_QUERY_OUTPUTS: Signature = {"next_state": "float", "query": "float"}


class ProviderError(Exception):
    """The execution provider that was demanded does not run here."""


def state_width(artifact: Artifact, sequence: onnxruntime.InferenceSession, step: onnxruntime.InferenceSession) -> int:
    """The width of the state, as the graphs declare it."""
    widths = [
        node.shape[-1]
        for node in (*sequence.get_outputs(), *step.get_inputs(), *step.get_outputs())
        if node.name in ("state", "next_state")
    ]
    if len(set(widths)) != 1 or not isinstance(widths[0], int):
        raise ArtifactError(f"{artifact.directory}: the graphs' states have the widths {widths}, expected one number")
    return widths[0]


def sequence_inputs(info: ModelInfo) -> Signature:
    """Of a model's `sequence.onnx`."""
    return SEQUENCE_INPUTS if info.repeat is None else {**SEQUENCE_INPUTS, **SEEN}


class GraphFile(NamedTuple):
    """A graph with what is expected of it."""

    file: Path
    content: bytes
    inputs: Signature
    outputs: Signature


def exact_graphs(artifact: Artifact) -> tuple[GraphFile, GraphFile]:
    folder = artifact.directory
    step_inputs = STEP_INPUTS if artifact.info.repeat is None else {**STEP_INPUTS, **SEEN}
    return (
        GraphFile(folder / "sequence.onnx", artifact.sequence_graph, sequence_inputs(artifact.info), SEQUENCE_OUTPUTS),
        GraphFile(folder / "step.onnx", artifact.step_graph, step_inputs, STEP_OUTPUTS),
    )


def parts_graph(artifact: Artifact) -> GraphFile:
    return GraphFile(artifact.directory / "parts.onnx", artifact.parts_graph, PARTS_INPUTS, PARTS_OUTPUTS)


def trend_graph(artifact: Artifact) -> GraphFile:
    return GraphFile(artifact.directory / "trend.onnx", artifact.trend.graph, TREND_INPUTS, TREND_OUTPUTS)


def query_graphs(folder: Path, index: IndexFiles) -> tuple[GraphFile, GraphFile]:
    sequence = folder / "sequence_query.onnx", index.sequence_query_graph
    step = folder / "step_query.onnx", index.step_query_graph
    return (
        GraphFile(*sequence, SEQUENCE_QUERY_INPUTS, SEQUENCE_QUERY_OUTPUTS),
        GraphFile(*step, STEP_QUERY_INPUTS, STEP_QUERY_OUTPUTS),
    )


def searches_index(asked: SearchBy, provider: str) -> bool:
    """Whether a directory with an index is searched by it, when its graphs run on ONNX Runtime's `provider`."""
    return asked == "index" or (asked == "auto" and provider != CUDA)


def graph_arrays(item_vectors: NDArray[np.float32], index: IndexFiles) -> dict[str, onnxruntime.OrtValue]:
    """The weights that `sequence.onnx` and `step.onnx` of a directory with an index have in files of their own."""
    arrays = {"item_vectors": item_vectors, "item_bias": index.item_bias}
    of_vectors = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    return {**of_vectors, **neighbour_arrays(index)}


def neighbour_arrays(index: IndexFiles) -> dict[str, onnxruntime.OrtValue]:
    """As `graph_arrays`, those of `parts.onnx`."""
    arrays = {"neighbour_item": index.neighbour_item, "neighbour_weight": index.neighbour_weight}
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def session(
    graph: GraphFile, provider: Provider, intra_op_threads: int, arrays: Mapping[str, onnxruntime.OrtValue]
) -> onnxruntime.InferenceSession:
    """`arrays` are the verified contents of the files that the graph names; no file is read for it.

    On the CPU the session refers to their memory, and they must live as long as it does.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    wanted = [CUDA, CPU] if _try_cuda(provider) else [CPU]
    try:
        # ONNX Runtime would look in the working directory for the files that a graph names. Here it finds none, or
        # empty ones where it asks that they exist, though it has their contents.
        with (
            tempfile.TemporaryDirectory(prefix="jaxrec-") as folder,
            # Of bytes, it would hold a copy for as long as it lives.
            _file_of(graph.content, Path(folder)) as verified,
        ):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            if CUDA in wanted:
                options.add_external_initializers(list(arrays), list(arrays.values()))  # copies
            else:
                for name, array in arrays.items():
                    (Path(folder) / f"{name}.npy").touch()
                    options.add_initializer(name, array)
            session = onnxruntime.InferenceSession(
                verified,
                options,
                providers=wanted,
                # It would read the files, and hold a copy of the vectors for each graph.
                disabled_optimizers=["ConstantFolding"] if arrays and CUDA not in wanted else None,
            )
    except OSError as error:
        raise ArtifactError(f"{graph.file}: cannot be copied for ONNX Runtime: {error}") from error
    # ONNX Runtime's exceptions have no common base and no public names.
    except Exception as error:
        raise ArtifactError(f"{graph.file}: ONNX Runtime cannot load it: {error}") from error
    if provider == "cuda" and session.get_providers()[0] != CUDA:
        raise ProviderError(f"expected CUDA, but {graph.file.name} runs on {session.get_providers()[0]}")
    _check_signature(f"{graph.file}: inputs", session.get_inputs(), graph.inputs)
    _check_signature(f"{graph.file}: outputs", session.get_outputs(), graph.outputs)
    return session


@contextmanager
def _file_of(content: bytes, folder: Path) -> Iterator[Path]:
    """A file with a content. On Linux it is in memory, so that a process that ends meanwhile leaves nothing behind."""
    if sys.platform == "linux":
        with open(os.memfd_create("graph"), "wb") as memory:
            memory.write(content)
            memory.flush()
            yield Path(f"/proc/self/fd/{memory.fileno()}")
    else:
        file = folder / "graph.onnx"
        file.write_bytes(content)
        yield file


def _try_cuda(provider: Provider) -> bool:
    """Whether to ask for CUDA: ONNX Runtime lists it as available on machines without a GPU."""
    if provider == "cpu" or CUDA not in onnxruntime.get_available_providers():
        return False
    if provider == "auto" and not _has_cuda_driver():
        return False
    onnxruntime.preload_dlls()
    return True


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _check_signature(where: str, found: Sequence[onnxruntime.NodeArg], expected: Signature) -> None:
    came = {node.name: node.type.removeprefix("tensor(").removesuffix(")") for node in found}
    if came != expected:
        raise ArtifactError(f"{where} are {_text_of(came)}, expected {_text_of(expected)}")


def _text_of(signature: Signature) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(signature.items()))
