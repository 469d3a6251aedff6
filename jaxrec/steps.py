"""The jitted training step of a sequence model: state is a pure pytree, donated; the batch is split over the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.batches import TrainBatch
from jaxrec.config import TrainConfig
from jaxrec.host_memory import keep_freed_memory
from jaxrec.losses import next_item_loss, sampled_softmax_loss
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.schema import UNKNOWN_GAP

DATA_AXIS = "data"
FULL_SOFTMAX_ITEMS = 100_000  # the largest catalogue whose softmax is computed in full unless the configuration says so
SAMPLED_ITEMS = 8192
Model = TypeVar("Model", bound=TimeRatingAwareLSTM)


class TrainState(NamedTuple):
    """`params`: trained variables; `fixed`: the others; `opt_state` of optax; `step` int32 scalar."""

    params: Any
    fixed: Any
    opt_state: optax.OptState
    step: jax.Array


StepFunction = Callable[[TrainState, TrainBatch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW behind gradient clipping; the learning rate warms up linearly, then follows a cosine down to 5 %."""
    warmup = max(1, int(config.warmup_fraction * total_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total_steps, warmup + 1), 0.05 * config.learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )


def initial_state(model: Model, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef[Model], TrainState]:
    """Takes a model apart into its structure and a training state at step 0."""
    graphdef, param_state, fixed_state = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    params, fixed = nnx.to_pure_dict(param_state), nnx.to_pure_dict(fixed_state)
    return graphdef, TrainState(params, fixed, optimizer.init(params), jnp.zeros((), jnp.int32))


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices (or the given ones) as one data-parallel axis; a single device is a mesh of one."""
    return Mesh(np.asarray(devices or jax.devices()), (DATA_AXIS,))


def softmax_sample(item_count: int, sampled_items: int | None) -> int:
    """How many items estimate the softmax's normalizer in a step; 0: it is computed in full."""
    if sampled_items is None:
        sampled_items = SAMPLED_ITEMS if item_count > FULL_SOFTMAX_ITEMS else 0
    return sampled_items if sampled_items < item_count else 0


def training_loss(
    model: TimeRatingAwareLSTM,
    batch: TrainBatch,
    key: jax.Array,
    request_gap_dropout: float,
    sampled_items: int | None = None,
) -> jax.Array:
    """Next-item loss of every position; each request gap is hidden with the given probability, so that one model
    answers with and without a request time. `sampled_items` as in TrainConfig."""
    item_vectors = model.item_vectors()
    outputs, _ = model.encode(batch.events, item_vectors, key=jax.random.fold_in(key, 0), starts=batch.starts)
    hidden = jax.random.bernoulli(jax.random.fold_in(key, 1), request_gap_dropout, batch.target_gap.shape)
    queries = model.query(outputs, jnp.where(hidden, UNKNOWN_GAP, batch.target_gap))
    arguments = (queries, item_vectors, model.item_bias(), batch.target, batch.target > 0)
    sampled = softmax_sample(len(item_vectors) - 1, sampled_items)
    return (
        sampled_softmax_loss(*arguments, sampled, jax.random.fold_in(key, 2)) if sampled else next_item_loss(*arguments)
    )


def make_train_step(
    graphdef: nnx.GraphDef[Model],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    request_gap_dropout: float,
    sampled_items: int | None = None,
) -> StepFunction:
    """step(state, batch, key) -> (state, {loss, gradient_norm}). The key is the run's; the step number is folded in.

    On a CPU the process keeps freed memory from now on (`jaxrec.host_memory`). `sampled_items` as in TrainConfig.
    """
    if mesh.devices.flat[0].platform == "cpu":
        keep_freed_memory()
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(DATA_AXIS))

    @functools.partial(
        jax.jit, donate_argnums=0, in_shardings=(replicated, split, replicated), out_shardings=replicated
    )
    def step(state: TrainState, batch: TrainBatch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss_of(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params, state.fixed)
            step_key = jax.random.fold_in(key, state.step)
            return training_loss(model, batch, step_key, request_gap_dropout, sampled_items)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(params, state.fixed, opt_state, state.step + 1), metrics

    return step
