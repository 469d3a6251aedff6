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
    added: NDArray[np.float32]
    """`[added]`, of the added items that there were when it was made."""

    def of_added(self, count: int) -> NDArray[np.float32]:
        """`[count]`: of the first so many added items; 0 for those that came since."""
        known = self.added[:count]
        return known if len(known) == count else np.append(known, np.zeros(count - len(known), np.float32))


Blocked = NDArray[np.bool_]
"""`[items+1]`, True: the item is never answered."""


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
        rows = self._none
        if blocked and all(row is blocked[0] for row in blocked):
            # One for all rows, and no copy.
            rows = rows if blocked[0] is None else blocked[0][None]
        elif blocked:
            rows = np.stack([self._none[0] if row is None else row for row in blocked])
        return self._graph.run(outputs, {**inputs, "trend": trend.values, "blocked": rows})
