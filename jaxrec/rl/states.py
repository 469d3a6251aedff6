"""What a policy sees: the supervised query after a history, the most recent items, and what the reranker ranks.

States before logged events are computed once: a policy on top of frozen models does not change them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

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
from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.models.reranker import Reranked
from jaxrec.models.summary import Summary, summaries

Results = TypeVar("Results")
USERS_PER_BATCH, CASES_PER_BATCH = 32, 256


class PolicyState(NamedTuple):
    """Requests [...]: the supervised `query` [..., width] float32, the `recent` items [..., RECENT_ITEMS] int32, the
    last one first, and the reranker's candidates `reranked` [...], their features as float16; None without one."""

    query: Array
    recent: Array
    reranked: Reranked | None = None


class HistoryStates(NamedTuple):
    """Histories [...]: both models' `outputs` [..., 2, hidden] after them, their `recent` items [..., RECENT_ITEMS]
    and the `summary` [...]; None without a reranker."""

    outputs: Array
    recent: Array
    summary: Summary | None

    def at(self, rows: Array) -> "HistoryStates":
        """These rows alone."""
        return jax.tree.map(lambda column: jnp.asarray(column[rows]), self)

    @classmethod
    def of_recurrent(cls, hybrid: Hybrid, state: jax.Array) -> "HistoryStates":
        """Those that the hybrid's recurrent state [batch, ...] holds."""
        h_lstm, _, h_content, _, recent = hybrid.split_state(state)
        return cls(jnp.stack([h_lstm, h_content], axis=1), recent, hybrid.summary_of(state))


def policy_state(
    hybrid: Hybrid,
    states: HistoryStates,
    request_gap: Array,
    exclude: Array | None = None,
    trend: jax.Array | float = 0.0,
    allowed: jax.Array | None = None,
) -> PolicyState:
    """What a policy on top of `hybrid` sees of requests.

    Args:
        hybrid: Without a policy, or with one that is not looked at.
        states: Of the requests' histories [batch].
        request_gap: [batch] float32 seconds from the last event to the request; UNKNOWN_GAP: not known.
        exclude: [batch, any] int32 items that may not be recommended; 0 = none.
        trend: [items + 1] or [batch, items + 1], what the trend adds to the logits.
        allowed: [batch, items + 1] bool, the items that may be recommended; None: all but `exclude`.

    Returns:
        The states [batch].
    """
    outputs, request_gap = jnp.asarray(states.outputs), jnp.asarray(request_gap)
    query = hybrid.supervised_query((outputs[:, 0], outputs[:, 1]), request_gap)
    recent = jnp.asarray(states.recent)
    if hybrid.reranker is None:
        return PolicyState(query, recent)
    _, mixed = hybrid.mixed(query, request_gap, recent, states.summary, exclude, trend)
    if allowed is not None:
        mixed = mixed._replace(logits=jnp.where(allowed, mixed.logits, NEVER))
    found = hybrid.reranker.reranked(mixed, hybrid.item_vectors())
    return PolicyState(query, recent, found._replace(features=found.features.astype(jnp.float16)))


@functools.partial(jax.jit, static_argnums=0)
def encode_histories(graphdef: nnx.GraphDef[Hybrid], variables: nnx.State, events: Events) -> jax.Array:
    """The recurrent states [batch, ...] of whole histories.

    Args:
        graphdef: Structure of the hybrid, and `variables` its arrays (`nnx.split`).
        variables: See `graphdef`.
        events: [batch, length] histories.
    """
    return nnx.merge(graphdef, variables).encode(events)[1]


@functools.partial(jax.jit, static_argnums=0)
def state_of_recurrent(
    graphdef: nnx.GraphDef[Hybrid],
    variables: nnx.State,
    state: jax.Array,
    request_gap: Array,
    exclude: Array,
    trend: jax.Array | float = 0.0,
) -> PolicyState:
    """`policy_state` of recurrent states [batch, ...]; graphdef and variables as in `encode_histories`."""
    hybrid = nnx.merge(graphdef, variables)
    return policy_state(hybrid, HistoryStates.of_recurrent(hybrid, state), request_gap, exclude, trend)


