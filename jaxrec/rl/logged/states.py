"""States of the policy: the two models' query vectors at logged decisions, computed once, the items before them, and
what came next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import training_windows
from jaxrec.data.events import pad_events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.errors import DataError
from jaxrec.models.cooccurrence import recent_items
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.logged.behaviour import BehaviourConfig, Choices, Fit, chosen_logprobs, fit_behaviour
from jaxrec.rl.reward_tables import running_user_means
from jaxrec.rl.states import encode_positions

MAX_STATES = 60_000
BEHAVIOUR_EPOCHS = 5
WINDOWS_PER_BATCH = 32


class States(NamedTuple):
    """Logged decisions: `query` [states, width] float32 is the supervised query vector before each, `target` [states]
    int32 the item that came, `target_rating` [states] float32 its unit rating (the item's mean where it has none),
    `user_mean` [states] float32 the mean of the user's ratings before, `logprob_beta` [states] float32 the target's
    log-probability under the behaviour model (0 where none was fitted).

    `windows` [windows, length] int32 holds items (0 = padding), each of one `user` [windows] int32; a state's history
    is the first `seen` [states] int32 of row `window` [states] int32.
    """

    query: Array
    target: Array
    target_rating: Array
    user_mean: Array
    logprob_beta: Array
    window: Array
    seen: Array
    windows: Array
    user: Array

    def recent(self, rows: jax.Array) -> jax.Array:
        """[rows, RECENT] int32: the last items of the given states' histories, the last one first, 0 = padding."""
        windows = jnp.asarray(self.windows)[jnp.asarray(self.window)[rows]]
        return recent_items(windows, jnp.asarray(self.seen)[rows])

    def histories(self, rows: jax.Array) -> jax.Array:
        """[rows, length] int32: the items of the given states' histories, 0 = padding."""
        windows = jnp.asarray(self.windows)[jnp.asarray(self.window)[rows]]
        seen = jnp.asarray(self.seen)[rows]
        return jnp.where(jnp.arange(windows.shape[1]) < seen[:, None], windows, 0)

    def following(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The query vectors [rows, width] at the decisions after the given ones, and whether [rows] there is one in the
        same window (where not, the vector is some other's)."""
        window, after = jnp.asarray(self.window), jnp.minimum(rows + 1, len(self.window) - 1)
        has_next = (rows + 1 < len(self.window)) & (window[after] == window[rows])
        return jnp.asarray(self.query)[after], has_next


def training_states(
    hybrid: Hybrid, data: PreparedData, item_ratings: np.ndarray, seed: int, limit: int = MAX_STATES
) -> States:
    """Every training event but a user's first is a state, from the windows of supervised training; at most `limit`.

    Where there are more, whole windows are left out: users' older windows before their most recent ones, and users at
    random among windows of equal age. The gap before the target is hidden for half of the states, at random. A state
    knows its window only, so a user's older windows are not excluded from its slates, nor among its recent items.
    Raises DataError where there is nothing to learn from.
    """
    rng = np.random.default_rng(seed)
    users, starts, lengths = training_windows(data.split.train_counts, hybrid.lstm.config.max_length)
    if not len(users):
        raise DataError("no user has two training events; there is nothing for the policy to learn from")
    age = np.arange(len(users)) - np.searchsorted(users, users)  # a user's windows come most recent first
    preferred = np.lexsort((rng.permutation(len(users)), age))
    count = np.searchsorted(np.cumsum(lengths[preferred]), limit, side="right")
    kept = np.sort(preferred[: max(1, count)])
    first_rows, lengths = data.histories.offsets[users[kept]] + starts[kept], lengths[kept]

    where = np.arange(lengths.max()) < lengths[:, None]
    rows = np.where(where, first_rows[:, None] + np.arange(lengths.max()), 0)
    windows = np.where(where, data.histories.items[rows], 0).astype(np.int32)
    window, position = np.nonzero(where)
    target_rows = rows[where] + 1
    request_gap = np.full(where.shape, UNKNOWN_GAP, np.float32)
    request_gap[where] = np.where(rng.random(len(window)) < 0.5, UNKNOWN_GAP, data.histories.gaps()[target_rows])
    unit_ratings = data.unit_ratings()
    target, rating = data.histories.items[target_rows], unit_ratings[target_rows]
    return States(
        query=_queries(hybrid, data, first_rows, where, request_gap),
        target=target.astype(np.int32),
        target_rating=rating_or_mean(rating, target, item_ratings),
        user_mean=running_user_means(data.histories.offsets, unit_ratings, float(item_ratings[0]))[target_rows],
        logprob_beta=np.zeros(len(target), np.float32),
        window=window.astype(np.int32),
        seen=(position + 1).astype(np.int32),
        windows=windows,
        user=users[kept].astype(np.int32),
    )


def with_behaviour(states: States, item_count: int, seed: int) -> tuple[States, Fit]:
    """The states with the log-probability of each target under a behaviour model fitted to them, and how good that is
    on the tenth of the users that it was not fitted to. Targets that the history holds already have none. Raises
    DataError where there are too few users."""
    rows = np.arange(len(states.target))
    exclude = np.asarray(states.histories(jnp.asarray(rows)))
    choices = Choices(np.asarray(states.query), np.asarray(states.target), exclude)
    possible = ~(exclude == choices.action[:, None]).any(axis=1)
    users, user = np.unique(states.user, return_inverse=True)
    if len(users) < 2:
        raise DataError(
            "only one user has two training events; a behaviour model is fitted to one and evaluated on others"
        )
    held_out = np.random.default_rng(seed).permutation(len(users)) < max(1, len(users) // 10)
    of_held_out = held_out[user][np.asarray(states.window)]
    fitted, evaluated = (choices.rows(np.flatnonzero(possible & mask)) for mask in (~of_held_out, of_held_out))
    if min(len(fitted.action), len(evaluated.action)) < 2:
        raise DataError(
            f"the behaviour model would be fitted to {len(fitted.action)} events and evaluated on "
            f"{len(evaluated.action)} of other users; expected at least 2 of each: the log has too few users"
        )
    beta, fit = fit_behaviour(fitted, evaluated, item_count, BehaviourConfig(max_epochs=BEHAVIOUR_EPOCHS, seed=seed))
    logprobs = np.zeros(len(rows), np.float32)
    logprobs[possible] = chosen_logprobs(beta, choices.rows(np.flatnonzero(possible)))
    return states._replace(logprob_beta=logprobs), fit


def rating_or_mean(ratings: np.ndarray, items: np.ndarray, item_ratings: np.ndarray) -> np.ndarray:
    """[events] float32: the unit rating of each event, or item_ratings [items + 1] of its item where it has none."""
    return np.where(ratings < 0, item_ratings[items], ratings).astype(np.float32)


def _queries(
    hybrid: Hybrid, data: PreparedData, starts: np.ndarray, where: np.ndarray, request_gap: np.ndarray
) -> np.ndarray:
    """[states, width] float32: the supervised query after each event of the windows, which begin at event `starts`
    [windows] of the log; `where` and `request_gap` [windows, length]."""
    graphdef, variables = nnx.split(hybrid)
    columns = data.histories.items, data.unit_ratings(), data.histories.gaps()
    lengths, queries = where.sum(axis=1), []
    for first in range(0, len(starts), WINDOWS_PER_BATCH):
        windows = np.minimum(np.arange(first, first + WINDOWS_PER_BATCH), len(starts) - 1)
        rows = [slice(starts[window], starts[window] + lengths[window]) for window in windows]
        items, ratings, gaps = ([column[one] for one in rows] for column in columns)
        events = pad_events(items, ratings, gaps, where.shape[1])
        of_batch = np.asarray(encode_positions(graphdef, variables, events, request_gap[windows]))
        queries.append(of_batch[: len(starts) - first][where[first : first + WINDOWS_PER_BATCH]])
    return np.concatenate(queries)
