"""What trainers and adapters need of an environment: pure functions of one user, to be vectorized with `vmap`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Step = tuple[Any, Any, jax.Array, jax.Array]


class Environment(NamedTuple):
    """Functions of one user, bound to their parameters. Items are 1..`item_count`; 0 is padding.

    `reset(key) -> (state, observation)` and `step(state, action, key) -> (state, observation, reward, done)` know no
    time limit and do not start anew. State and observation are NamedTuples; the observation is what a recommender sees.
    `action` is an item [] int32, or where `slate_size` is above 1 a slate [slate_size] int32, best first; `reward` []
    float32; `done` [] bool. `features(observation)` is the policy's input: [`feature_count`] float32, or where
    `feature_count` is 0 a pytree for a policy of the environment's own. `recommendable(observation)` [item_count + 1]
    bool says what may be shown. `terms(observation, reward)`: what the reward of the step that led to the observation
    is made of, by name. `bounds`: the least and greatest number in each field of the observation; empty where there is
    a policy of its own.
    """

    reset: Callable[[jax.Array], tuple[Any, Any]]
    step: Callable[[Any, jax.Array, jax.Array], Step]
    features: Callable[[Any], Any]
    recommendable: Callable[[Any], jax.Array]
    terms: Callable[[Any, jax.Array], dict[str, jax.Array]]
    item_count: int
    slate_size: int
    feature_count: int
    bounds: dict[str, tuple[float, float]]
