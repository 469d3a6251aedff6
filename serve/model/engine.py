"""Runs the graphs of a model with ONNX Runtime. Knows item indices and arrays, no raw ids and no gRPC."""

import ctypes
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serve.model.artifact import Artifact, ArtifactError, IndexFiles
from serve.model.search import NEVER, Graph, IndexedGraph, Search

Provider = Literal["auto", "cpu", "cuda"]
SearchBy = Literal["auto", "exact", "index"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# Name to dtype, as the model directory's contract has them.
Signature = dict[str, str]
_REQUEST = {"request_gap": "float", "exclude": "int32", "k": "int64"}
_RANKING = {"items": "int32", "scores": "float"}
_EVENTS = {"item": "int32", "rating": "float", "gap": "float"}
SEQUENCE_INPUTS: Signature = {**_EVENTS, "length": "int32", **_REQUEST}
SEQUENCE_OUTPUTS: Signature = {"state": "float", **_RANKING}
STEP_INPUTS: Signature = {"state": "float", **_EVENTS, **_REQUEST}
# A graph cannot call an output as one of its inputs, hence not `state`.
STEP_OUTPUTS: Signature = {"next_state": "float", **_RANKING}
# The graphs of a directory with an index, which answer a query.
_QUERY_REQUEST = {"vector": "float", "request_gap": "float"}
SEQUENCE_QUERY_INPUTS: Signature = {**_EVENTS, "length": "int32", **_QUERY_REQUEST}
SEQUENCE_QUERY_OUTPUTS: Signature = {"state": "float", "query": "float"}
STEP_QUERY_INPUTS: Signature = {"state": "float", **_EVENTS, **_QUERY_REQUEST}
STEP_QUERY_OUTPUTS: Signature = {"next_state": "float", "query": "float"}

# The graphs give an excluded item a score of at most this.
EXCLUDED_SCORE = NEVER

# A run costs about as much as so many events of one more row in it (10,000 items, two LSTMs of 128).
PADDING = 10


class ProviderError(Exception):
    """The execution provider that was demanded does not run here."""


@dataclass(frozen=True, slots=True)
class Features:
    """One user's history and request, as the graphs take them."""

    item: NDArray[np.int32]
    """`[n]`, n >= 1, item indices in time order, none of them 0."""
    rating: NDArray[np.float32]
    """`[n]`, 0..1 over the rating scale; -1 = no rating."""
    gap: NDArray[np.float32]
    """`[n]`, seconds since the event before; -1 for the first of the history."""
    request_gap: float
    """Seconds from the last event to the request; -1 = not known."""
    exclude: NDArray[np.int32]
    """`[m]`, m >= 0, item indices that are never answered."""

    def without_last(self) -> "Features":
        """The history before its last event, of at least two; the same exclusions."""
        return Features(self.item[:-1], self.rating[:-1], self.gap[:-1], -1.0, self.exclude)


class Ranking(NamedTuple):
    """Items best first, at most as many as were asked for."""

    items: NDArray[np.int32]
    scores: NDArray[np.float32]


class Step(NamedTuple):
    """One user's last event on top of the state before it, as `step.onnx` takes them: a batch of one each."""

    state: NDArray[np.float32]
    """`[1, width]`, zeros for an empty history."""
    item: NDArray[np.int32]
    """`[1]`, not 0."""
    rating: NDArray[np.float32]
    """`[1]`, 0..1 over the rating scale; -1 = no rating."""
    gap: NDArray[np.float32]
    """`[1]`, seconds since the event before; -1 for the first."""
    request_gap: float
    """Seconds from this event to the request; -1 = not known."""
    exclude: NDArray[np.int32]
    """`[1, m]`, m >= 1, item indices that are never answered; 0 excludes nothing."""


class Engine:
    """The graphs of one model, ready to run. Immutable, and safe to share between threads.

    Both graphs run through plain `session.run`: with inputs and outputs bound to buffers of their own a step of one
    user took as long (0.140 beside 0.142 ms, 10,000 items), and answers would have to be copied out of them.
    """

    def __init__(
        self,
        artifact: Artifact,
        provider: Provider = "auto",
        intra_op_threads: int = 1,
        search_by: SearchBy = "auto",
    ) -> None:
        """Loads the graphs. `search_by`: with the items' index or the whole product; auto: the index, if there is one
        and the graphs don't run on CUDA, where the whole product is fast and the index would search on the CPU.

        More than one intra-op thread made single requests no faster and the tail worse, so requests run
        beside each other on one thread each.

        Raises ArtifactError for a graph that breaks the contract, ProviderError when `provider` is "cuda" and
        CUDA does not run.
        """
        self.item_count = artifact.info.item_count
        if search_by == "index" and artifact.index is None:
            raise ArtifactError(f"{artifact.directory}: has no index, export it with --index always")
        index = artifact.index
        sequence = step = None
        if index is not None and search_by != "exact":
            sequence, step = (
                _session(graph, provider, intra_op_threads, {}) for graph in _query_graphs(artifact.directory, index)
            )
            if not searches_index(search_by, sequence.get_providers()[0]):
                sequence = step = None
        if sequence is None or step is None:
            arrays = {} if index is None else _graph_arrays(artifact.item_vectors, index)
            # The graphs may refer to their memory.
            self._arrays = arrays
            sequence, step = (_session(graph, provider, intra_op_threads, arrays) for graph in _exact_graphs(artifact))
            index = None
        self.state_width = _state_width(artifact, sequence, step)
        self.provider: str = sequence.get_providers()[0]
        """ONNX Runtime's name of the execution provider that really runs."""
        self.search_by: Literal["exact", "index"] = "exact" if index is None else "index"
        self._sequence: Graph = sequence
        self._step: Graph = step
        if index is not None:
            if len(index.recent_weights) > self.state_width:
                raise ArtifactError(
                    f"{artifact.directory}: index.recent_weights are {len(index.recent_weights)}, expected no more than"
                    f" the state's {self.state_width} numbers"
                )
            search = Search(artifact, index)
            self._sequence = IndexedGraph(sequence, "state", search)
            self._step = IndexedGraph(step, "next_state", search)

    def rank(self, rows: Sequence[Features], k: int | Sequence[int]) -> list[Ranking]:
        """Ranks the items for each row with `sequence.onnx`, rows of like length in one run.

        A row's answer does not depend on its neighbours. `k`, one for all or one for each row, is cut to the number of
        items; without the index a row can get as many as the neighbour that asked for most.
        """
        return [ranking for ranking, _ in self.replay(rows, k)]

    def replay(self, rows: Sequence[Features], k: int | Sequence[int] = 1) -> list[tuple[Ranking, NDArray[np.float32]]]:
        """As `rank`, with the state `[1, width]` after each row's last event."""
        ks = [k] * len(rows) if isinstance(k, int) else k
        answers: list[tuple[Ranking, NDArray[np.float32]] | None] = [None] * len(rows)
        for group in like_lengths([len(row.item) for row in rows]):
            for at, answer in zip(
                group, self._run_sequence([rows[at] for at in group], [ks[at] for at in group]), strict=True
            ):
                answers[at] = answer
        return [answer for answer in answers if answer is not None]

    def run_sequence(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """One run of `sequence.onnx` on tensors as its contract has them; nothing is checked."""
        answered: list[NDArray[Any]] = self._sequence.run(outputs, inputs)
        return answered

    def step(self, rows: Sequence[Step], k: int | Sequence[int]) -> list[tuple[Ranking, NDArray[np.float32]]]:
        """Ranks the items after each row's event, in one run of `step.onnx`, with the next state `[1, width]`.

        Neither does a row's answer depend on its neighbours here, nor may `k` be too large.
        """
        if len(rows) == 1:
            (row,) = rows
            state, item, rating, gap, exclude = row.state, row.item, row.rating, row.gap, row.exclude
        else:
            state, item, rating, gap = (np.concatenate([row[at] for row in rows]) for at in range(4))
            exclude = _padded([row.exclude[0] for row in rows])
        next_state, items, scores = self._step.run(
            ["next_state", "items", "scores"],
            {
                "state": state,
                "item": item,
                "rating": rating,
                "gap": gap,
                "request_gap": np.array([row.request_gap for row in rows], np.float32),
                "exclude": exclude,
                "k": self._k(k),
            },
        )
        # Copies of the rows of a batch, else one kept state would keep those of all its neighbours.
        states = [next_state] if len(rows) == 1 else [next_state[at : at + 1].copy() for at in range(len(rows))]
        return list(zip(_rankings(items, scores), states, strict=True))

    def _k(self, k: int | Sequence[int]) -> NDArray[np.int64]:
        """What the graphs take: one number, the largest; with the index one for each row, if they were given so."""
        largest = k if isinstance(k, int) else k if self.search_by == "index" else max(k)
        return np.minimum(np.atleast_1d(np.array(largest, np.int64)), self.item_count)

    def _run_sequence(self, rows: Sequence[Features], k: Sequence[int]) -> list[tuple[Ranking, NDArray[np.float32]]]:
        lengths = np.array([len(row.item) for row in rows], np.int32)
        shape = (len(rows), int(lengths.max()))
        item, rating, gap = (
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
        )
        for at, row in enumerate(rows):
            n = len(row.item)
            item[at, :n], rating[at, :n], gap[at, :n] = row.item, row.rating, row.gap
        state, items, scores = self._sequence.run(
            ["state", "items", "scores"],
            {
                "item": item,
                "rating": rating,
                "gap": gap,
                "length": lengths,
                "request_gap": np.array([row.request_gap for row in rows], np.float32),
                "exclude": _padded([row.exclude for row in rows]),
                "k": self._k(k),
            },
        )
        states = [state[at : at + 1].copy() for at in range(len(rows))]
        return list(zip(_rankings(items, scores), states, strict=True))


def _rankings(items: NDArray[np.int32], scores: NDArray[np.float32]) -> list[Ranking]:
    """The rows without the excluded items, which are last."""
    if scores[:, -1].min() > EXCLUDED_SCORE:
        return [Ranking(items[at], scores[at]) for at in range(len(items))]
    answered = (scores > EXCLUDED_SCORE).sum(axis=1)
    return [Ranking(items[at, :n], scores[at, :n]) for at, n in enumerate(answered)]


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Splits rows into groups that are worth a run of their own each; gives the places of their rows.

    Within a group no row is padded by more than PADDING events or by more than a quarter of the longest.
    """
    if len(lengths) == 1:
        return [[0]]
    groups: list[list[int]] = []
    longest = 0
    for at in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not groups or longest - lengths[at] > max(PADDING, longest // 4):
            groups.append([])
            longest = lengths[at]
        groups[-1].append(at)
    return groups


def _padded(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Rows side by side as `[batch, longest]`, right-padded with 0, at least one wide."""
    padded = np.zeros((len(rows), max(1, *(len(row) for row in rows))), np.int32)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return padded


def _state_width(artifact: Artifact, sequence: onnxruntime.InferenceSession, step: onnxruntime.InferenceSession) -> int:
    """The width of the state, which the graphs tell and nobody else knows."""
    widths = [
        node.shape[-1]
        for node in (*sequence.get_outputs(), *step.get_inputs(), *step.get_outputs())
        if node.name in ("state", "next_state")
    ]
    if len(set(widths)) != 1 or not isinstance(widths[0], int):
        raise ArtifactError(f"{artifact.directory}: the graphs' states have the widths {widths}, expected one number")
    return widths[0]


class _GraphFile(NamedTuple):
    """A graph with what is expected of it."""

    file: Path
    content: bytes
    inputs: Signature
    outputs: Signature


def _exact_graphs(artifact: Artifact) -> tuple[_GraphFile, _GraphFile]:
    folder = artifact.directory
    return (
        _GraphFile(folder / "sequence.onnx", artifact.sequence_graph, SEQUENCE_INPUTS, SEQUENCE_OUTPUTS),
        _GraphFile(folder / "step.onnx", artifact.step_graph, STEP_INPUTS, STEP_OUTPUTS),
    )


def _query_graphs(folder: Path, index: IndexFiles) -> tuple[_GraphFile, _GraphFile]:
    sequence = folder / "sequence_query.onnx", index.sequence_query_graph
    step = folder / "step_query.onnx", index.step_query_graph
    return (
        _GraphFile(*sequence, SEQUENCE_QUERY_INPUTS, SEQUENCE_QUERY_OUTPUTS),
        _GraphFile(*step, STEP_QUERY_INPUTS, STEP_QUERY_OUTPUTS),
    )


def searches_index(asked: SearchBy, provider: str) -> bool:
    """Whether a directory with an index is searched by it, when its graphs run on ONNX Runtime's `provider`."""
    return asked == "index" or (asked == "auto" and provider != CUDA)


def _graph_arrays(item_vectors: NDArray[np.float32], index: IndexFiles) -> dict[str, onnxruntime.OrtValue]:
    """The weights that `sequence.onnx` and `step.onnx` of a directory with an index have in files of their own."""
    arrays = {
        "item_vectors": item_vectors,
        "item_bias": index.item_bias,
        "neighbour_item": index.neighbour_item,
        "neighbour_weight": index.neighbour_weight,
    }
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def _session(
    graph: _GraphFile, provider: Provider, intra_op_threads: int, arrays: Mapping[str, onnxruntime.OrtValue]
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
        with tempfile.TemporaryDirectory(prefix="jaxrec-") as folder:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            if CUDA in wanted:
                options.add_external_initializers(list(arrays), list(arrays.values()))  # copies
            else:
                for name, array in arrays.items():
                    (Path(folder) / f"{name}.npy").touch()
                    options.add_initializer(name, array)
            session = onnxruntime.InferenceSession(
                graph.content,
                options,
                providers=wanted,
                # It would read the files, and hold a copy of the vectors for each graph.
                disabled_optimizers=["ConstantFolding"] if arrays and CUDA not in wanted else None,
            )
    # ONNX Runtime's exceptions have no common base and no public names.
    except Exception as error:
        raise ArtifactError(f"{graph.file}: ONNX Runtime cannot load it: {error}") from error
    if provider == "cuda" and session.get_providers()[0] != CUDA:
        raise ProviderError(f"expected CUDA, but {graph.file.name} runs on {session.get_providers()[0]}")
    _check_signature(f"{graph.file}: inputs", session.get_inputs(), graph.inputs)
    _check_signature(f"{graph.file}: outputs", session.get_outputs(), graph.outputs)
    return session


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
        raise ArtifactError(f"{where} are {_shown(came)}, expected {_shown(expected)}")


def _shown(signature: Signature) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(signature.items()))
