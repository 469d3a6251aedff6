"""The one interface of everything that is ranked: a Scorer, and the scorers of the learned models.

`jaxrec.evaluation.baselines` has those of the others. All are ranked by `jaxrec.evaluation.ranking.rank_cases`.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import CaseBatch
from jaxrec.data.events import Events
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.trend import DecayedCounts
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.repeat import SeenScores
from jaxrec.models.sequence import TimeRatingAwareLSTM
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


def sequence_scorer(model: TimeRatingAwareLSTM) -> Scorer:
    """The scorer of one sequence model (TimeRatingAwareLSTM or TimeRatingAwareContentModel)."""
    return compiled_scorer(model, sequence_logits)


def hybrid_scorer(hybrid: Hybrid, counts: DecayedCounts | None = None) -> Scorer:
    """The scorer of a hybrid, with its policy if it has one. `counts`: of the events that its trend is made of, as a
    server would have them that recorded each when it happened; None: without a trend."""
    graphdef, variables = nnx.split(hybrid)
    of_trend = nnx.split(hybrid.trend)

    def score(batch: CaseBatch) -> jax.Array:
        trend: Any = 0.0
        if counts is not None:  # one by one: the counts of a whole batch would be many times the size of its logits
            trend = jnp.stack([_trend(*of_trend, counts.before(time)[0]) for time in batch.time[:, None]])
        timed = np.asarray(batch.request_gap) != UNKNOWN_GAP
        history = batch.history, batch.history_time, batch.time
        seen = None if hybrid.repeat is None else hybrid.repeat.scores_of(*history, timed)
        return _hybrid_logits(graphdef, variables, batch.events, batch.request_gap, batch.exclude, trend, seen)

    return score


def compiled_scorer(model: nnx.Module, logits: Logits) -> Scorer:
    """A scorer that runs `logits(model, events, request_gap)` compiled, once per structure and batch shape."""
    graphdef, variables = nnx.split(model)
    return lambda batch: _compiled(graphdef, logits, variables, batch.events, batch.request_gap)


def sequence_logits(model: TimeRatingAwareLSTM, events: Events, request_gap: jax.Array) -> jax.Array:
    """[batch, items + 1] logits of one sequence model after each row's last event."""
    item_vectors = model.item_vectors()
    _, (h, _) = model.encode(events, item_vectors)
    return model.query(h, request_gap) @ item_vectors.T + model.item_bias()


@functools.partial(jax.jit, static_argnums=0)
def _hybrid_logits(
    graphdef: nnx.GraphDef[Hybrid],
    variables: Any,
    events: Events,
    request_gap: jax.Array,
    exclude: jax.Array,
    trend: jax.Array | float,
    seen: SeenScores | None,
) -> jax.Array:
    return nnx.merge(graphdef, variables).logits(events, request_gap, exclude=exclude, trend=trend, seen=seen)[0]


@functools.partial(jax.jit, static_argnums=0)
def _trend(graphdef: nnx.GraphDef[Trend], variables: Any, counts: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, variables)(counts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    graphdef: nnx.GraphDef[Any], logits: Logits, variables: Any, events: Events, request_gap: jax.Array
) -> jax.Array:
    return logits(nnx.merge(graphdef, variables), events, request_gap)
