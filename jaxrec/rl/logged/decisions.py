"""Decisions of a log: what the mix would have offered before an event, with the features of each candidate."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.metrics import rank_of_target
from jaxrec.evaluation.ranking import in_time
from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.repeat import SeenScores
from jaxrec.models.reranker import Candidates, candidates
from jaxrec.models.trend import Trend
from jaxrec.rl.states import CASES_PER_BATCH, HistoryStates, longest_history, states_before, widened

TIMES = 16  # whose counts are held together: those of a whole batch would be many times the size of its logits


class Decisions(NamedTuple):
    """Each [decisions, ...].

    Attributes:
        user: int32.
        row: int64, that of the event that came next.
        target: int32, its item.
        timed: bool, whether the request had a time.
        rank: int32, the target's in the mix; ties count against it.
        place: int32, the target's among the candidates; -1: it is none.
        items: [.., candidates] int32.
        mix: [.., candidates] float32, their logits; NEVER where there is no candidate.
        features: [.., candidates, FEATURES] float16, not scaled.
        context: [.., CONTEXT] float32, not scaled.
    """

    user: np.ndarray
    row: np.ndarray
    target: np.ndarray
    timed: np.ndarray
    rank: np.ndarray
    place: np.ndarray
    items: np.ndarray
    mix: np.ndarray
    features: np.ndarray
    context: np.ndarray

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.user)

    def at(self, rows: np.ndarray) -> "Decisions":
        """Some of them."""
        return Decisions(*(column[rows] for column in self))

    @classmethod
    def joined(cls, parts: "list[Decisions]") -> "Decisions":
        """All of them, part after part."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def decide(hybrid: Hybrid, data: PreparedData, cases: Cases, counts: DecayedCounts, timed: np.ndarray) -> Decisions:
    """Asks the mix before each case's event.

    Args:
        hybrid: With a reranker, whose weights are not used.
        data: That the cases are of.
        cases: In any order, with any number of a user.
        counts: Of the events that the trend is made of.
        timed: [cases] bool, which requests have a time.

    Returns:
        The decisions, in the order of the cases.
    """
    ordered, places = in_time(data, cases)
    timed = timed[np.argsort(places)]
    states = states_before(hybrid, data, ordered)
    graphdef, variables = nnx.split(hybrid)
    of_trend = nnx.split(hybrid.trend)
    found = []
    width = longest_history(data.histories, ordered)
    batches = case_batches(data, ordered, RECENT_ITEMS, CASES_PER_BATCH, exclude_seen=hybrid.repeat is None)
    for number, batch in enumerate(batches):
        rows = np.minimum(number * CASES_PER_BATCH + np.arange(CASES_PER_BATCH), len(ordered) - 1)
        gap = np.where(timed[rows], batch.request_gap, UNKNOWN_GAP).astype(np.float32)
        trend = jnp.concatenate([_trend(*of_trend, counts.before(times)) for times in batch.time.reshape(-1, TIMES)])
        seen = None
        if hybrid.repeat is not None:
            seen = hybrid.repeat.scores_of(batch.history, batch.history_time, batch.time, timed[rows])
            seen = SeenScores(*(widened(column, width) for column in seen))
        exclude = widened(batch.exclude, width)
        found.append(
            jax.device_get(_ask(graphdef, variables, states.at(rows), gap, batch.target, exclude, trend, seen))
        )
    rank, of_cases = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(ordered)][places], *found)
    target = np.asarray(data.histories.items)[cases.rows]
    is_target = (of_cases.items == target[:, None]) & of_cases.where
    return Decisions(
        cases.users.astype(np.int32),
        cases.rows,
        target,
        timed[places],
        rank,
        np.where(is_target.any(axis=1), is_target.argmax(axis=1), -1).astype(np.int32),
        of_cases.items,
        of_cases.mix,
        of_cases.features,
        of_cases.context,
    )


@functools.partial(jax.jit, static_argnums=0)
def _trend(graphdef: nnx.GraphDef[Trend], variables: Any, counts: jax.Array) -> jax.Array:
    """[times, items + 1]."""
    return nnx.merge(graphdef, variables)(counts)


@functools.partial(jax.jit, static_argnums=0)
def _ask(
    graphdef: nnx.GraphDef[Hybrid],
    variables: Any,
    state: HistoryStates,
    request_gap: jax.Array,
    target: jax.Array,
    exclude: jax.Array,
    trend: jax.Array,
    seen: SeenScores | None,
) -> tuple[jax.Array, Candidates]:
    """The targets' ranks in the mix, and the candidates; features as float16."""
    hybrid = nnx.merge(graphdef, variables)
    assert hybrid.reranker is not None
    outputs = jnp.asarray(state.outputs)
    query = hybrid.supervised_query((outputs[:, 0], outputs[:, 1]), request_gap)
    logits, mixed = hybrid.mixed(query, request_gap, jnp.asarray(state.recent), state.summary, exclude, trend, seen)
    found = candidates(mixed, hybrid.item_vectors(), hybrid.reranker.tables)
    return rank_of_target(logits, target, exclude), found._replace(features=found.features.astype(jnp.float16))
