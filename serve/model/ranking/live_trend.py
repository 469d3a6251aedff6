"""A trend as the graphs of a model use it, with all that belongs to it in one object that is replaced as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.model.trend import Counted


class Graph(Protocol):
    """What of a session of ONNX Runtime is used."""

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]: ...


class Trending(NamedTuple):
    """What a search derives from a trend."""

    bias: NDArray[np.float32]
    """`[items+1]`, the items' own and the trend."""
    items: NDArray[np.int64]
    """`[n]`, those with the highest trend, each once."""


@dataclass(frozen=True, slots=True, eq=False)
class Trend:
    """A trend and all that belongs to it."""

    values: NDArray[np.float32]
    """`[items+1]`, not writeable: what is added to the items' logits."""
    trending: Trending | None
    """None: there is no index to search."""
    counted: Counted | None
    """The events in the counts; None: they are not noted."""
    added: Mapping[str, float]
    """Of added items by raw id, those that have one."""


Blocked = NDArray[np.bool_]
"""`[items+1]`, True: the item is never answered. What comes after the model's own items is of added ones, which the
graphs do not know."""


class TrendGraph(Protocol):
    """`sequence.onnx` or `step.onnx` with a trend."""

    def run(
        self,
        outputs: Sequence[str],
        inputs: dict[str, NDArray[Any]],
        trend: Trend,
        blocked: Sequence[Blocked | None] = (),
    ) -> list[NDArray[Any]]: ...


class ExactGraph:
    """The whole product: the graph itself. Safe to share between threads."""

    def __init__(self, graph: Graph, item_count: int) -> None:
        """`graph` has the inputs `trend` and `blocked`."""
        self._graph = graph
        self._none = np.zeros((1, item_count + 1), np.bool_)

    def run(
        self,
        outputs: Sequence[str],
        inputs: dict[str, NDArray[Any]],
        trend: Trend,
        blocked: Sequence[Blocked | None] = (),
    ) -> list[NDArray[Any]]:
        """As a session of ONNX Runtime.

        Args:
            outputs: Names of the graph's outputs.
            inputs: The graph's inputs but the trend and `blocked`.
            trend: The trend.
            blocked: What is blocked in each row, None: nothing; empty: nothing in any row.

        Returns:
            The outputs in the order of their names.
        """
        rows, count = self._none, self._none.shape[1]
        if blocked and all(row is blocked[0] for row in blocked):
            # One for all rows, and no copy.
            rows = rows if blocked[0] is None else blocked[0][None, :count]
        elif blocked:
            rows = np.stack([self._none[0] if row is None else row[:count] for row in blocked])
        return self._graph.run(outputs, {**inputs, "trend": trend.values, "blocked": rows})
