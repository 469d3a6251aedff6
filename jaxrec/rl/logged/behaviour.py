"""The behaviour policy β of a log without propensities: softmax over items, linear in features that it cannot change.

Chen et al. 2019 (arXiv:1812.02353), section 4.2: a softmax head of its own on the state of the policy's network, fitted
to all logged actions whatever their reward; its gradient does not reach the features. A model of β is only as good as
its features: a cause of the logged choices that is not among them biases every weight. Therefore the fit reports
figures on held-out rows. Prefer propensities that were logged.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.models.features import Array
from jaxrec.models.masks import exclude_items
from jaxrec.rl.updates import Learner, Loss, make_updates, new_learner

BINS = 20  # of the calibration, each of which spans a factor of two
LEAST_PROBABILITY = 1e-6


@dataclasses.dataclass(frozen=True)
class BehaviourConfig:
    """`l2`: the penalty of the squared weights, per row. `patience`: epochs without a better likelihood."""

    max_epochs: int = 50
    patience: int = 3
    batch_size: int = 256
    learning_rate: float = 1e-2
    l2: float = 1e-6
    seed: int = 0


class Behaviour(NamedTuple):
    """log β(item | features) = log_softmax(features @ kernel + bias) over the items that are not excluded; `kernel`
    [width, items + 1], `bias` [items + 1], float32."""

    kernel: jax.Array
    bias: jax.Array

    def logprobs(self, features: Array, exclude: Array) -> jax.Array:
        """[batch, items + 1] of features [batch, width] and the items [batch, any] int32 that were no candidates (0:
        padding, which never is one). No gradient reaches the features."""
        logits = jax.lax.stop_gradient(jnp.asarray(features)) @ self.kernel + self.bias
        return jax.nn.log_softmax(exclude_items(logits, jnp.asarray(exclude)))


class Choices(NamedTuple):
    """Logged choices: `features` [rows, width] float32, `action` [rows] int32 items that were chosen, `exclude` [rows,
    any] int32 items that could not be (0: none)."""

    features: np.ndarray
    action: np.ndarray
    exclude: np.ndarray

    def rows(self, index: np.ndarray) -> "Choices":
        return Choices(*(column[index] for column in self))


@dataclasses.dataclass(frozen=True)
class Fit:
    """Nats per row of the second half of the held-out rows, which chose nothing: `log_likelihood`, beside that of the
    training rows' item frequencies and of a uniform choice. `calibration_error`, of the same rows: the share of
    probability that is in the wrong place (`Calibration`). `epochs` taken."""

    log_likelihood: float
    frequency_log_likelihood: float
    uniform_log_likelihood: float
    calibration_error: float
    epochs: int


class Calibration(NamedTuple):
    """Over all (row, candidate) pairs, by bins of predicted probability [BINS]: `predicted` the sum of probabilities
    per row, `chosen` the choices per row. Both sum to 1; a calibrated model has them equal in every bin."""

    predicted: np.ndarray
    chosen: np.ndarray

    @property
    def error(self) -> float:
        """0 to 1: half the summed differences, the probability that would have to move between bins."""
        return float(np.abs(self.predicted - self.chosen).sum() / 2)


def fit_behaviour(
    training: Choices, held_out: Choices, item_count: int, config: BehaviourConfig = BehaviourConfig()
) -> tuple[Behaviour, Fit]:
    """β in its epoch of best likelihood on the first half of the held-out rows, and how good it is on the second.

    It starts at the logarithm of the smoothed item frequencies (plus one per item); Adam on the mean negative
    log-likelihood. Hold out whole users, the rows of each one after the other, so that at most one is in both halves.
    Raises ValueError where there is nothing to fit or fewer than two rows to hold out, where a logged action is padding
    or excluded, an excluded item is none, a feature is not finite, or the likelihood is not.
    """
    for name, choices, least in (("training", training, 1), ("held-out", held_out, 2)):
        _check(name, choices, item_count, least)
    half = len(held_out.action) // 2
    choosing, held_out = (held_out.rows(rows) for rows in np.split(np.arange(len(held_out.action)), [half]))
    counts = np.bincount(training.action, minlength=item_count + 1) + 1.0
    start = Behaviour(
        jnp.zeros((training.features.shape[1], item_count + 1)),
        jnp.asarray(np.log(counts / counts[1:].sum()), jnp.float32),
    )
    uniform = Behaviour(start.kernel, jnp.zeros(item_count + 1))
    optimizer = optax.adam(config.learning_rate)
    updates = make_updates(_behaviour_loss(config.l2), optimizer)
    learner, rng = new_learner(start, optimizer), np.random.default_rng(config.seed)
    best, best_likelihood, best_epoch = start, log_likelihood(start, choosing, config.batch_size), 0
    device_rows = jax.tree.map(jnp.asarray, training)
    for number in range(1, config.max_epochs + 1):
        order = rng.permutation(len(training.action))
        padded = np.resize(order, -(-len(order) // config.batch_size) * config.batch_size)
        batches = jnp.asarray(padded.reshape(-1, config.batch_size))
        learner, _ = updates(learner, (device_rows, batches), jax.random.key(config.seed), len(batches))
        likelihood = log_likelihood(learner.params, choosing, config.batch_size)
        if not np.isfinite(likelihood):
            raise ValueError(f"epoch {number}: the held-out log-likelihood is {likelihood}, expected a finite number")
        if likelihood > best_likelihood:
            best, best_likelihood, best_epoch = jax.tree.map(jnp.copy, learner.params), likelihood, number
        if number - best_epoch >= config.patience:
            break
    return best, Fit(
        log_likelihood(best, held_out, config.batch_size),
        log_likelihood(start, held_out, config.batch_size),
        log_likelihood(uniform, held_out, config.batch_size),
        calibration(best, held_out, config.batch_size).error,
        best_epoch,
    )


def chosen_logprobs(beta: Behaviour, choices: Choices, batch_size: int = 256) -> np.ndarray:
    """[rows] float64: log β of what was chosen, for `importance_weights`."""
    return np.concatenate(
        [
            np.take_along_axis(logprobs, part.action[:, None], axis=1)[:, 0]
            for part, logprobs in _batches(beta, choices, batch_size)
        ]
    ).astype(np.float64)


def log_likelihood(beta: Behaviour, choices: Choices, batch_size: int = 256) -> float:
    """Mean log β of the choices, in nats."""
    return float(chosen_logprobs(beta, choices, batch_size).mean())


def calibration(beta: Behaviour, choices: Choices, batch_size: int = 256) -> Calibration:
    """How often items were chosen beside how often the model says, by bins of equal width in the logarithm."""
    edges = np.geomspace(LEAST_PROBABILITY, 1.0, BINS + 1)[1:-1]
    predicted, chosen = np.zeros(BINS), np.zeros(BINS)
    for part, logprobs in _batches(beta, choices, batch_size):
        probabilities = np.exp(logprobs.astype(np.float64))
        bins = np.searchsorted(edges, probabilities)
        predicted += np.bincount(bins.ravel(), weights=probabilities.ravel(), minlength=BINS)
        chosen += np.bincount(np.take_along_axis(bins, part.action[:, None], axis=1)[:, 0], minlength=BINS)
    return Calibration(predicted / len(choices.action), chosen / len(choices.action))


def _batches(beta: Behaviour, choices: Choices, batch_size: int) -> Iterator[tuple[Choices, np.ndarray]]:
    """(choices, log-probabilities [batch, items + 1]) of batches; the last is padded for the compiled function."""
    for first in range(0, len(choices.action), batch_size):
        index = np.arange(first, min(first + batch_size, len(choices.action)))
        padded = choices.rows(np.resize(index, batch_size))
        logprobs = _logprobs(beta, jnp.asarray(padded.features), jnp.asarray(padded.exclude))
        yield choices.rows(index), np.asarray(logprobs)[: len(index)]


@jax.jit
def _logprobs(beta: Behaviour, features: jax.Array, exclude: jax.Array) -> jax.Array:
    return beta.logprobs(features, exclude)


def _behaviour_loss(l2: float) -> Loss:
    """The mean negative log-likelihood and the penalty; the data are the choices, and the rows [updates, batch] of an
    epoch's batches."""

    def loss(
        beta: Behaviour, learner: Learner, data: tuple[Choices, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        choices, batches = data
        features, action, exclude = (column[batches[learner.step % len(batches)]] for column in choices)
        chosen = jnp.take_along_axis(beta.logprobs(features, exclude), action[:, None], axis=1)
        return -jnp.mean(chosen) + l2 * jnp.sum(jnp.square(beta.kernel)), ({}, ())

    return loss


def _check(name: str, choices: Choices, item_count: int, least: int) -> None:
    if len(choices.action) < least:
        raise ValueError(f"there are {len(choices.action)} {name} choices, expected at least {least}")
    impossible = (choices.action < 1) | (choices.action > item_count)
    impossible |= (choices.exclude == choices.action[:, None]).any(axis=1)
    if impossible.any():
        row = int(np.argmax(impossible))
        raise ValueError(
            f"{name} row {row}: item {choices.action[row]} was chosen, expected a candidate of 1..{item_count}"
        )
    for what, wrong in (
        (f"an excluded item is not of 0..{item_count}", (choices.exclude < 0) | (choices.exclude > item_count)),
        ("a feature is not finite", ~np.isfinite(choices.features)),
    ):
        if wrong.any():
            raise ValueError(f"{name} row {int(np.argmax(wrong.any(axis=1)))}: {what}")
