"""The update of `jaxrec.rl.simulated.train` as loops in NumPy and PyTorch, for bench/rl_synthetic.py; imports no JAX.

    TORCH_PYTHON bench/rl_loops.py PARAMS.npz CONFIG_JSON

Prints environment steps per second as JSON. Every way does what the jitted update does: the same environment, networks,
batch, TD(λ) returns, loss, KL to the start, clipping and Adam.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

THREADS = 2


class Users:
    """The synthetic environment, vectorized over its users in NumPy."""

    def __init__(self, params: dict[str, np.ndarray], count: int, seed: int) -> None:
        self.params, self.rng, self.count = params, np.random.default_rng(seed), count
        self.topics = len(params["base"])
        start = params["start"].astype(np.float64)
        self.up_to = np.cumsum(start / start.sum())
        self.taken = self.new(count)
        self.shown = self.taken.copy()

    def new(self, count: int) -> np.ndarray:
        drawn = np.searchsorted(self.up_to, self.rng.random((count, 3)), side="right")
        return np.minimum(drawn, len(self.up_to) - 1)

    def features(self) -> np.ndarray:
        topics = self.params["item_topic"][np.concatenate([self.taken, self.shown], axis=1)]
        return np.eye(self.topics, dtype=np.float32)[topics].reshape(self.count, -1)

    def step(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, rows = self.params, np.arange(self.count)
        topic = p["item_topic"][items]
        taste = p["base"][topic] + p["gain"][p["item_topic"][self.taken], topic[:, None]].mean(axis=1)
        times = (p["item_topic"][self.shown] == topic[:, None]).sum(axis=1)
        chance = p["item_quality"][items] * taste * p["fatigue"] ** times
        draws = self.rng.random((2, self.count))
        taken, done = draws[0] < chance, draws[1] < p["leave"]
        self.shown = np.concatenate([items[:, None], self.shown[:, :-1]], axis=1)
        self.taken[taken] = np.concatenate([items[:, None], self.taken[:, :-1]], axis=1)[taken]
        left = rows[done]
        self.taken[left] = self.shown[left] = self.new(len(left))
        return taken.astype(np.float32), done


def network(inputs: int, outputs: int, hidden: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs))


def drawn(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    up_to = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
    return 1 + (up_to <= rng.random((len(logits), 1)) * up_to[:, -1:]).sum(axis=1)


def returns(reward: np.ndarray, done: np.ndarray, next_value: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    later, found = next_value[-1], np.empty_like(reward)
    for t in reversed(range(len(reward))):
        mixed = (1 - config["trace"]) * next_value[t] + config["trace"] * later
        later = found[t] = reward[t] + config["discount"] * (1 - done[t]) * mixed
    return found


class TorchLearner:
    """The networks and their update in PyTorch."""

    def __init__(self, inputs: int, items: int, config: dict[str, Any]) -> None:
        self.config = config
        self.policy, self.critic = network(inputs, items, config["hidden"]), network(inputs, 1, config["hidden"])
        self.reference = network(inputs, items, config["hidden"])
        self.reference.load_state_dict(self.policy.state_dict())
        self.weights = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, config["learning_rate"])

    def logits(self, features: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.policy(torch.from_numpy(features)).numpy()

    def update(
        self, features: np.ndarray, items: np.ndarray, reward: np.ndarray, done: np.ndarray, last: np.ndarray
    ) -> float:
        """features [steps, users, inputs], items [steps, users] from 1, ..., last [users, inputs]."""
        x = torch.from_numpy(np.concatenate([features, last[None]]))
        values = self.critic(x)[..., 0]
        achieved = torch.from_numpy(returns(reward, done, values[1:].detach().numpy(), self.config))
        advantages = achieved - values[:-1].detach()
        advantages /= torch.sqrt(torch.mean(advantages**2) + 1e-8)
        logprobs = torch.log_softmax(self.policy(x[:-1]), dim=-1)
        with torch.no_grad():
            of_reference = torch.log_softmax(self.reference(x[:-1]), dim=-1)
        chosen = torch.gather(logprobs, 2, torch.from_numpy(items[..., None] - 1))[..., 0]
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1).mean()
        kl = (logprobs.detach().exp() * (logprobs.detach() - of_reference)).sum(dim=-1).mean()
        value_loss = ((values[:-1] - achieved) ** 2).mean()
        loss = -(chosen * advantages).mean() + value_loss - self.config["entropy_weight"] * entropy
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        return float(kl)


class NumpyLearner:
    """The same in NumPy, with the gradient by hand."""

    def __init__(self, inputs: int, items: int, config: dict[str, Any]) -> None:
        self.config, rng, hidden = config, np.random.default_rng(0), config["hidden"]

        def layer(rows: int, columns: int) -> list[np.ndarray]:
            weights = rng.standard_normal((rows, columns)) / np.sqrt(rows)
            return [weights.astype(np.float32), np.zeros(columns, np.float32)]

        self.weights = [*layer(inputs, hidden), *layer(hidden, items), *layer(inputs, hidden), *layer(hidden, 1)]
        self.reference = [weight.copy() for weight in self.weights[:4]]
        self.moments = [(np.zeros_like(weight), np.zeros_like(weight)) for weight in self.weights]
        self.count = 0

    @staticmethod
    def forward(x: np.ndarray, weights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.maximum(x @ weights[0] + weights[1], 0)
        return hidden @ weights[2] + weights[3], hidden

    @staticmethod
    def backward(x: np.ndarray, hidden: np.ndarray, out: np.ndarray, weights: list[np.ndarray]) -> list[np.ndarray]:
        inner = (out @ weights[2].T) * (hidden > 0)
        return [x.T @ inner, inner.sum(axis=0), hidden.T @ out, out.sum(axis=0)]

    def logits(self, features: np.ndarray) -> np.ndarray:
        return self.forward(features, self.weights[:4])[0]

    def update(
        self, features: np.ndarray, items: np.ndarray, reward: np.ndarray, done: np.ndarray, last: np.ndarray
    ) -> float:
        config, n = self.config, reward.size
        x = features.reshape(n, -1)
        out, hidden_v = self.forward(np.concatenate([x, last]), self.weights[4:])
        values = out[:, 0].reshape(len(reward) + 1, -1)
        achieved = returns(reward, done, values[1:], config)
        advantages = (achieved - values[:-1]).ravel()
        errors = -advantages
        advantages = advantages / np.sqrt(np.mean(advantages**2) + 1e-8)
        logits, hidden = self.forward(x, self.weights[:4])
        logits -= logits.max(axis=1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        p = np.exp(logprobs)
        reference = self.forward(x, self.reference)[0]
        reference -= reference.max(axis=1, keepdims=True)
        reference -= np.log(np.exp(reference).sum(axis=1, keepdims=True))
        kl = (p * (logprobs - reference)).sum(axis=1).mean()
        entropy = -(p * logprobs).sum(axis=1, keepdims=True)
        slope = p * advantages[:, None] + config["entropy_weight"] * p * (logprobs + entropy)
        slope[np.arange(n), items.ravel() - 1] -= advantages
        of_values = (2 * errors / n)[:, None].astype(np.float32)
        gradients = self.backward(x, hidden, (slope / n).astype(np.float32), self.weights[:4])
        gradients += self.backward(x, hidden_v[:n], of_values, self.weights[4:])
        norm = np.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        self.count += 1
        for at, gradient in enumerate(gradients):
            clipped = gradient / max(norm, 1.0)
            first, second = self.moments[at]
            self.moments[at] = 0.9 * first + 0.1 * clipped, 0.999 * second + 0.001 * clipped**2
            first, second = self.moments[at]
            scale = np.sqrt(second / (1 - 0.999**self.count)) + 1e-8
            self.weights[at] = self.weights[at] - config["learning_rate"] * first / (1 - 0.9**self.count) / scale
        return float(kl)


def vectorized(learner: Any, users: Users, config: dict[str, Any]) -> None:
    """One update; all users step together."""
    seen: list[list[np.ndarray]] = [[], [], [], []]
    for _ in range(config["steps"]):
        features = users.features()
        items = drawn(learner.logits(features), users.rng)
        for column, value in zip(seen, (features, items, *users.step(items)), strict=True):
            column.append(value)
    learner.update(*(np.stack(column) for column in seen), users.features())


def one_at_a_time(learner: Any, users: list[Users], config: dict[str, Any]) -> None:
    """One update; each user steps alone, as environments with a `step` function invite."""
    columns: list[list[list[np.ndarray]]] = [[], [], [], []]
    for user in users:
        seen: list[list[np.ndarray]] = [[], [], [], []]
        for _ in range(config["steps"]):
            features = user.features()
            items = drawn(learner.logits(features), user.rng)
            for column, value in zip(seen, (features, items, *user.step(items)), strict=True):
                column.append(value)
        for all_users, column in zip(columns, seen, strict=True):
            all_users.append(column)
    last = np.concatenate([user.features() for user in users])
    learner.update(*(np.concatenate(column, axis=1) for column in _by_step(columns)), last)


def _by_step(columns: list[list[list[np.ndarray]]]) -> list[list[np.ndarray]]:
    """[column][user][step] arrays [1, ...] -> [column] of [user] arrays [steps, 1, ...]."""
    return [[np.stack(of_user) for of_user in column] for column in columns]


def rates(run: Callable[[], object], times: int, steps: int, repeats: int) -> list[float]:
    """Steps per second of `times` runs of so many steps each, in each repeat."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(times):
            run()
        found.append(times * steps / (time.perf_counter() - start))
    return found


