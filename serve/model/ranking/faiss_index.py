"""Reads the index of the items that `jaxrec.onnx.ann_index` built with faiss, and asks it for candidates.

faiss reads what it is given: other kinds of index, and lengths that do not fit each other, which a search would then
follow outside of its arrays. Hence only the one kind that is built is accepted, with exactly the sizes that it must
have.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.model.manifest import ArtifactError

CODES_OF_A_BLOCK = 32
_reading = threading.Lock()


class ItemIndex:
    """Safe to share between threads."""

    def __init__(self, path: Path, content: bytes, count: int, width: int) -> None:
        """`content` is that of `path`, expected to hold `count` points of `width` numbers.

        Raises ArtifactError for anything else, or without faiss.
        """
        try:
            import faiss
        except ImportError as error:
            raise ArtifactError(
                f'{path}: needs faiss (pip install "jaxrec[index]"), or --search exact: {error}'
            ) from error
        self._faiss = faiss
        self._path = path
        self._count = count
        index: Any = _deserialized(faiss, path, content)
        wrong = _difference(faiss, index, count, width)
        if wrong:
            raise ArtifactError(f"{path}: expected an index of {count} points of {width} numbers: {wrong}")
        self._index = index

    def search(self, points: NDArray[np.float32], n: int) -> NDArray[np.int64]:
        """`[rows, n]` item indices with the largest products with `points` [rows, width], best first; 0 is none."""
        # The number of OpenMP's threads is one of the calling thread. Requests run beside each other anyway.
        self._faiss.omp_set_num_threads(1)
        places: NDArray[np.int64] = self._index.search(points, n)[1]
        if places.min(initial=0) < -1 or places.max(initial=0) >= self._count:
            raise ArtifactError(f"{self._path}: found points that are not in -1..{self._count - 1}")
        return places + 1


def _deserialized(faiss: Any, path: Path, content: bytes) -> Any:
    with _reading:
        # No array in a file is longer than the file, whatever its length says; without this, memory is taken first.
        limit = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(len(content))
        try:
            return faiss.deserialize_index(np.frombuffer(content, np.uint8))
        except (RuntimeError, AttributeError, MemoryError, ValueError) as error:
            raise ArtifactError(f"{path}: faiss cannot load it: {error}") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)


def _difference(faiss: Any, index: Any, count: int, width: int) -> str | None:
    """What of an index is not as `jaxrec.onnx.ann_index` builds it; None: nothing."""
    if type(index) is not faiss.IndexPreTransform or index.chain.size() != 1:
        return f"it is a {type(index).__name__}, not one with a rotation"
    rotation, codes = faiss.downcast_VectorTransform(index.chain.at(0)), faiss.downcast_index(index.index)
    if type(rotation) is not faiss.RandomRotationMatrix or type(codes) is not faiss.IndexPQFastScan:
        return f"it is a {type(rotation).__name__} before a {type(codes).__name__}"
    blocks = -(-count // CODES_OF_A_BLOCK)
    pairs = (width + 1) // 2  # of dimensions; each has half a byte
    of_all = {"d": width, "ntotal": count, "metric_type": faiss.METRIC_INNER_PRODUCT, "is_trained": True}
    of_rotation = {"d_in": width, "d_out": width, "have_bias": False, "is_trained": True}
    of_quantizer = {"d": width, "M": width, "nbits": 4, "dsub": 1, "ksub": 16, "code_size": pairs}
    of_codes = {
        **of_all,
        **{"M": width, "M2": 2 * pairs, "nbits": 4, "ksub": 16, "code_size": pairs},
        **{"bbs": CODES_OF_A_BLOCK, "ntotal2": blocks * CODES_OF_A_BLOCK, "implem": 0, "qbs": 0, "skip": 0},
    }
    for part, expected in ((index, of_all), (rotation, of_rotation), (codes, of_codes), (codes.pq, of_quantizer)):
        for name, value in expected.items():
            if getattr(part, name) != value:
                return f"{type(part).__name__}.{name} is {getattr(part, name)}, not {value}"
    lengths = {
        "rotation": (rotation.A.size(), width * width),
        "rotation's bias": (rotation.b.size(), 0),
        "centroids": (codes.pq.centroids.size(), 16 * width),
        "codes": (codes.codes.size(), blocks * CODES_OF_A_BLOCK * pairs),
    }
    for name, (length, right) in lengths.items():
        if length != right:
            return f"the {name} have {length} numbers, not {right}"
    numbers = (faiss.vector_to_array(rotation.A), faiss.vector_to_array(codes.pq.centroids))
    return None if all(np.isfinite(array).all() for array in numbers) else "its numbers are not finite"
