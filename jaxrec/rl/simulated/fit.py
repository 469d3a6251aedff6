"""Fits simulated users on a log, and measures how well they predict held-out users.

Three fifths of the log's users fit the item-item matrix, one fifth the coefficients of the choice, and the last fifth
evaluates both; the rating model holds out a tenth of the ratings. The matrix is EASE's or another one, so that the
users that train a policy and those that evaluate it can follow different models.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.optimize import minimize

from jaxrec.config import RatingScale
from jaxrec.data.catalog import Catalog
from jaxrec.data.histories import Histories
from jaxrec.data.ids import IdMap
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError
from jaxrec.evaluation.metrics import ndcg
from jaxrec.models.masks import NEVER
from jaxrec.rl.reward_tables import genre_directions
from jaxrec.rl.simulated.users import REPEATED, TASTE_EVENTS, SimulatorParams

TASTE_RIDGE = 100.0  # EASE's λ
DECAYS = (0.8, 0.9, 0.95, 0.98)
MIN_HISTORY, CASES_PER_USER = 10, 20
FACTORS, FACTOR_RIDGE, FACTOR_ROUNDS = 8, 10.0, 10
SHRINK, TASTE_NEIGHBOURS = 10.0, 100  # of the cosine
VALUES_AT_A_TIME = 2**22  # of each feature, while the choice is fitted; 16 MiB

ItemItem = Callable[[Histories, np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SimulatorFit:
    """`params`, and how well they fit held-out users' next items: nats per event of the choice model, of popularity
    alone, and of all items alike; NDCG@10 of both; the error of held-out ratings in stars, and of their mean.
    `without_taste` [users] bool: whose events the taste model and the popularity were not made of."""

    params: SimulatorParams
    nats: float
    popularity_nats: float
    uniform_nats: float
    ndcg_10: float
    popularity_ndcg_10: float
    rating_rmse: float
    mean_rating_rmse: float
    without_taste: np.ndarray


def simulator_histories(interactions: pd.DataFrame, catalog: Catalog, trained_on: IdMap) -> tuple[Histories, IdMap]:
    """The users' events on items of the catalogue, in time order (rows break ties), and the users' raw ids.

    `interactions` has user_id, item_id, rating, timestamp. Raises DataError where one of the users is among
    `trained_on`: the simulator must not contain users that the recommender was trained on.
    """
    both = np.intersect1d(trained_on.raw_ids.astype(str), interactions[USER].astype(str).to_numpy())
    if len(both):
        raise DataError(
            f"{len(both)} users, such as {both[0]}, are among those that the recommender was trained on; "
            "expected a simulator of other users"
        )
    items = catalog.ids.encode(interactions[ITEM].to_numpy())
    known = interactions.assign(**{ITEM: items})[items > 0].sort_values([USER, TIME], kind="stable")
    users, counts = np.unique(known[USER].to_numpy(), return_counts=True)
    columns = (known[ITEM].to_numpy(np.int32), known[RATING].to_numpy(np.float32), known[TIME].to_numpy(np.int64))
    return Histories(np.concatenate([[0], np.cumsum(counts)]), *columns), IdMap(users)


def ease(histories: Histories, users: np.ndarray, items: int) -> np.ndarray:
    """[items + 1, items + 1] float32: B of Steck 2019, equation 8; row and column 0 are 0.

    B_ij = -P_ij / P_jj off the diagonal, P = (X^T X + λ I)^-1 for the binary users-by-items matrix X.
    """
    x = _binary(histories, users, items)
    gram = x.T @ x
    gram[np.diag_indices(items)] += TASTE_RIDGE
    p = np.linalg.inv(gram)
    b = np.zeros((items + 1, items + 1), np.float32)
    np.divide(p, -np.diag(p), out=b[1:, 1:], casting="same_kind")
    np.fill_diagonal(b, 0.0)
    return b


def shrunk_cosine(histories: Histories, users: np.ndarray, items: int) -> np.ndarray:
    """[items + 1, items + 1] float32: item-item nearest neighbours; row and column 0 are 0.

    s_ij = n_ij / (sqrt(n_i n_j) + SHRINK), where n_ij users chose both and n_i chose i (Sarwar et al. 2001,
    section 3.1.1, with the shrinkage of Ferrari Dacrema et al. 2019, "Are We Really Making Much Progress?"); each
    column keeps its TASTE_NEIGHBOURS largest.
    """
    x = _binary(histories, users, items)
    taken, columns = x.sum(axis=0), max(1, VALUES_AT_A_TIME // items)
    found = np.zeros((items + 1, items + 1), np.float32)
    for first in range(0, items, columns):
        last = min(first + columns, items)
        s = x.T @ x[:, first:last]
        s /= np.sqrt(np.outer(taken, taken[first:last])) + SHRINK
        s[np.arange(first, last), np.arange(last - first)] = 0.0
        if items > TASTE_NEIGHBOURS:
            s[s < np.partition(s, -TASTE_NEIGHBOURS, axis=0)[-TASTE_NEIGHBOURS]] = 0.0
        found[1:, 1 + first : 1 + last] = s
    return found


def _binary(histories: Histories, users: np.ndarray, items: int) -> np.ndarray:
    """[users, items] float64: 1 where the item is in the user's history."""
    row = np.full(histories.user_count, -1)
    row[users] = np.arange(len(users))
    of_users = row[histories.users()]
    x = np.zeros((len(users), items), np.float64)
    kept = of_users >= 0
    x[of_users[kept], histories.items[kept] - 1] = 1.0
    return x


