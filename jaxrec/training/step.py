"""The jitted training step of a sequence model: state is a pure pytree, donated; the batch is split over the mesh."""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxrec.config import TrainConfig
from jaxrec.data.batches import TrainBatch
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.models.masks import NEVER
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.losses import next_item_loss, sampled_softmax_loss
from jaxrec.training.sharding import state_sharding, whole_batch, with_item_rows

SAMPLED_ITEMS = 8192
FULL_SOFTMAX_ITEMS = 40_000  # see `softmax_sample`
SequenceModel = TypeVar("SequenceModel", bound=TimeRatingAwareLSTM)


class TrainState(NamedTuple):
    """`params`: trained variables; `fixed`: the others; `opt_state` of optax, whose moments are variables with the
    metadata of their parameters; `step` int32 scalar."""

    params: nnx.State
    fixed: nnx.State
    opt_state: optax.OptState
    step: jax.Array


StepFunction = Any  # of jax.jit: (TrainState, TrainBatch, key) -> (TrainState, metrics), with lower()


def learning_rate(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """The learning rate by step: it warms up linearly, then follows a cosine down to 5 % of its peak."""
    warmup = max(1, int(config.warmup_fraction * total_steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total_steps, warmup + 1), 0.05 * config.learning_rate
    )


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW behind gradient clipping."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(learning_rate(config, total_steps), weight_decay=config.weight_decay),
    )


def initial_state(
    model: SequenceModel, optimizer: optax.GradientTransformation, item_rows: int | None = None
) -> tuple[nnx.GraphDef[SequenceModel], TrainState]:
    """Takes a model apart into its structure and a training state at step 0, with item tables of `item_rows` rows."""
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    if item_rows is not None:
        params, fixed = with_item_rows(params, item_rows), with_item_rows(fixed, item_rows)
    return graphdef, TrainState(params, fixed, optimizer.init(params), jnp.zeros((), jnp.int32))


def softmax_sample(item_count: int, sampled_items: int | None) -> int:
    """How many items estimate the softmax's normalizer in a step; 0: it is computed in full.

    Where the configuration does not say it, it is computed in full up to FULL_SOFTMAX_ITEMS, where a step takes about
    twice as long as a sampled one. Of a step of 1,600 positions the full softmax took 0.40, 0.97, 1.80 and 3.74 s with
    10,000, 30,000, 60,000 and 100,000 items, and 8,192 sampled items 0.46, 0.68, 0.59 and 0.55 s, each the least of
    four steps on a busy machine. Sampling costs some quality: after one epoch of 800,000 events on 30,000 items NDCG@10
    was 0.068 in full, in 228 CPU seconds, 0.064 with 8,192 sampled items, in 119, and 0.061 with 2,048, in 55; the best
    possible is 0.235. Quality was not compared above 30,000 items. `python -m bench.softmax` measures all of this.

    Args:
        item_count: Of the catalogue.
        sampled_items: As in `TrainConfig`.
    """
    if sampled_items is None:
        sampled_items = SAMPLED_ITEMS if item_count > FULL_SOFTMAX_ITEMS else 0
    return sampled_items if sampled_items < item_count else 0


def training_loss(
    model: TimeRatingAwareLSTM,
    batch: TrainBatch,
    key: jax.Array,
    request_gap_dropout: float,
    sampled_items: int | None = None,
    trained_items: np.ndarray | None = None,
    mesh: Mesh | None = None,
    exclude_seen: bool = True,
) -> jax.Array:
    """Next-item loss of every position; each request gap is hidden with the given probability, so that one model
    answers with and without a request time. `sampled_items` as in TrainConfig; `mesh` as in `next_item_loss`.

    `trained_items` [items + 1] bool: the candidates of the full softmax. An item without training events is none, or
    training would teach its vector and its bias that it is never chosen. `exclude_seen`: the user's items up to each
    position are none either (`seen_items`).
    """
    item_vectors = model.item_vectors()
    outputs, _ = model.encode(batch.events, item_vectors, key=jax.random.fold_in(key, 0), starts=batch.starts)
    hidden = jax.random.bernoulli(jax.random.fold_in(key, 1), request_gap_dropout, batch.target_gap.shape)
    queries = model.query(outputs, jnp.where(hidden, UNKNOWN_GAP, batch.target_gap))
    arguments = (queries, item_vectors, model.item_bias(), batch.target, batch.target > 0)
    if trained_items is not None:
        rows = np.zeros(len(item_vectors), bool)  # more than items where the tables are split over devices
        rows[: len(trained_items)] = trained_items
        arguments = (*arguments[:2], jnp.where(rows, arguments[2], NEVER), *arguments[3:])
    sampled = softmax_sample(len(item_vectors) - 1, sampled_items)
    if sampled:
        # A sample seldom meets the few items of a history, so they stay in.
        return sampled_softmax_loss(*arguments, sampled, jax.random.fold_in(key, 2))
    return next_item_loss(*arguments, seen_items(batch) if exclude_seen else None, mesh)


def seen_items(batch: TrainBatch) -> jax.Array:
    """[batch, length, length + width] int32: the user's items up to each position, without its target (0 = none).

    The loss leaves these items out of the softmax where they are never recommended, so that the model need not learn to
    give them low logits.
    """
    item, target = jnp.asarray(batch.events.item), jnp.asarray(batch.target)
    window = jnp.cumsum(jnp.asarray(batch.starts), axis=1)
    position = jnp.arange(item.shape[1])
    seen = (position[None, :] <= position[:, None]) & (window[:, :, None] == window[:, None, :])
    in_window = jnp.where(seen, item[:, None, :], 0)
    before = jnp.asarray(batch.earlier)[:, None, :]
    before = jnp.broadcast_to(before, (*target.shape, before.shape[2]))
    items = jnp.concatenate([in_window, before], axis=2)
    return jnp.where(items == target[:, :, None], 0, items)


def make_train_step(
    graphdef: nnx.GraphDef[SequenceModel],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    request_gap_dropout: float,
    sampled_items: int | None = None,
    trained_items: np.ndarray | None = None,
    exclude_seen: bool = True,
) -> StepFunction:
    """step(state, batch, key) -> (state, {loss, gradient_norm}). The key is the run's; the step number is folded in.

    The state is donated, and stays laid out over the mesh as `state_sharding` says. `sampled_items`, `trained_items`
    and `exclude_seen` as in `training_loss`. On a CPU a program that trains is faster after
    `jaxrec.training.host_memory.keep_freed_memory()`.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: TrainBatch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = whole_batch(batch, mesh)

        def loss_of(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params, state.fixed)
            step_key = jax.random.fold_in(key, state.step)
            rest = (sampled_items, trained_items, mesh, exclude_seen)
            return training_loss(model, batch, step_key, request_gap_dropout, *rest)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        state = TrainState(params, state.fixed, opt_state, state.step + 1)
        return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh)), metrics

    return step
