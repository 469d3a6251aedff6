"""Decisions of a log: what the mix would have offered before an event, with the features of each candidate."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import case_batches, gaps_at
from jaxrec.data.events import Events, pad_events
from jaxrec.data.histories import Histories, power_of_two
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
from jaxrec.models.summary import Summary, summaries
from jaxrec.models.trend import Trend

USERS_PER_BATCH, CASES_PER_BATCH = 32, 256
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

    def __len__(self) -> int:
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

    Each user's history is read once, up to the last case; so an early case of a long history is given fewer than
    `max_length` events.

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
    states = _states(hybrid, data, ordered)
    graphdef, variables = nnx.split(hybrid)
    of_trend = nnx.split(hybrid.trend)
    found = []
    # One shape for all batches, since the program that computes features takes seconds to compile.
    width = power_of_two(int((ordered.rows - data.histories.offsets[ordered.users]).max(initial=1)))
    batches = case_batches(data, ordered, RECENT_ITEMS, CASES_PER_BATCH, exclude_seen=hybrid.repeat is None)
    for number, batch in enumerate(batches):
        rows = np.minimum(number * CASES_PER_BATCH + np.arange(CASES_PER_BATCH), len(ordered) - 1)
        gap = np.where(timed[rows], batch.request_gap, UNKNOWN_GAP).astype(np.float32)
        trend = jnp.concatenate([_trend(*of_trend, counts.before(times)) for times in batch.time.reshape(-1, TIMES)])
        seen = None
        if hybrid.repeat is not None:
            seen = hybrid.repeat.scores_of(batch.history, batch.history_time, batch.time, timed[rows])
            seen = SeenScores(*(_widened(column, width) for column in seen))
        state = jax.tree.map(lambda column: jnp.asarray(column[rows]), states)  # noqa: B023
        exclude = _widened(batch.exclude, width)
        found.append(jax.device_get(_ask(graphdef, variables, state, gap, batch.target, exclude, trend, seen)))
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


def _widened(columns: np.ndarray, width: int) -> np.ndarray:
    return np.pad(columns, ((0, 0), (0, max(0, width - columns.shape[1]))))


class _States(NamedTuple):
    """Both models' `outputs` [cases, 2, hidden], the `recent` items [cases, RECENT_ITEMS], the `summary` [cases]."""

    outputs: np.ndarray
    recent: np.ndarray
    summary: Summary


def _states(hybrid: Hybrid, data: PreparedData, cases: Cases) -> _States:
    """The states before the cases' events."""
    graphdef, variables = nnx.split(hybrid)
    histories, length = data.histories, hybrid.lstm.config.max_length
    users, of_user = np.unique(cases.users, return_inverse=True)
    stops = np.zeros(len(users), np.int64)
    np.maximum.at(stops, of_user, cases.rows)
    starts = np.maximum(histories.offsets[users], stops - length)
    by_user = np.argsort(of_user, kind="stable")
    bounds = np.searchsorted(of_user[by_user], np.arange(len(users) + 1))
    found, order = [], []
    for first in range(0, len(users), USERS_PER_BATCH):
        chosen = np.minimum(np.arange(first, first + USERS_PER_BATCH), len(users) - 1)
        outputs, of_history = jax.device_get(
            _encode(graphdef, variables, _windows(data, starts[chosen], stops[chosen], length))
        )
        stop = min(first + USERS_PER_BATCH, len(users))
        of_batch = by_user[bounds[first] : bounds[stop]]
        at = of_user[of_batch] - first, cases.rows[of_batch] - starts[of_user[of_batch]] - 1
        found.append((outputs[at], jax.tree.map(lambda column: column[at], of_history)))  # noqa: B023
        order.append(of_batch)
    outputs, of_history = jax.tree.map(lambda *parts: np.concatenate(parts)[np.argsort(np.concatenate(order))], *found)
    return _States(outputs, recent_before(histories, cases), of_history)


def recent_before(histories: Histories, cases: Cases) -> np.ndarray:
    """[cases, RECENT_ITEMS] int32: the items before the cases' events, the last one first; 0 where there are none."""
    rows = cases.rows[:, None] - 1 - np.arange(RECENT_ITEMS)
    where = rows >= histories.offsets[cases.users][:, None]
    return np.where(where, histories.items[np.where(where, rows, 0)], 0).astype(np.int32)


def _windows(data: PreparedData, starts: np.ndarray, stops: np.ndarray, length: int) -> Events:
    spans = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
    histories = data.histories
    return pad_events(
        [histories.items[span] for span in spans],
        [data.unit_ratings(np.arange(span.start, span.stop)) for span in spans],
        [_gaps(histories, span) for span in spans],
        length,
    )


def _gaps(histories: Histories, span: slice) -> np.ndarray:
    return gaps_at(histories, np.arange(span.start, span.stop))


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef[Hybrid], variables: Any, events: Events) -> tuple[jax.Array, Summary]:
    """Both models' outputs [batch, length, 2, hidden] and the summaries [batch, length] after each event."""
    hybrid = nnx.merge(graphdef, variables)
    assert hybrid.reranker is not None
    outputs, _ = hybrid.encode(events)
    return jnp.stack(outputs, axis=2), summaries(events, hybrid.reranker.tables.encoder)


@functools.partial(jax.jit, static_argnums=0)
def _trend(graphdef: nnx.GraphDef[Trend], variables: Any, counts: jax.Array) -> jax.Array:
    """[times, items + 1]."""
    return nnx.merge(graphdef, variables)(counts)


@functools.partial(jax.jit, static_argnums=0)
def _ask(
    graphdef: nnx.GraphDef[Hybrid],
    variables: Any,
    state: _States,
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
