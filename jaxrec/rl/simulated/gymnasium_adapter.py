"""The environments as `gymnasium.Env`, so that other people's agents can play them (extra `gymnasium`).

Observations are dictionaries of the observation's fields, as NumPy. An action is an item (`Discrete`, from 1 on) or a
slate of items (`MultiDiscrete`, the same). One step of one user at a time, with a call into JAX for each: trainers that
can should use the pure functions, which are some thousand times faster.
"""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from jaxrec.rl.simulated.environment import Environment


class GymnasiumEnvironment(gymnasium.Env[dict[str, Any], Any]):
    """One user of the environment. It knows no time limit; `gymnasium.wrappers.TimeLimit` does."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's way)

    def __init__(self, environment: Environment) -> None:
        items, slate = environment.item_count, environment.slate_size
        self.action_space: spaces.Space[Any] = spaces.Discrete(items, start=1)
        if slate > 1:
            self.action_space = spaces.MultiDiscrete(np.full(slate, items), start=np.ones(slate, np.int64))
        _, seen = jax.eval_shape(environment.reset, jax.random.key(0))
        fields = {name: _space(shape, *environment.bounds[name]) for name, shape in seen._asdict().items()}
        self._fields = spaces.Dict(fields)
        self.observation_space = self._fields
        self._reset, self._step = jax.jit(environment.reset), jax.jit(environment.step)
        self._terms = jax.jit(environment.terms)
        self._key, self._state = jax.random.key(0), None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new user; `seed` decides about it and all that it does."""
        super().reset(seed=seed)
        self._key = jax.random.key(int(self.np_random.integers(2**31)))
        self._state, observation = self._reset(self._next_key())
        return self._observed(observation), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Shows an item or a slate; `info` has the terms of the reward. Raises ValueError for what is no action."""
        if self._state is None:
            raise ValueError("step before reset")
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r}, expected one of {self.action_space}")
        shown = jnp.asarray(action, jnp.int32)
        self._state, observation, reward, done = self._step(self._state, shown, self._next_key())
        info = {name: float(term) for name, term in self._terms(observation, reward).items()}
        return self._observed(observation), float(reward), bool(done), False, info

    def _next_key(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def _observed(self, observation: Any) -> dict[str, Any]:
        fields = {name: np.asarray(array) for name, array in observation._asdict().items()}
        return {
            name: array.astype(self._fields[name].dtype) if array.ndim else np.int64(array)
            for name, array in fields.items()
        }


def _space(like: jax.ShapeDtypeStruct, low: float, high: float) -> spaces.Space[Any]:
    if like.dtype == bool:
        return spaces.MultiBinary(like.shape)
    if not like.shape:
        return spaces.Discrete(int(high - low) + 1, start=int(low))
    dtype: type[np.floating[Any]] | type[np.integer[Any]] = (
        np.float32 if jnp.issubdtype(like.dtype, jnp.floating) else np.int32
    )
    return spaces.Box(low, high, like.shape, dtype)