def states_before(hybrid: Hybrid, data: PreparedData, cases: Cases) -> HistoryStates:
    """The states of the histories before the cases' events, as NumPy arrays [cases, ...].

    Cases of one user that are near one another are read together, so that each history is read few times. So of a
    longer history between half of `max_length` and `max_length` events are read, and a summary counts these. (A
    server's states count up to `max_length` events, and those that came since.)

    Raises ValueError for a case without an event before it.
    """
    if (cases.rows <= data.histories.offsets[cases.users]).any():
        raise ValueError("a case is its user's first event; there is no history before it")
    graphdef, variables = nnx.split(hybrid)
    histories, length = data.histories, hybrid.lstm.config.max_length
    firsts = np.full(histories.user_count, np.iinfo(np.int64).max)
    np.minimum.at(firsts, cases.users, cases.rows)
    spans = (cases.rows - firsts[cases.users]) // max(length // 2, 1)
    keys, of_group = np.unique(np.stack([cases.users, spans], axis=1), axis=0, return_inverse=True)
    stops = np.zeros(len(keys), np.int64)
    np.maximum.at(stops, of_group, cases.rows)
    starts = np.maximum(histories.offsets[keys[:, 0]], stops - length)
    by_group = np.argsort(of_group, kind="stable")
    bounds = np.searchsorted(of_group[by_group], np.arange(len(keys) + 1))
    found, order = [], []
    for first in range(0, len(keys), USERS_PER_BATCH):
        chosen = np.minimum(np.arange(first, first + USERS_PER_BATCH), len(keys) - 1)
        of_windows = jax.device_get(
            _encode_windows(graphdef, variables, _windows(data, starts[chosen], stops[chosen], length))
        )
        stop = min(first + USERS_PER_BATCH, len(keys))
        of_batch = by_group[bounds[first] : bounds[stop]]
        at = of_group[of_batch] - first, cases.rows[of_batch] - starts[of_group[of_batch]] - 1
        found.append(jax.tree.map(lambda column: column[at], of_windows))  # noqa: B023
        order.append(of_batch)
    back = np.argsort(np.concatenate(order))
    outputs, summary = jax.tree.map(lambda *parts: np.concatenate(parts)[back], *found)
    return HistoryStates(outputs, recent_before(histories, cases), summary)


def recent_before(histories: Histories, cases: Cases) -> np.ndarray:
    """[cases, RECENT_ITEMS] int32: the items before the cases' events, the last one first; 0 where there are none."""
    rows = cases.rows[:, None] - 1 - np.arange(RECENT_ITEMS)
    where = rows >= histories.offsets[cases.users][:, None]
    return np.where(where, histories.items[np.where(where, rows, 0)], 0).astype(np.int32)


def policy_states(
    hybrid: Hybrid, data: PreparedData, cases: Cases, timed: np.ndarray
) -> tuple[PolicyState, np.ndarray]:
    """What a policy sees before logged events, without a trend.

    Args:
        hybrid: Without a policy.
        data: That the cases are of.
        cases: Logged events.
        timed: [cases] bool, which requests have a time.

    Returns:
        The states as NumPy arrays [cases, ...], and the items of the histories [cases, width] int32; 0 = none.
    """
    graphdef, variables = nnx.split(hybrid)
    states, width = states_before(hybrid, data, cases), longest_history(data.histories, cases)
    found, histories = [], []
    for number, batch in enumerate(case_batches(data, cases, RECENT_ITEMS, CASES_PER_BATCH)):
        rows = np.minimum(number * CASES_PER_BATCH + np.arange(CASES_PER_BATCH), len(cases) - 1)
        gap = np.where(timed[rows], batch.request_gap, UNKNOWN_GAP).astype(np.float32)
        exclude = widened(batch.exclude, width)
        found.append(jax.device_get(_policy_state(graphdef, variables, states.at(rows), gap, exclude)))
        histories.append(exclude)
    state, exclude = jax.tree.map(
        lambda *parts: np.concatenate(parts)[: len(cases)], *zip(found, histories, strict=True)
    )
    return state, exclude


def longest_history(histories: Histories, cases: Cases) -> int:
    """The number of events before a case at most, as a power of two: one width for all batches of cases, since each
    one is compiled."""
    return power_of_two(int((cases.rows - histories.offsets[cases.users]).max(initial=RECENT_ITEMS)))


def widened(columns: np.ndarray, width: int) -> np.ndarray:
    """columns [rows, any] with zeros up to `width`."""
    return np.pad(columns, ((0, 0), (0, max(0, width - columns.shape[1]))))


def _windows(data: PreparedData, starts: np.ndarray, stops: np.ndarray, length: int) -> Events:
    spans = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
    rows = [np.arange(span.start, span.stop) for span in spans]
    return pad_events(
        [data.histories.items[span] for span in spans],
        [data.unit_ratings(of_window) for of_window in rows],
        [gaps_at(data.histories, of_window) for of_window in rows],
        length,
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode_windows(graphdef: nnx.GraphDef[Hybrid], variables: Any, events: Events) -> tuple[jax.Array, Summary | None]:
    """Both models' outputs [batch, length, 2, hidden] and the summaries [batch, length] after each event."""
    hybrid = nnx.merge(graphdef, variables)
    outputs, _ = hybrid.encode(events)
    summary = None if hybrid.reranker is None else summaries(events, hybrid.reranker.tables.encoder)
    return jnp.stack(outputs, axis=2), summary


@functools.partial(jax.jit, static_argnums=0)
def _policy_state(
    graphdef: nnx.GraphDef[Hybrid], variables: Any, states: HistoryStates, request_gap: Array, exclude: Array
) -> PolicyState:
    return policy_state(nnx.merge(graphdef, variables), states, request_gap, exclude)


def by_batches(compute: Callable[[np.ndarray], Results], count: int, size: int) -> Results:
    """Concatenates compute(rows [size] int64) over all `count` rows, as NumPy arrays [count, ...].

    The last batch repeats the last row, so that one shape is compiled.
    """
    found = []
    for start in range(0, count, size):
        found.append(jax.device_get(compute(np.minimum(np.arange(start, start + size), count - 1))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)
