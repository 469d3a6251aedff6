"""Learns a policy by playing an environment: advantage actor-critic on whole rollouts.

One update lets every user of a batch (`vmap`) go `steps` steps (`scan`), replaces those who left by new ones, and
follows the policy gradient once; many updates are one compiled scan. The return of a step is the TD(λ) return

    G_t = r_t + γ * (1 - done_t) * ((1 - λ) * v(s_(t+1)) + λ * G_(t+1))

whose distance to v(s_t) is the generalized advantage estimate (Schulman et al. 2016, equation 16); the last step is
continued by the value. With λ = 1 and long rollouts it is REINFORCE with a learned baseline, with γ = 0 the policy
wants the next reward only. Advantages are divided by their root mean square in the batch, so that one learning rate
fits every γ; that changes the length of the gradient, not its direction. Beside it: an entropy bonus (Williams and Peng
1991) which falls to 0, where `kl_target` is set the leash to the policy that training started from, and where there is
an anchor its loss, which holds the policy to what else it is to do well.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxrec.config import to_json
from jaxrec.errors import DataError, TrainingError, TrainingStopped
from jaxrec.files import new_file, read_json, write_text
from jaxrec.rl.logged.learner import slate_coverage
from jaxrec.rl.losses.kl_penalty import next_kl_weight
from jaxrec.rl.losses.policy_gradient import baseline_loss, reinforce_loss
from jaxrec.rl.policy import entropy, kl_divergence
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.environment_policy import Params, Policy, act, action_logprobs, new_policy
from jaxrec.training.stopping import StopRequested, never

CONFIG_FILE, LEARNER_FILE, LOG_FILE, PLOT_FILE = "config.json", "learner.npz", "log.jsonl", "training.png"


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """`users` play at once, for `steps` steps in each of `updates` updates. `discount` is γ and `trace` λ. `kl_target`
    in nats; None: no leash. `updates_per_record`: how many updates a record of the log is the mean of; after each
    record the learner is saved. `hidden`: width of the network, where no other policy is trained."""

    seed: int = 0
    users: int = 256
    steps: int = 16
    updates: int = 2000
    discount: float = 0.95
    trace: float = 0.9
    learning_rate: float = 1e-2
    entropy_weight: float = 0.1
    kl_target: float | None = None
    hidden: int = 64
    updates_per_record: int = 100


class Learner(NamedTuple):
    """All that an update changes, and `reference`, the parameters of the policy that training started from. `state` and
    `observation` [users, ...] are where the users stand."""

    params: Params
    reference: Params
    optimizer: optax.OptState
    kl_coefficient: jax.Array
    state: Any
    observation: Any
    step: jax.Array


class Rollout(NamedTuple):
    """What happened, each [steps, users, ...]; `features` and `recommendable` of the observation before the action."""

    features: Any
    recommendable: jax.Array
    slates: jax.Array
    reward: jax.Array
    done: jax.Array
    terms: dict[str, jax.Array]


Anchor = Callable[[Params, jax.Array], jax.Array]
"""anchor(parameters, key of the update) -> a loss that is added to that of the rewards."""
Updates = Callable[[Learner, jax.Array, int], tuple[Learner, dict[str, jax.Array]]]


def td_lambda_returns(
    reward: jax.Array, done: jax.Array, next_value: jax.Array, discount: float, trace: float
) -> jax.Array:
    """G [steps, ...] of the module's text; `next_value` [steps, ...] is v(s_(t+1)), and G after the last step."""

    def earlier(later: jax.Array, at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        r_t, stays_t, v_tp1 = at
        g_t = r_t + discount * stays_t * ((1.0 - trace) * v_tp1 + trace * later)
        return g_t, g_t

    stays = 1.0 - done.astype(jnp.float32)
    return jax.lax.scan(earlier, next_value[-1], (reward, stays, next_value), reverse=True)[1]


def new_learner(
    environment: Environment, policy: Policy, config: OnPolicyConfig, start: Params | None = None
) -> Learner:
    """A learner with new users, whose policy is `start`, or the network's own."""
    params = policy.start if start is None else start
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), config.updates), config.users)
    state, observation = jax.vmap(environment.reset)(keys)
    # Copies, because updates take the learner's buffers.
    return jax.tree.map(
        jnp.array,
        Learner(params, params, _optimizer(config).init(params), jnp.float32(1.0), state, observation, jnp.int32(0)),
    )


