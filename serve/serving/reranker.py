"""An own re-ranker: a Python function that orders the candidates of the model, within a bounded time.

    def newest_first(request: RerankRequest, candidates: Sequence[Candidate]) -> Sequence[str]:
        newest = sorted(candidates, key=lambda one: one.metadata.get("released", ""), reverse=True)
        return [one.item_id for one in newest]

`python -m serve run MODEL --reranker package.module:newest_first` asks it for every answer of Recommend and
BatchRecommend. It may be called by several threads at once. What it raises, an answer that is no order, and one that
comes too late are counted, and the model's order is answered.
"""

import importlib.metadata
import logging
import pkgutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

from serve.model.events import Event

logger = logging.getLogger(__name__)

GROUP = "jaxrec.rerankers"
"""The entry points of installed packages that `--reranker NAME` finds."""
TIMEOUT_S = 0.05
WORKERS = 4
"""So many calls at once; the next ones get the model's order. A call that is late holds one until it ends."""


class RerankerError(Exception):
    """A re-ranker cannot be loaded."""


class Candidate(NamedTuple):
    """An item that may be answered."""

    item_id: str
    score: float
    """Of the model, with the boosts of the request."""
    title: str
    tags: tuple[str, ...]
    metadata: Mapping[str, str]
    """That UpsertItems stored. Not to be changed."""


class RerankRequest(NamedTuple):
    """The request that the candidates may answer."""

    user_id: str | None
    """A stored user; None: the history came with the request."""
    history: Sequence[Event]
    """What came with the request. Empty for a stored user, whose events are not read for this; if events came with the
    user, the whole."""
    k: int
    """How many of the candidates are answered."""
    request_time: int | None
    """In seconds since 1970-01-01T00:00Z; None: not known."""
    policy: str
    """What ranked the candidates."""


Rerank = Callable[[RerankRequest, Sequence[Candidate]], Sequence[str]]
"""Takes the candidates, best first, and returns item ids in the order that is wanted. Candidates that are not among
them follow in the model's order."""


class Reranker:
    """Calls a function with a time limit, from any number of threads. It needs no closing: its threads end with the
    process."""

    def __init__(
        self, function: Rerank, timeout_s: float = TIMEOUT_S, on_result: Callable[[str], None] = lambda _: None
    ):
        """Nothing is called yet.

        Args:
            function: The re-ranker.
            timeout_s: How long a call may take, in seconds.
            on_result: Called with `ok`, `failed` (an exception, or no order), `late`, or `busy` (too many at once).
        """
        self._function = function
        self._timeout_s = timeout_s
        self._on_result = on_result
        self._free = threading.Semaphore(WORKERS)
        self._pool = ThreadPoolExecutor(WORKERS, "reranker")

    def order(self, request: RerankRequest, candidates: Sequence[Candidate], left_s: float | None = None) -> list[int]:
        """The places of candidates in the order that is wanted.

        Args:
            request: The request that they may answer.
            candidates: The best ones first.
            left_s: Seconds until the request's deadline; None: there is none.

        Returns:
            Some or all places, each once; empty: the order stays, since nothing was to be had in time.
        """
        timeout_s = self._timeout_s if left_s is None else max(0.0, min(self._timeout_s, left_s))
        if not self._free.acquire(blocking=False):
            self._on_result("busy")
            return []
        call = self._pool.submit(self._call, request, candidates)
        # Not `result(timeout)`: a function may raise a TimeoutError of its own.
        if not wait([call], timeout_s).done:
            self._on_result("late")
            return []
        order = call.result()
        self._on_result("failed" if order is None else "ok")
        return order or []

    def _call(self, request: RerankRequest, candidates: Sequence[Candidate]) -> list[int] | None:
        """The order; None: the function failed, or what it returned is no order."""
        try:
            place_of = {one.item_id: place for place, one in enumerate(candidates)}
            ids = list(self._function(request, candidates))
            unknown = [item_id for item_id in ids if item_id not in place_of]
            if unknown or len(set(ids)) < len(ids):
                raise ValueError(f"expected ids of candidates, each at most once, came {(unknown or ids)[:3]}")
            return [place_of[item_id] for item_id in ids]
        # Also SystemExit, with which libraries end programs: it must not end the server.
        except BaseException:
            logger.exception("the re-ranker failed, and the order of the model is answered")
            return None
        finally:
            self._free.release()


def load_reranker(name: str) -> Rerank:
    """The function that a setting names.

    Args:
        name: `package.module:function`, or the name of an entry point of the group `jaxrec.rerankers`.

    Raises:
        RerankerError: There is none, or it cannot be imported.
    """
    try:
        if ":" in name:
            found = pkgutil.resolve_name(name)
        else:
            entry_points = importlib.metadata.entry_points(group=GROUP)
            if name not in entry_points.names:
                known = ", ".join(sorted(entry_points.names)) or "none"
                expected = f"MODULE:FUNCTION or an entry point of {GROUP} ({known})"
                raise RerankerError(f"reranker: expected {expected}, came {name!r}")
            found = entry_points[name].load()
    # A module may raise anything when it is imported, and may end the program, as one without a main guard does.
    except (Exception, SystemExit) as error:
        if isinstance(error, RerankerError):
            raise
        raise RerankerError(f"reranker: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise RerankerError(f"reranker: expected a function, {name!r} is {type(found).__name__}")
    function: Rerank = found
    return function
