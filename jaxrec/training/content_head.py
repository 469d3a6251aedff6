"""Item vectors and biases from content alone, for items without training events.

A model never holds the logit of an item without events against one of an item with them, so such items are nowhere
near the first places. A content head predicts the vector and the bias of an item from its features
(`jaxrec.data.content`). It starts as the ridge regression of the trained ones, and is then trained for a few epochs
with everything else frozen, while every item's row is the head's at random, as target and as competitor (Volkovs et
al. 2017, "DropoutNet": there the network is trained with dropped embeddings; here it stays as it is).
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrec.config import TrainConfig
from jaxrec.data.batches import TrainBatch, TrainingData, prefetch
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.errors import TrainingError, TrainingStopped
from jaxrec.models.masks import NEVER
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.loop import steps_key
from jaxrec.training.losses import next_item_loss, sampled_softmax_loss
from jaxrec.training.step import seen_items, softmax_sample
from jaxrec.training.stopping import StopRequested, never

RIDGE_PENALTY = 10.0  # in items of mean weight
RIDGE_ROWS = 10_000  # that are in double precision at a time
EPOCHS, MOST_STEPS = 5, 1000  # a head is small: on a large log it has seen enough after a part of an epoch
HEAD_SHARE = 0.3  # of the items whose rows are the head's in a step
LEARNING_RATE, WEIGHT_DECAY, GRADIENT_CLIP = 5e-3, 0.01, 1.0
NAME = "content head"  # of its random keys


class ContentHead(NamedTuple):
    """`kernel` [features, embedding + 1] and `offset` [embedding + 1] float32: a vector, and last a bias."""

    kernel: np.ndarray | jax.Array
    offset: np.ndarray | jax.Array

    def rows(self, features: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """features [items + 1, features] -> [items + 1, embedding + 1]."""
        return features @ self.kernel + self.offset


def ridge(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, penalty: float = RIDGE_PENALTY
) -> ContentHead:
    """Weighted ridge regression with a free intercept, in closed form and double precision.

    Minimizes sum_i w_i |y_i - F_i K - o|^2 + penalty * mean(w) |K|^2: `penalty` counts in rows of mean weight.

    Args:
        features: [rows, features].
        targets: [rows, outputs].
        weights: [rows], not negative, some of them positive.
        penalty: Strength, above 0.

    Returns:
        The head, float32.

    Examples:
        >>> head = ridge(np.array([[0.0], [1.0]]), np.array([[1.0], [3.0]]), np.ones(2), penalty=0.5)
        >>> head.kernel.tolist(), head.offset.tolist()  # slope 2 * (1/4) / (1/4 + 1/4), through the means
        ([[1.0]], [1.5])
    """
    share = weights.astype(np.float64) / weights.sum()
    mean = share @ targets
    blocks = [slice(start, start + RIDGE_ROWS) for start in range(0, len(features), RIDGE_ROWS)]
    center = np.sum([share[rows] @ features[rows] for rows in blocks], axis=0)
    # Divided by the sum of the weights, the penalty's mean weight is that of one row.
    gram = penalty / len(features) * np.eye(features.shape[1])
    products = np.zeros((features.shape[1], targets.shape[1]))
    for rows in blocks:
        inputs = features[rows] - center
        weighted = inputs.T * share[rows]
        gram += weighted @ inputs
        products += weighted @ (targets[rows] - mean)
    kernel = np.linalg.solve(gram, products)
    return ContentHead(kernel.astype(np.float32), (mean - center @ kernel).astype(np.float32))


def ridge_head(model: TimeRatingAwareLSTM, features: np.ndarray, popularity: np.ndarray) -> ContentHead:
    """The ridge regression of a trained model's vectors and biases on `features` [items + 1, features].

    `popularity` [items + 1]: training events of each item; an item's weight is their square root. Raises TrainingError
    where the head is not finite.
    """
    known = np.flatnonzero(popularity > 0)
    targets = np.concatenate([np.asarray(model.item_vectors()), np.asarray(model.item_bias())[:, None]], axis=1)
    head = ridge(features[known], targets[known].astype(np.float64), np.sqrt(popularity[known]))
    return finite(head, "ridge regression of a trained model's vectors and biases")


def train_head(
    model: TimeRatingAwareLSTM,
    start: ContentHead,
    features: np.ndarray,
    data: PreparedData,
    config: TrainConfig,
    stop: StopRequested = never,
) -> ContentHead:
    """The head after EPOCHS epochs, or MOST_STEPS steps, beside a frozen model.

    Args:
        model: Trained; it is only read.
        start: From `ridge_head`.
        features: [items + 1, features] float32.
        data: What the model was trained on.
        config: Seed, batch size, share of hidden request gaps, sampled softmax.
        stop: Asked between steps.

    Returns:
        The head, which follows from the arguments alone.

    Raises:
        TrainingError: The loss or the head is not finite.
        TrainingStopped: `stop()` became true. Nothing of the head is kept; the next call starts from `start` again and
            ends with the same head.
    """
    batches = TrainingData(data, model.config.max_length, config.batch_tokens)
    steps = min(EPOCHS * batches.steps_per_epoch, MOST_STEPS)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(GRADIENT_CLIP), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))
    trained = jnp.asarray(data.train_popularity() > 0)
    sampled = softmax_sample(len(data.catalog), config.sampled_items)
    graphdef, variables = nnx.split(model)
    step = _make_step(graphdef, optimizer, config.request_gap_dropout, sampled)
    frozen = (variables, jnp.asarray(features), trained)
    head = ContentHead(jnp.asarray(start.kernel), jnp.asarray(start.offset))
    opt_state, key = optimizer.init(head), steps_key(config.seed, NAME)
    pending = jnp.zeros(())  # the loss of the step before, which is read while the device works on the next one
    for number, batch in zip(range(steps), prefetch(_epochs(batches, config)), strict=False):
        if stop():
            raise TrainingStopped("stopped: both models are trained and saved, the content head is not trained yet")
        head, opt_state, loss = step(head, opt_state, frozen, batch, jax.random.fold_in(key, number))
        if not np.isfinite(float(pending)):
            raise TrainingError(_not_finite(f"the loss of the content head is not finite at step {number - 1}"))
        pending = loss
    if not np.isfinite(float(pending)):
        raise TrainingError(_not_finite(f"the loss of the content head is not finite at step {steps - 1}"))
    return finite(ContentHead(*(np.asarray(array) for array in head)), NAME)


def finite(head: ContentHead, name: str) -> ContentHead:
    """`head`, which messages call `name`; raises TrainingError where it holds NaN or infinity."""
    if not all(np.isfinite(array).all() for array in head):
        raise TrainingError(_not_finite(f"the {name} holds NaN or infinity"))
    return head


def _not_finite(what: str) -> str:
    return f"{what}; both models are trained and saved, no content head is written"


def _epochs(batches: TrainingData, config: TrainConfig) -> Iterator[TrainBatch]:
    """EPOCHS epochs in orders that the models were not trained in."""
    for epoch in range(EPOCHS):
        yield from batches.epoch(config.seed, config.max_epochs + epoch)


def _make_step(
    graphdef: nnx.GraphDef[TimeRatingAwareLSTM],
    optimizer: optax.GradientTransformation,
    request_gap_dropout: float,
    sampled_items: int,
) -> Any:
    """step(head, opt_state, (variables, features, trained items), batch, key) -> (head, opt_state, loss)."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        head: ContentHead, opt_state: optax.OptState, frozen: Any, batch: TrainBatch, key: jax.Array
    ) -> tuple[ContentHead, optax.OptState, jax.Array]:
        variables, features, trained = frozen
        model = nnx.merge(graphdef, variables)
        vectors, bias = model.item_vectors(), model.item_bias()
        outputs, _ = model.encode(batch.events, vectors, starts=batch.starts)
        hidden = jax.random.bernoulli(jax.random.fold_in(key, 0), request_gap_dropout, batch.target_gap.shape)
        queries = model.query(outputs, jnp.where(hidden, UNKNOWN_GAP, batch.target_gap))
        from_head = jax.random.bernoulli(jax.random.fold_in(key, 1), HEAD_SHARE, trained.shape)

        def loss_of(head: ContentHead) -> jax.Array:
            rows = head.rows(features)
            item_vectors = jnp.where(from_head[:, None], rows[:, :-1], vectors).at[0].set(0.0)
            item_bias = jnp.where(trained, jnp.where(from_head, rows[:, -1], bias), NEVER)
            arguments = (queries, item_vectors, item_bias, batch.target, batch.target > 0)
            if sampled_items:
                return sampled_softmax_loss(*arguments, sampled_items, jax.random.fold_in(key, 2))
            return next_item_loss(*arguments, seen_items(batch))

        loss, gradients = jax.value_and_grad(loss_of)(head)
        updates, opt_state = optimizer.update(gradients, opt_state, head)
        return optax.apply_updates(head, updates), opt_state, loss

    return step
