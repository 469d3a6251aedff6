"""The training loop of reinforcement learning: many updates as one compiled scan, chunk by chunk.

An algorithm gives its loss and its optimizer; gradient, KL controller, progress bar, check for NaN and stopping on
request are the same for all.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxrec.errors import TrainingError, TrainingStopped
from jaxrec.rl.scoring import PolicyParams
from jaxrec.training.stopping import StopRequested, never

CRITIC_LEARNING_RATE = 1e-2
WARMUP_FRACTION = 0.1  # of the updates; the critic learns its level before the policy moves


class Learner(NamedTuple):
    """All that an update changes.

    Attributes:
        params: What the loss is differentiated by.
        optimizer: State of the optimizer.
        kl_coefficient: [] float32, weight of the KL penalty.
        step: [] int32, number of updates so far.
        users: Where simulated users stand; () without them.
    """

    params: Any
    optimizer: optax.OptState
    kl_coefficient: jax.Array
    step: jax.Array
    users: Any = ()


Loss = Callable[[Any, Learner, Any, jax.Array], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]
"""loss(params, learner, data, key) -> (loss, (metrics, users after the update)). The key is that of the whole training:
a loss folds `learner.step` in."""
KlControl = Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
"""control(weight of the KL penalty, metrics of an update) -> its weight in the next update."""
Updates = Callable[[Learner, Any, jax.Array, int], tuple[Learner, dict[str, jax.Array]]]


def new_learner(
    params: Any, optimizer: optax.GradientTransformation, users: Any = (), kl_coefficient: float = 1.0
) -> Learner:
    """A learner before its first update. Arrays are copied, since updates donate them."""
    state = optimizer.init(params)
    learner = Learner(params, state, jnp.float32(kl_coefficient), jnp.zeros((), jnp.int32), users)
    return jax.tree.map(jnp.array, learner)


def make_updates(loss: Loss, optimizer: optax.GradientTransformation, control: KlControl | None = None) -> Updates:
    """Compiles updates(learner, data, key, count) -> (learner, metrics, each [count]).

    The learner is donated. Without `control` the weight of the KL penalty stays as it is.
    """

    def update(learner: Learner, data: Any, key: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        gradients, (metrics, users) = jax.grad(loss, has_aux=True)(learner.params, learner, data, key)
        changes, state = optimizer.update(gradients, learner.optimizer, learner.params)
        coefficient = learner.kl_coefficient
        if control is not None:
            metrics = {**metrics, "kl_coefficient": coefficient}
            coefficient = control(coefficient, metrics)
        params = optax.apply_updates(learner.params, changes)
        return Learner(params, state, coefficient, learner.step + 1, users), metrics

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def updates(learner: Learner, data: Any, key: jax.Array, count: int) -> tuple[Learner, dict[str, jax.Array]]:
        return jax.lax.scan(lambda carry, _: update(carry, data, key), learner, length=count)

    return updates


def run_updates(
    updates: Updates,
    learner: Learner,
    data: Any,
    key: jax.Array,
    total: int,
    chunk: int,
    name: str,
    stop: StopRequested = never,
    kept: str = "",
) -> Iterator[tuple[Learner, list[dict[str, float]]]]:
    """Yields, after each `chunk` updates until there are `total`, the learner and one record per update.

    `name` is shown beside the progress bar; `kept` says in the message of TrainingStopped what is left. Use the learner
    before the next chunk, whose updates take its arrays. Raises TrainingError where a metric is not finite, and
    TrainingStopped where `stop()` is true before the last chunk.
    """
    with tqdm(total=total, initial=int(learner.step), desc=name, unit="update", disable=None) as bar:
        while (start := int(learner.step)) < total:
            count = min(chunk, total - start)
            learner, metrics = updates(learner, data, key, count)
            records = update_records(jax.device_get(metrics), start)
            bar.update(count)
            bar.set_postfix({metric: f"{records[-1][metric]:.4f}" for metric in ("reward", "kl") if metric in metrics})
            yield learner, records
            if start + count < total and stop():
                raise TrainingStopped(f"{name}: stopped after update {start + count} of {total}; {kept}")


def update_records(metrics: dict[str, np.ndarray], start: int) -> list[dict[str, float]]:
    """One record per update from metrics [updates]. Raises TrainingError where one is not finite."""
    for name, values in metrics.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise TrainingError(
                f"{name} is not finite at update {start + wrong[0]} (of updates {start}..{start + len(values) - 1}); "
                "no policy was written, and the one in use stays"
            )
    count = len(next(iter(metrics.values())))
    return [
        {"step": start + number, **{name: float(values[number]) for name, values in metrics.items()}}
        for number in range(count)
    ]


def means(records: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the records of some updates."""
    return {name: float(np.mean([record[name] for record in records])) for name in records[0] if name != "step"}


def policy_optimizer(
    learning_rate: float, updates: int, trained: Mapping[str, jax.Array] | None = None
) -> optax.GradientTransformation:
    """Adam for both parts of PolicyParams.

    The head's rate warms up to `learning_rate`, then follows a cosine down to 0 after `updates`. The critic, whose
    error adds no bias, learns faster.

    Args:
        learning_rate: The head's highest rate.
        updates: How many there will be.
        trained: Of the head's variables that are trained the elements that are, as bool of their shapes; other
            variables and elements stay as they are. None: all are trained.
    """
    warmup = max(1, int(WARMUP_FRACTION * updates))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(updates, warmup + 1))
    transforms = {"head": optax.adam(schedule), "critic": optax.adam(CRITIC_LEARNING_RATE), "kept": optax.set_to_zero()}

    def labels(params: PolicyParams) -> PolicyParams:
        moved = params.head if trained is None else trained
        return PolicyParams({name: "head" if name in moved else "kept" for name in params.head}, "critic")

    def masked(found: PolicyParams, _: Any) -> PolicyParams:
        elements = {name: jnp.where(where, found.head[name], 0.0) for name, where in (trained or {}).items()}
        return found._replace(head={**found.head, **elements})

    return optax.chain(optax.multi_transform(transforms, labels), optax.stateless(masked))