def roll_out(
    environment: Environment,
    policy: Policy,
    params: Params,
    state: Any,
    observation: Any,
    key: jax.Array,
    steps: int,
) -> tuple[tuple[Any, Any], Rollout]:
    """Lets users [users, ...] go `steps` steps under the policy; who leaves is replaced by a new user at once."""
    users = jax.tree.leaves(observation)[0].shape[0]

    def go(at: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], Rollout]:
        state, observation = at
        act_key, step_key, reset_key = jax.random.split(key, 3)
        features = jax.vmap(environment.features)(observation)
        recommendable = jax.vmap(environment.recommendable)(observation)
        slates, actions = act(environment, act_key, policy.logits(params, features, recommendable))
        new, seen, reward, done = jax.vmap(environment.step)(state, actions, jax.random.split(step_key, users))
        terms = jax.vmap(environment.terms)(seen, reward)
        fresh = jax.vmap(environment.reset)(jax.random.split(reset_key, users))
        after = jax.tree.map(
            lambda old, new: jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), new, old), (new, seen), fresh
        )
        return after, Rollout(features, recommendable, slates, reward, done, terms)

    return jax.lax.scan(go, (state, observation), jax.random.split(key, steps))


def make_updates(
    environment: Environment,
    policy: Policy,
    config: OnPolicyConfig,
    permuted: bool = False,
    anchor: Anchor | None = None,
) -> Updates:
    """updates(learner, key, count) -> (learner, metrics [count] each), in one compiled scan.

    The learner is donated. The key is the run's; the number of the update is folded in. With `permuted` each user is
    paid the reward of another one of the same step, drawn at random: a control, which has nothing to learn.
    """
    optimizer = _optimizer(config)

    def update(key: jax.Array, learner: Learner) -> tuple[Learner, dict[str, jax.Array]]:
        (state, observation), rollout = roll_out(
            environment,
            policy,
            learner.params,
            learner.state,
            learner.observation,
            jax.random.fold_in(key, learner.step),
            config.steps,
        )
        # Keys beyond those of the updates and of the first users, so that neither changes what is played.
        permuted_key, anchor_key = (
            jax.random.fold_in(key, rounds * config.updates + 1 + learner.step) for rounds in (1, 2)
        )
        paid = _among_users(permuted_key, rollout.reward) if permuted else rollout.reward
        last_features = jax.vmap(environment.features)(observation)
        every_features = jax.tree.map(
            lambda seen, last: jnp.concatenate([seen, last[None]]), rollout.features, last_features
        )
        bonus = config.entropy_weight * jnp.maximum(1.0 - learner.step / config.updates, 0.0)

        def loss_of(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            logits = policy.logits(params, rollout.features, rollout.recommendable)
            values = policy.value(params, every_features)
            achieved = jax.lax.stop_gradient(
                td_lambda_returns(paid, rollout.done, values[1:], config.discount, config.trace)
            )
            advantages = jax.lax.stop_gradient(achieved - values[:-1])
            advantages /= jnp.sqrt(jnp.mean(jnp.square(advantages)) + 1e-8)
            logprobs = action_logprobs(logits, rollout.slates)
            # Every slot is answerable for all of the return: the user looks at the slate as a whole.
            every_slot = jnp.broadcast_to(advantages[..., None], logprobs.shape).reshape(-1, logprobs.shape[-1])
            where = jnp.ones(every_slot.shape, bool)
            policy_loss = reinforce_loss(
                logprobs.reshape(every_slot.shape), every_slot, jnp.zeros_like(every_slot), where
            )
            value_loss = baseline_loss(values[:-1], achieved, jnp.ones(achieved.shape, bool))
            spread = jnp.mean(entropy(logits))
            reference = policy.logits(learner.reference, rollout.features, rollout.recommendable)
            kl = jnp.mean(kl_divergence(logits, reference))
            leash = learner.kl_coefficient * kl if config.kl_target is not None else 0.0
            metrics = {"kl": kl, "entropy": spread, "baseline_loss": value_loss}
            loss = policy_loss + value_loss - bonus * spread + leash
            if anchor is not None:
                metrics["anchor_loss"] = anchor(params, anchor_key)
                loss += metrics["anchor_loss"]
            return loss, metrics

        gradients, metrics = jax.grad(loss_of, has_aux=True)(learner.params)
        changes, optimizer_state = optimizer.update(gradients, learner.optimizer, learner.params)
        coefficient = learner.kl_coefficient
        if config.kl_target is not None:
            coefficient = next_kl_weight(coefficient, metrics["kl"], config.kl_target)
        allowed = jnp.take_along_axis(rollout.recommendable, rollout.slates, axis=-1)
        metrics |= {
            "reward": jnp.mean(rollout.reward),
            **{f"reward_{name}": jnp.mean(term) for name, term in rollout.terms.items()},
            "left": jnp.mean(rollout.done.astype(jnp.float32)),
            "coverage": slate_coverage(jnp.where(allowed, rollout.slates, 0), environment.item_count + 1),
            "kl_coefficient": learner.kl_coefficient,
        }
        params = optax.apply_updates(learner.params, changes)
        learner = Learner(params, learner.reference, optimizer_state, coefficient, state, observation, learner.step + 1)
        return learner, metrics

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
    def updates(learner: Learner, key: jax.Array, count: int) -> tuple[Learner, dict[str, jax.Array]]:
        return jax.lax.scan(lambda carry, _: update(key, carry), learner, length=count)

    return updates


def _among_users(key: jax.Array, reward: jax.Array) -> jax.Array:
    """reward [steps, users] in another order in each step."""
    return jax.vmap(jax.random.permutation)(jax.random.split(key, len(reward)), reward)


class Trained(NamedTuple):
    """`params` of `policy`, and one record per `updates_per_record` updates: the means of its metrics."""

    policy: Policy
    params: Params
    log: list[dict[str, float]]


def train_on_policy(
    environment: Environment,
    config: OnPolicyConfig,
    folder: Path | None = None,
    start: Params | None = None,
    policy: Policy | None = None,
    permuted: bool = False,
    anchor: Anchor | None = None,
    stop: StopRequested = never,
) -> Trained:
    """Plays and learns; `policy` None: a new small network. In `folder`, if given, the learner, its log and a plot are
    kept, and an interrupted run goes on from there with exactly the result of one left in peace.

    Raises DataError where `folder` holds a run of another configuration, TrainingError when a figure is not finite,
    TrainingStopped where `stop()` ended it before the last update.
    """
    if policy is None:
        policy = new_policy(environment, config.hidden, config.seed)
    learner = new_learner(environment, policy, config, start)
    log: list[dict[str, float]] = []
    if folder is not None:
        learner, log = _resume(folder, config, learner)
    updates, key = make_updates(environment, policy, config, permuted, anchor), jax.random.key(config.seed)
    with tqdm(total=config.updates, initial=int(learner.step), desc="play", unit="update", disable=None) as bar:
        while int(learner.step) < config.updates:
            count = min(config.updates_per_record, config.updates - int(learner.step))
            learner, metrics = updates(learner, key, count)
            record = {name: float(values.mean()) for name, values in jax.device_get(metrics).items()}
            wrong = [name for name, mean in record.items() if not np.isfinite(mean)]
            if wrong:
                raise TrainingError(f"{wrong[0]} is not finite in the {count} updates before {int(learner.step)}")
            log.append({"step": int(learner.step), **record})
            if folder is not None:
                _save(folder, config, learner, log)
            bar.update(count)
            bar.set_postfix(reward=f"{record['reward']:.4f}", kl=f"{record['kl']:.3f}")
            if int(learner.step) < config.updates and stop():
                saved = "" if folder is None else " and saved"
                raise TrainingStopped(f"stopped{saved} after update {int(learner.step)} of {config.updates}")
    if folder is not None:
        plot_on_policy(log, folder / PLOT_FILE)
    return Trained(policy, learner.params, log)


def plot_on_policy(log: list[dict[str, float]], path: Path) -> None:
    """Reward, entropy and KL to the start, and coverage by update, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    steps = [record["step"] for record in log]
    panels = {"reward": ["reward"], "nats": ["entropy", "kl"], "share of all items": ["coverage"]}
    for axis, (label, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            axis.plot(steps, [record[name] for record in log], label=name)
        axis.set(xlabel="update", ylabel=label)
        axis.legend(fontsize="small")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _save(folder: Path, config: OnPolicyConfig, learner: Learner, log: list[dict[str, float]]) -> None:
    """The log is inside the file of the learner too, so that both are of the same update whenever the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_FILE, json.dumps(to_json(config), indent=2) + "\n")
    lines = "".join(json.dumps(record) + "\n" for record in log)
    leaves: dict[str, Any] = {f"leaf_{n}": np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(learner))}
    with new_file(folder / LEARNER_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, log=np.array(lines), **leaves)
    write_text(folder / LOG_FILE, lines)


def _resume(folder: Path, config: OnPolicyConfig, new: Learner) -> tuple[Learner, list[dict[str, float]]]:
    """The learner and log that `folder` holds; the new one where it holds none."""
    path = folder / LEARNER_FILE
    if not path.exists():
        return new, []
    if read_json(folder / CONFIG_FILE, "choose another folder") != to_json(config):
        raise DataError(f"{folder} holds a run of another configuration; choose another folder")
    leaves, structure = jax.tree.flatten(new)
    with np.load(path, allow_pickle=False) as saved:
        kept = [saved[f"leaf_{n}"] for n in range(len(leaves)) if f"leaf_{n}" in saved]
        log = [json.loads(line) for line in str(saved["log"]).splitlines()]
    if [leaf.shape for leaf in kept] != [leaf.shape for leaf in leaves]:
        raise DataError(f"{path}: its arrays do not fit the environment; choose another folder")
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in kept]), log


def _optimizer(config: OnPolicyConfig) -> optax.GradientTransformation:
    """Adam, whose rate falls linearly to a tenth."""
    schedule = optax.linear_schedule(config.learning_rate, 0.1 * config.learning_rate, config.updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