def fit_simulator(
    histories: Histories,
    genre_matrix: np.ndarray,
    scale: RatingScale,
    star: float,
    seed: int = 0,
    start_events: int = 20,
    position_bias: float = 0.5,
    salience: float = 5.0,
    rating_share: float = 0.5,
    leave: float = 0.05,
    item_item: ItemItem = ease,
) -> SimulatorFit:
    """`histories` of the simulator's users, `genre_matrix` [items + 1, genres] of the catalogue; `star` is the step of
    the rating scale. Users start with their first `start_events` events. `item_item(histories, users, items)`: the
    taste model, [items + 1, items + 1]. Deterministic.

    Raises DataError where fewer than five users have MIN_HISTORY + 1 events, where no event on an item that is new to
    its user is left to fit or to evaluate the choice, and where no rating is left to fit or held out.
    """
    long_enough = np.flatnonzero(histories.lengths() > MIN_HISTORY)
    if len(long_enough) < 5:
        raise DataError(f"{len(long_enough)} users have more than {MIN_HISTORY} events, expected at least 5")
    items = len(genre_matrix) - 1
    order = np.random.default_rng(seed).permutation(long_enough)
    matrix_users, choice_users, test_users = np.split(order, [3 * len(order) // 5, 4 * len(order) // 5])
    matrix = item_item(histories, matrix_users, items)
    of_matrix = np.isin(histories.users(), matrix_users)
    log_popularity = np.log1p(np.bincount(histories.items[of_matrix], minlength=items + 1)).astype(np.float32)
    directions = genre_directions(genre_matrix)
    tables: dict[str, Any] = {"item_item": matrix, "log_popularity": log_popularity, "directions": directions}

    train, test = _cases(histories, choice_users), _cases(histories, test_users)
    if not train or not test:
        raise DataError(
            f"{len(train)} events on items that are new to their user fit the choice and {len(test)} evaluate it, "
            f"after {MIN_HISTORY} events each, expected some of both"
        )
    fits, coefficients = [], np.zeros(3)
    for decay in DECAYS:
        features_of = functools.partial(_choice_features, decay=decay, **tables)
        coefficients, nats = fit_choice(train, features_of, items, start=coefficients)  # near those of the decay before
        fits.append((nats, decay, coefficients, features_of))
    _, decay, coefficients, features_of = min(fits, key=lambda fit: fit[0])
    popularity_of = functools.partial(_popularity, log_popularity=log_popularity)
    of_popularity, _ = fit_choice(train, popularity_of, items, start=np.zeros(1))
    nats, ranked = _evaluate(test, features_of, items, coefficients)
    popularity_nats, popularity_ranked = _evaluate(test, popularity_of, items, of_popularity)

    rated, rating_rmse, mean_rmse = fit_ratings(histories, items, seed)
    first_events = profiles(histories, np.zeros(histories.user_count, np.int64), start_events)
    scalars = {
        "taste": coefficients[0],
        "decay": decay,
        "popularity": coefficients[1],
        "repetition": coefficients[2],
        "position_bias": position_bias,
        "salience": salience,
        "rating_share": rating_share,
        "leave": leave,
        "rating_noise": rating_rmse,
    }
    params = SimulatorParams(
        item_item=jnp.asarray(matrix),
        log_popularity=jnp.asarray(log_popularity),
        genre_directions=jnp.asarray(directions),
        rating_range=jnp.array([scale.minimum, scale.maximum, star], jnp.float32),
        **first_events,
        **{name: jnp.asarray(array, jnp.float32) for name, array in rated.items()},
        **{name: jnp.float32(number) for name, number in scalars.items()},
    )
    uniform = float(np.log(items - np.array([len(set(history)) for history, _ in test])).mean())
    without_taste = ~np.isin(np.arange(histories.user_count), matrix_users)
    return SimulatorFit(
        params, nats, popularity_nats, uniform, ranked, popularity_ranked, rating_rmse, mean_rmse, without_taste
    )


def profiles(histories: Histories, first: np.ndarray, events: int) -> dict[str, jax.Array]:
    """`profile` and `profile_rating` of SimulatorParams: `events` successive events of each user from its event
    `first` [users] on, or as many as there are, at most TASTE_EVENTS."""
    places = first[:, None] + np.arange(TASTE_EVENTS)
    lengths = np.minimum(np.minimum(first + events, first + TASTE_EVENTS), histories.lengths()) - first
    backwards = places[:, :1] + lengths[:, None] - 1 - np.arange(TASTE_EVENTS)  # the last one first
    where = np.arange(TASTE_EVENTS) < lengths[:, None]
    rows = np.where(where, histories.offsets[:-1, None] + backwards, 0)
    ratings = np.where(where, histories.ratings[rows], 0.0)
    items = np.where(where, histories.items[rows], 0)
    return {"profile": jnp.asarray(items, jnp.int32), "profile_rating": jnp.asarray(ratings, jnp.float32)}


ChoiceCases = Sequence[tuple[np.ndarray, int]]


class ChoiceFeatures(NamedTuple):
    """What the choices of some cases depend on: `values` [features, cases, items + 1] float32, and the `candidates`
    [cases, items + 1] bool that can be chosen."""

    values: np.ndarray
    candidates: np.ndarray


FeaturesOf = Callable[[ChoiceCases], ChoiceFeatures]


def _cases(histories: Histories, users: np.ndarray) -> ChoiceCases:
    """(items before, next item), up to CASES_PER_USER evenly spaced ones of each user, after MIN_HISTORY events."""
    cases = []
    for user in users:
        items = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        at = np.unique(np.linspace(MIN_HISTORY, len(items) - 1, CASES_PER_USER).astype(np.int64))
        cases += [(items[:end], int(items[end])) for end in at if items[end] not in items[:end]]
    return cases


def _choice_features(
    cases: ChoiceCases, decay: float, item_item: np.ndarray, log_popularity: np.ndarray, directions: np.ndarray
) -> ChoiceFeatures:
    """The three features that taste, popularity and repetition weigh."""
    popularity = _popularity(cases, log_popularity)
    taste, repetition = (np.empty(popularity.candidates.shape, np.float32) for _ in range(2))
    for number, (history, _) in enumerate(cases):
        recent = history[::-1][:TASTE_EVENTS]
        taste[number] = (decay ** np.arange(len(recent))).astype(np.float32) @ item_item[recent]
        repetition[number] = directions @ directions[recent[:REPEATED]].mean(axis=0)
    return ChoiceFeatures(np.stack([taste, popularity.values[0], repetition]), popularity.candidates)


def _popularity(cases: ChoiceCases, log_popularity: np.ndarray) -> ChoiceFeatures:
    """Popularity alone."""
    candidates = np.ones((len(cases), len(log_popularity)), bool)
    candidates[:, 0] = False
    for number, (history, _) in enumerate(cases):
        candidates[number, history] = False
    return ChoiceFeatures(np.broadcast_to(log_popularity, (1, *candidates.shape)), candidates)


def _chunks(cases: ChoiceCases, features_of: FeaturesOf, items: int) -> Iterator[tuple[ChoiceFeatures, np.ndarray]]:
    """The features of some cases at a time, and their targets [cases]: as much memory whatever the number of cases."""
    size = max(1, VALUES_AT_A_TIME // (items + 1))
    for first in range(0, len(cases), size):
        chunk = cases[first : first + size]
        yield features_of(chunk), np.array([target for _, target in chunk])


def _choice_logits(features: ChoiceFeatures, coefficients: np.ndarray) -> np.ndarray:
    """[cases, items + 1] float32: NEVER where an item cannot be chosen."""
    logits = np.tensordot(coefficients.astype(np.float32), features.values, axes=1)
    return np.where(features.candidates, logits, np.float32(NEVER))


def fit_choice(cases: ChoiceCases, features_of: FeaturesOf, items: int, start: np.ndarray) -> tuple[np.ndarray, float]:
    """The coefficients [features] of a multinomial logit by maximum likelihood, from `start` on, and nats per case.

    Each step goes over all cases in chunks and computes their features again, since those of all cases of a large
    catalogue would take gigabytes. A trust-region Newton method needs few steps: the loss is convex, and its Hessian is
    as small as there are features.
    """

    @functools.lru_cache(maxsize=2)
    def at(coefficients: tuple[float, ...]) -> tuple[float, np.ndarray, np.ndarray]:
        """The loss, its gradient and its Hessian: the covariance of the features under the model."""
        loss, slope = 0.0, np.zeros(len(coefficients))
        curvature = np.zeros((len(coefficients), len(coefficients)))
        for features, targets in _chunks(cases, features_of, items):
            logits, rows = _choice_logits(features, np.array(coefficients)), np.arange(len(targets))
            top = logits.max(axis=1, keepdims=True)
            chances = np.exp(logits - top)
            total = chances.sum(axis=1, keepdims=True)
            chances /= total
            loss += float(
                (np.log(total) + top)[:, 0].sum(dtype=np.float64) - logits[rows, targets].sum(dtype=np.float64)
            )
            means = np.stack([np.einsum("ci,ci->c", chances, each) for each in features.values]).astype(np.float64)
            slope += (means - features.values[:, rows, targets]).sum(axis=1)
            curvature -= means @ means.T
            for one, weighed in enumerate(chances * each for each in features.values):
                curvature[one] += [
                    np.einsum("ci,ci->c", weighed, other).sum(dtype=np.float64) for other in features.values
                ]
        return loss / len(cases), slope / len(cases), (curvature + curvature.T) / (2 * len(cases))

    found = minimize(
        lambda x: at(tuple(x))[0],
        start,
        jac=lambda x: at(tuple(x))[1],
        hess=lambda x: at(tuple(x))[2],
        method="trust-exact",
        options={"gtol": 1e-5},
    )
    return found.x, float(found.fun)


def _evaluate(cases: ChoiceCases, features_of: FeaturesOf, items: int, coefficients: np.ndarray) -> tuple[float, float]:
    """Nats per case and NDCG@10 (ties count against the target) of the choice among all items."""
    nats, ranks = [], []
    for features, targets in _chunks(cases, features_of, items):
        logits = _choice_logits(features, coefficients)
        chosen, top = logits[np.arange(len(targets)), targets], logits.max(axis=1)
        nats.append(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - chosen)
        ranks.append((logits >= chosen[:, None]).sum(axis=1))
    return float(np.concatenate(nats).mean()), float(np.asarray(ndcg(np.concatenate(ranks), 10)).mean())


def fit_ratings(histories: Histories, items: int, seed: int) -> tuple[dict[str, np.ndarray], float, float]:
    """Matrix factorization by alternating ridge regressions (Koren et al. 2009), with a bias as the first factor of
    users and of items; beside it the root mean squared errors of held-out ratings, and of the mean rating for them.
    Raises DataError where no rating is held out, or none is fitted."""
    rated = np.flatnonzero(~np.isnan(histories.ratings))
    held_out = np.random.default_rng(seed + 1).random(len(rated)) < 0.1
    if held_out.all() or not held_out.any():
        raise DataError(
            f"{len(rated)} events have a rating, and {held_out.sum()} of these are held out; expected some to be held "
            "out and some to be fitted"
        )
    users, rows = histories.users(), rated[~held_out]
    mean = float(histories.ratings[rows].mean())
    rng = np.random.default_rng(seed + 2)
    user = np.zeros((histories.user_count, FACTORS + 2))
    item = 0.1 * rng.standard_normal((items + 1, FACTORS + 2))
    user[:, 1] = item[:, 0] = 1.0  # [bias, 1, factors] meets [1, bias, factors]
    item[:, 1] = item[0, 2:] = 0.0
    for _ in range(FACTOR_ROUNDS):
        _ridge(user, item, users[rows], histories.items[rows], histories.ratings[rows] - mean, fixed=1)
        _ridge(item, user, histories.items[rows], users[rows], histories.ratings[rows] - mean, fixed=0)
    test = rated[held_out]
    errors = histories.ratings[test] - mean - (user[users[test]] * item[histories.items[test]]).sum(axis=1)
    params = {
        "mean_rating": np.array(mean),
        "user_bias": user[:, 0],
        "user_factors": user[:, 2:],
        "item_bias": item[:, 1],
        "item_factors": item[:, 2:],
    }
    rmse = [float(np.sqrt(np.mean(np.square(each)))) for each in (errors, histories.ratings[test] - mean)]
    return params, rmse[0], rmse[1]


def _ridge(
    solved: np.ndarray, other: np.ndarray, rows: np.ndarray, columns: np.ndarray, ratings: np.ndarray, fixed: int
) -> None:
    """Sets each row of `solved`, but for its column `fixed` (which is 1), to the ridge regression of its ratings."""
    free = [column for column in range(solved.shape[1]) if column != fixed]
    order = np.argsort(rows, kind="stable")
    edges = np.flatnonzero(np.diff(rows[order])) + 1
    for group in np.split(order, edges):
        x = other[columns[group]]
        y = ratings[group] - x[:, fixed]
        x = x[:, free]
        solved[rows[group[0]], free] = np.linalg.solve(x.T @ x + FACTOR_RIDGE * np.eye(len(free)), x.T @ y)
