"""The one interface of everything that is ranked: a Scorer, and the scorers of the learned models.

`jaxrec.evaluation.baselines` has those of the others. All are ranked by `jaxrec.evaluation.ranking.rank_cases`.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import CaseBatch
from jaxrec.data.events import Events
from jaxrec.data.histories import power_of_two
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.trend import DecayedCounts
from jaxrec.models.cooccurrence import recent_items
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.models.repeat import SeenScores
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.models.summary import Summary, last_summary
from jaxrec.models.trend import Trend

Logits = Callable[[Any, Events, jax.Array], jax.Array]


class Scorer(Protocol):
    """Scores every item for every case: a popularity count, a sequence model, the hybrid with its policy."""

    def __call__(self, batch: CaseBatch, /) -> jax.Array | np.ndarray:
        """Scores a batch of cases.

        Args:
            batch: the cases. Where `request_gap` is UNKNOWN_GAP the request has no time; `time` is the moment at which
                it comes all the same.

        Returns:
            [batch, items + 1] float32, higher is better. Column 0 (padding) and the items of `exclude` may have any
            score: the ranking leaves them out.
        """


class Shared:
    """What the scorers of a batch have in common, computed once: give one object to all that are ranked together."""

    def __init__(self) -> None:
        self._batch: tuple[Any, Any, Any] = (None, None, None)
        self._found: dict[Any, Any] = {}

    def once(self, batch: CaseBatch, key: Hashable, compute: Callable[[], Any]) -> Any:
        """compute(), or what it gave for the same key and cases, whatever their request time."""
        of_batch = batch.events, batch.time, batch.history
        if any(one is not other for one, other in zip(of_batch, self._batch, strict=True)):
            self._batch, self._found = of_batch, {}
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def counts(self, batch: CaseBatch, counts: DecayedCounts) -> tuple[np.ndarray, np.ndarray]:
        """The decayed counts [moments, half-lives, items + 1] float32 at the distinct times of the cases, and the
        moment [batch] of each case. Moments are a power of two, the last one repeated, so that few shapes are
        compiled."""

        def compute() -> tuple[np.ndarray, np.ndarray]:
            times, moment = np.unique(batch.time, return_inverse=True)
            filled = np.pad(times, (0, power_of_two(len(times)) - len(times)), mode="edge")
            return counts.before(filled), moment

        found: tuple[np.ndarray, np.ndarray] = self.once(batch, id(counts), compute)
        return found


def sequence_scorer(model: TimeRatingAwareLSTM, shared: Shared | None = None) -> Scorer:
    """The scorer of one sequence model (TimeRatingAwareLSTM or TimeRatingAwareContentModel), as it was trained."""
    last_output = _last_output(model, shared or Shared())
    graphdef, variables = nnx.split(model)
    return lambda batch: _sequence_logits(graphdef, variables, last_output(batch), batch.request_gap)


def part_scorers(hybrid: Hybrid, shared: Shared | None = None) -> dict[str, Scorer]:
    """The scorers of the two sequence models of a hybrid, by their names, each alone.

    The biases of new items hold a shift that was chosen for the mix, which keeps these items from the first places. A
    model alone would have them in every answer, so it recommends none of them.

    Args:
        hybrid: As training leaves it.
        shared: Of the scorers that are ranked together.
    """
    scorers = {
        "TimeRatingAwareLSTM": sequence_scorer(hybrid.lstm, shared),
        "TimeRatingAwareContentModel": sequence_scorer(hybrid.content, shared),
    }
    if hybrid.new_items is None:
        return scorers
    return {name: _without(hybrid.new_items[...], scorer) for name, scorer in scorers.items()}


def _without(items: jax.Array, scorer: Scorer) -> Scorer:
    """The scorer with items [items + 1] bool that are not recommended."""
    return lambda batch: jnp.where(items, NEVER, scorer(batch))


def hybrid_scorer(hybrid: Hybrid, counts: DecayedCounts | None = None, shared: Shared | None = None) -> Scorer:
    """The scorer of a hybrid, with its reranker and its policy if it has them.

    Args:
        hybrid: The hybrid.
        counts: Of the events that its trend is made of, as a server would have them that recorded each when it
            happened; None: without a trend.
        shared: Of the scorers that are ranked together.
    """
    shared = shared or Shared()
    graphdef, variables = nnx.split(hybrid)
    of_trend = nnx.split(hybrid.trend)
    of_lstm, of_content = _last_output(hybrid.lstm, shared), _last_output(hybrid.content, shared)
    encoder = None if hybrid.reranker is None else hybrid.reranker.tables.encoder

    def score(batch: CaseBatch) -> jax.Array:
        trend: Any = 0.0
        if counts is not None:
            now, moment = shared.counts(batch, counts)
            trend = shared.once(batch, (id(counts), id(hybrid.trend)), lambda: _trend(*of_trend, now)[moment])
        recent = shared.once(batch, "recent", lambda: _recent(batch.events))
        summary = None
        if encoder is not None:
            summary = shared.once(batch, id(hybrid.reranker), lambda: _summary(batch.events, encoder))
        timed = np.asarray(batch.request_gap) != UNKNOWN_GAP
        history = batch.history, batch.history_time, batch.time
        seen = None if hybrid.repeat is None else hybrid.repeat.scores_of(*history, timed)
        of_history = (of_lstm(batch), of_content(batch)), recent, summary
        return _hybrid_logits(graphdef, variables, *of_history, batch.request_gap, batch.exclude, trend, seen)

    return score


def compiled_scorer(model: nnx.Module, logits: Logits) -> Scorer:
    """A scorer that runs `logits(model, events, request_gap)` compiled, once per structure and batch shape."""
    graphdef, variables = nnx.split(model)
    return lambda batch: _compiled(graphdef, logits, variables, batch.events, batch.request_gap)


def _last_output(model: TimeRatingAwareLSTM, shared: Shared) -> Callable[[CaseBatch], jax.Array]:
    """[batch, hidden]: what the model gives after each history."""
    graphdef, variables = nnx.split(model)
    return lambda batch: shared.once(batch, id(model), lambda: _encode(graphdef, variables, batch.events))


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef[TimeRatingAwareLSTM], variables: Any, events: Events) -> jax.Array:
    model = nnx.merge(graphdef, variables)
    return model.encode(events, model.item_vectors())[1][0]


@functools.partial(jax.jit, static_argnums=0)
def _sequence_logits(
    graphdef: nnx.GraphDef[TimeRatingAwareLSTM], variables: Any, outputs: jax.Array, request_gap: jax.Array
) -> jax.Array:
    model = nnx.merge(graphdef, variables)
    return model.query(outputs, request_gap) @ model.item_vectors().T + model.item_bias()


@functools.partial(jax.jit, static_argnums=0)
def _hybrid_logits(
    graphdef: nnx.GraphDef[Hybrid],
    variables: Any,
    outputs: tuple[jax.Array, jax.Array],
    recent: jax.Array,
    summary: Summary | None,
    request_gap: jax.Array,
    exclude: jax.Array,
    trend: jax.Array | float,
    seen: SeenScores | None,
) -> jax.Array:
    hybrid = nnx.merge(graphdef, variables)
    return hybrid.logits_after(outputs, recent, summary, request_gap, exclude, trend, seen)


@jax.jit
def _recent(events: Events) -> jax.Array:
    return recent_items(events.item, events.length)


_summary = jax.jit(last_summary)


@functools.partial(jax.jit, static_argnums=0)
def _trend(graphdef: nnx.GraphDef[Trend], variables: Any, counts: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, variables)(counts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    graphdef: nnx.GraphDef[Any], logits: Logits, variables: Any, events: Events, request_gap: jax.Array
) -> jax.Array:
    return logits(nnx.merge(graphdef, variables), events, request_gap)
