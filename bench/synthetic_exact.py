"""The synthetic environment solved: the value of every policy, and the best policy, without sampling.

A state is the topics of the items that were taken and shown, numbered in the order of `all_states`. An action leads to
one of two states, by whether the item is taken; with W(s) the value after staying,

    Q(s, i) = p + (1 - leave) * (p * V(s with i taken) + (1 - p) * V(s with i not taken)),    p = p(take i | s)

(Bellman's equations; Sutton and Barto 2018, equations 3.14 and 3.19). All in float64.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.synthetic import (
    SHOWN,
    TAKEN,
    SyntheticParams,
    SyntheticState,
    logging_logprobs,
    take_probability,
)

TOLERANCE = 1e-9  # of the iterated values, which are of the size of 1 / leave


class Model(NamedTuple):
    """The environment as tables: `take` [states, items] float64, the probability that items 1.. are taken;
    `item_topic` [items] int64; `if_taken` and `if_not` [states, topics] int64, the states that follow an item of each
    topic; `stay` = 1 - leave; `start` [states] float64."""

    take: np.ndarray
    item_topic: np.ndarray
    if_taken: np.ndarray
    if_not: np.ndarray
    stay: float
    start: np.ndarray


def all_topics(topics: int) -> np.ndarray:
    """[states, TAKEN + SHOWN] int64: the topics of what was taken, then of what was shown; the last digit runs."""
    return np.array(list(itertools.product(range(topics), repeat=TAKEN + SHOWN)), np.int64)


def places(topics: int) -> np.ndarray:
    """[TAKEN + SHOWN] int64: what each digit of a state's number counts."""
    return topics ** np.arange(TAKEN + SHOWN - 1, -1, -1)


def all_states(params: SyntheticParams) -> SyntheticState:
    """Every state, [states, ...], with the first item of each topic standing for all of its topic."""
    topics = all_topics(len(params.base))
    item_topic = np.asarray(params.item_topic)
    first = np.array([1 + np.flatnonzero(item_topic[1:] == topic)[0] for topic in range(len(params.base))])
    items = jnp.asarray(first[topics], jnp.int32)
    return SyntheticState(items[:, :TAKEN], items[:, TAKEN:])


def state_number(params: SyntheticParams, state: SyntheticState) -> jax.Array:
    """[] int32: which of `all_states` has the topics of this one."""
    topics = params.item_topic[jnp.concatenate([state.taken, state.shown])]
    return topics @ jnp.asarray(places(len(params.base)), jnp.int32)


def build_model(params: SyntheticParams) -> Model:
    """The tables of the environment."""
    count = len(params.base)
    topics = all_topics(count)
    item_topic = np.asarray(params.item_topic)[1:]
    place = places(count)
    taken, shown = topics[:, :TAKEN], topics[:, TAKEN:]
    successors = []
    for topic in range(count):
        new = np.full((len(topics), 1), topic)
        was_shown = np.hstack([new, shown[:, :-1]])
        successors.append([np.hstack([now, was_shown]) @ place for now in (np.hstack([new, taken[:, :-1]]), taken)])
    of_topic = np.array(successors)  # [topics, taken or not, states]
    take = jax.vmap(lambda state: take_probability(params, state))(all_states(params))
    start = np.bincount(item_topic, weights=np.asarray(params.start)[1:], minlength=count)
    start = start / start.sum()
    # A new user was shown what it has taken, so both halves of its state are the same topics.
    same = (taken[:, : min(TAKEN, SHOWN)] == shown[:, : min(TAKEN, SHOWN)]).all(axis=1)
    longer = taken if TAKEN >= SHOWN else shown
    return Model(
        take=np.asarray(take, np.float64)[:, 1:],
        item_topic=item_topic,
        if_taken=of_topic[:, 0].T,
        if_not=of_topic[:, 1].T,
        stay=1.0 - float(params.leave),
        start=np.where(same, start[longer].prod(axis=1), 0.0),
    )


def action_values(model: Model, values: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """[states, items]: what each item is worth where values [states] are what follows, discounted once more."""
    taken, not_taken = (values[after][:, model.item_topic] for after in (model.if_taken, model.if_not))
    return model.take + discount * model.stay * (model.take * taken + (1.0 - model.take) * not_taken)


def evaluation_sweep(model: Model, policy: np.ndarray, discount: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """What one step of policy [states, items] float, whose rows sum to 1, and then values [states] are worth
    [states]."""
    policy = np.asarray(policy, np.float64)
    taken, not_taken = policy * model.take, policy * (1.0 - model.take)
    of_topic = np.eye(model.if_taken.shape[1])[model.item_topic]  # what follows depends on the item's topic alone
    to_taken, to_not, reward = taken @ of_topic, not_taken @ of_topic, taken.sum(axis=1)

    def sweep(values: np.ndarray) -> np.ndarray:
        follows = (to_taken * values[model.if_taken] + to_not * values[model.if_not]).sum(axis=1)
        return reward + discount * model.stay * follows

    return sweep


def policy_values(model: Model, policy: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """[states]: the value of policy [states, items] float, whose rows sum to 1 (iterative policy evaluation, Sutton
    and Barto 2018, section 4.1)."""
    sweep = evaluation_sweep(model, policy, discount)
    values = np.zeros(len(policy))
    while True:
        new = sweep(values)
        if np.abs(new - values).max() < TOLERANCE:
            return new
        values = new


def values_by_steps(model: Model, policy: np.ndarray, steps: int, discount: float = 1.0) -> np.ndarray:
    """[steps + 1, states]: row h is what policy [states, items] is worth over the next h steps, from 0 for none.

    The sweeps of `policy_values`, from values of 0: each looks one step further ahead.
    """
    sweep = evaluation_sweep(model, policy, discount)
    values = [np.zeros(len(policy))]
    for _ in range(steps):
        values.append(sweep(values[-1]))
    return np.stack(values)


def best_policy(model: Model, discount: float = 1.0) -> np.ndarray:
    """[states, items] float64: the best policy, by policy iteration (Sutton and Barto 2018, section 4.3).

    With discount 0 it is the greedy one, which wants the next reward only.
    """
    values, choice = np.zeros(len(model.take)), np.full(len(model.take), -1)
    while True:
        worth = action_values(model, values, discount)
        held = np.where(choice >= 0, worth[np.arange(len(worth)), choice], -np.inf)
        better = worth.max(axis=1) > held + 10 * TOLERANCE  # else ties could change places for ever
        if not better.any():
            return deterministic(choice, worth.shape[1])
        choice = np.where(better, worth.argmax(axis=1), choice)
        values = policy_values(model, deterministic(choice, worth.shape[1]), discount)


def deterministic(choice: np.ndarray, items: int) -> np.ndarray:
    """[states, items] float64: the policy that always takes choice [states], counted from 0 for item 1."""
    return np.eye(items)[choice]


def logging_policy(params: SyntheticParams) -> np.ndarray:
    """[states, items] float64: the policy that wrote the log."""
    logprobs = jax.vmap(lambda state: logging_logprobs(params, state))(all_states(params))
    policy = np.exp(np.asarray(logprobs, np.float64))[:, 1:]
    return policy / policy.sum(axis=1, keepdims=True)


def value(model: Model, policy: np.ndarray, steps: int | None = None) -> float:
    """What a new user takes until it leaves, on average, under policy [states, items]; with `steps`, in its first
    `steps` steps."""
    values = policy_values(model, policy) if steps is None else values_by_steps(model, policy, steps)[-1]
    return float(model.start @ values)