def main() -> None:
    torch.set_num_threads(THREADS)
    with np.load(sys.argv[1]) as arrays:
        params = dict(arrays)
    config = json.loads(sys.argv[2])
    inputs, items = 6 * len(params["base"]), len(params["item_topic"]) - 1
    found = {}
    steps = config["steps"] * config["users"]
    for name, kind in (("NumPy", NumpyLearner), ("PyTorch", TorchLearner)):
        learner, users = kind(inputs, items, config), Users(params, config["users"], 0)
        vectorized(learner, users, config)
        found[f"all users at once in NumPy, network in {name}"] = rates(
            lambda learner=learner, users=users: vectorized(learner, users, config), 50, steps, config["repeats"]
        )
    for name, kind in (("NumPy", NumpyLearner), ("PyTorch", TorchLearner)):
        learner, each = kind(inputs, items, config), [Users(params, 1, n) for n in range(config["users"])]
        one_at_a_time(learner, each[:2], config)
        found[f"one user at a time in NumPy, network in {name}"] = rates(
            lambda learner=learner, each=each: one_at_a_time(learner, each, config), 1, steps, config["repeats"]
        )
    users, count = Users(params, config["users"], 0), config["users"]
    found["environment alone in NumPy, random items"] = rates(
        lambda: users.step(users.rng.integers(1, items + 1, count)), 500, count, config["repeats"]
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
