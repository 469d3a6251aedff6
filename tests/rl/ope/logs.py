"""Logs of a small bandit and of small slates, whose exact values are sums that are written out here."""

import itertools
from typing import NamedTuple

import numpy as np

from jaxrec.rl.ope.weights import importance_weights

# Two contexts, three actions. Propensities of the logged and of the new policy, and mean rewards.
LOGGED = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
NEW = np.array([[0.2, 0.2, 0.6], [0.6, 0.3, 0.1]])
REWARD = np.array([[0.1, 0.5, 0.9], [0.8, 0.4, 0.2]])
VALUE_LOGGED = float(np.mean(np.sum(LOGGED * REWARD, axis=1)))
VALUE_NEW = float(np.mean(np.sum(NEW * REWARD, axis=1)))

# Weights 2, 1/2, 4; rewards 1, 1, 0; a model that says 0.8, 0.4, 0.5 of what was logged, 0.6, 0.7, 0.1 of the new one.
WEIGHTS = importance_weights(np.log([0.5, 0.2, 0.8]), np.log([0.25, 0.4, 0.2]))
REWARDS = np.array([1.0, 1.0, 0.0])
Q_LOGGED, Q_NEW = np.array([0.8, 0.4, 0.5]), np.array([0.6, 0.7, 0.1])
MODEL, CORRECTIONS = (0.6 + 0.7 + 0.1) / 3, [2 * 0.2, 0.5 * 0.6, 4 * -0.5]


class BanditLog(NamedTuple):
    """All [rows]; `model` [rows, actions] is a reward model that is wrong everywhere by another amount."""

    context: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    new: np.ndarray
    logged: np.ndarray
    model: np.ndarray

    @property
    def q_logged(self) -> np.ndarray:
        return self.model[np.arange(len(self.action)), self.action]

    @property
    def q_new(self) -> np.ndarray:
        return np.sum(NEW[self.context] * self.model, axis=1)


def every_case() -> tuple[BanditLog, np.ndarray]:
    """Each context, action and binary reward once, and the probability of each [rows] under the logged policy."""
    cases = list(itertools.product(range(2), range(3), (0.0, 1.0)))
    context, action, reward = (np.array(column) for column in zip(*cases, strict=True))
    mean = REWARD[context, action]
    probability = 0.5 * LOGGED[context, action] * np.where(reward > 0, mean, 1 - mean)
    return _log(context, action, reward), probability


def draw_bandit(rows: int, seed: int) -> BanditLog:
    rng = np.random.default_rng(seed)
    context = rng.integers(2, size=rows)
    action = (rng.random((rows, 1)) > np.cumsum(LOGGED[context], axis=1)).sum(axis=1)
    return _log(context, action, (rng.random(rows) < REWARD[context, action]).astype(float))


def _log(context: np.ndarray, action: np.ndarray, reward: np.ndarray) -> BanditLog:
    model = 0.7 * REWARD + np.array([[0.3, -0.1, 0.05], [0.0, 0.2, -0.15]])
    return BanditLog(
        context, action, reward, np.log(NEW[context, action]), np.log(LOGGED[context, action]), model[context]
    )
