"""The closed loop of bench/rl_loop.py in small: a real server, simulated users, a model of random weights."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxrec
from bench.rl_loop import LoopConfig, Users, fitted_users, loop, with_reranker
from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.files import sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.config import LoggedConfig, RewardWeights, ServedConfig
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.served.evaluate import LogEvaluation
from jaxrec.rl.served.event_store import read_served_log
from jaxrec.rl.served.train import train_served
from jaxrec.runs import export, rl_served
from jaxrec.runs import policy as policy_files
from jaxrec.runs.directory import load_supervised, open_run
from tests.rl.simulated.simulated import genre_lovers
from tests.synthetic import random_log

USERS, LIKED = 240, 12
LEARNING = ServedConfig(
    updates=200,
    batch_size=128,
    learning_rate=3e-2,
    kl_target=0.3,
    entropy_floor=0.0,
    coverage_floor=0.0,
    minimum_effective=15.0,
    rewards=RewardWeights(hit=1.0, genre=0.0, rating=0.0),
)
CONFIG = LoopConfig(rounds=1, requests=8, slate=3, temperature=4.0, events=6, learning=LEARNING)


@pytest.fixture(scope="module")
def users(small_data: PreparedData) -> Users:
    """Nearly all of them want the first LIKED items, so that there is much to learn for a model of random weights."""
    users, _ = fitted_users(genre_lovers(small_data, users=USERS), small_data)
    liked = jnp.zeros_like(users.params.log_popularity).at[1 : LIKED + 1].set(3.0)
    return users._replace(params=users.params._replace(log_popularity=liked, popularity=jnp.float32(1.0)))


@pytest.fixture
def run(tmp_path: Path, new_run: Callable[[Path, Hybrid], Path], small_hybrid: Hybrid) -> Iterator[Path]:
    """A run whose policy is that of `model_directory`."""
    supervised = small_hybrid.with_policy(None)
    with pytest.MonkeyPatch.context() as patch:
        for module in (policy_files, export):
            patch.setattr(module, "load_supervised", lambda run, data: supervised)
        folder = new_run(tmp_path, supervised)
        head = nnx.to_pure_dict(nnx.state(small_hybrid.policy))
        trained = TrainedPolicy(PolicyOutcome(True, "for the test"), head, [])
        policy_files.write_policy(open_run(folder), supervised, trained, LEARNING, "reinforce")
        yield folder


def test_what_is_learned_from_the_log_is_served_and_earns_more(
    run: Path, model_directory: Path, users: Users, small_data: PreparedData, tmp_path: Path
) -> None:
    before, after = loop(run, model_directory, users, CONFIG, 0, tmp_path / "serving", learns=True)
    assert before.used, before.decision
    assert after.version != before.version
    assert after.reward.mean() > 1.2 * before.reward.mean()
    log = read_served_log(tmp_path / "serving/events.sqlite", small_data.catalog)
    assert log.attribution_window == 0
    assert log.shown == len(log.recommendations) == 2 * USERS * CONFIG.requests  # all can be learned from
    answers = sum(len(one.responses) for one in log.recommendations)
    assert answers == round(CONFIG.requests * sum(one.taken.sum() for one in (before, after)))
    assert 0 < answers < log.shown
    for one in log.recommendations:
        assert len(one.history.items) >= CONFIG.events
        assert not set(one.slate.tolist()) & set(one.history.items.tolist())


def test_the_weights_of_a_reranker_are_learned_from_its_own_log_and_exported(
    new_run: Callable[[Path, Hybrid], Path],
    small_hybrid: Hybrid,
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    users: Users,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    """The gate is opened, since the slates are drawn anew in each run of the test and it may decide either way. There
    is no trend, since a new store has events for it only in the second round."""
    parts = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence, small_hybrid.mix_weights()
    supervised = with_random_reranker(Hybrid(*parts), small_data)

    def let_pass(*arguments: Any) -> tuple[TrainedPolicy, LogEvaluation]:
        trained, found = train_served(*arguments)
        return trained._replace(outcome=dataclasses.replace(trained.outcome, used=True)), found

    with pytest.MonkeyPatch.context() as patch:
        for module in (policy_files, export):
            patch.setattr(module, "load_supervised", lambda run, data: supervised)
        patch.setattr(rl_served, "train_served", let_pass)
        run = new_run(tmp_path, supervised)
        jaxrec.export(run, tmp_path / "model")
        before, after = loop(run, tmp_path / "model", users, CONFIG, 0, tmp_path / "serving", learns=True)
    assert "effective sample size" in before.decision  # and not that no slate is of the policy in use
    assert after.version != before.version
    exported = policy_files.load_policy(open_run(run), supervised)
    assert exported is not None
    assert exported.policy is not None
    for shift in (exported.policy.direct[...], exported.policy.by_context[...]):
        assert np.abs(shift).max() > 0.1
    assert not np.any(exported.policy.item_bias[...])  # the network is not trained


def test_a_reranker_is_used_in_the_loop_though_its_gate_refused_it(tmp_path: Path) -> None:
    """The log has no structure. Nothing happens when it is asked for again, nor to the run that it is made of."""

    def digests(folder: Path) -> dict[Path, str]:
        return {path: sha256(path) for path in folder.rglob("*") if path.is_file()}

    log = random_log(users=40, items=20, max_events=20, seed=5)
    prepare(log, None, PrepareConfig(1, 1), out=tmp_path / "data")
    small = ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=16)
    jaxrec.train(tmp_path / "data", tmp_path / "run", small, TrainConfig(max_epochs=1))
    config = LoggedConfig(folds=2, fold_epochs=1, decisions=200, updates=20, samples=2)
    supervised = digests(tmp_path / "run")
    run, reason = with_reranker(tmp_path / "run", tmp_path / "reranked", config)
    assert reason.startswith("what ranks now stays: ")
    data = open_run(run).read_data()
    assert load_supervised(open_run(run), data).reranker is not None
    assert load_supervised(open_run(tmp_path / "run"), data).reranker is None
    assert digests(tmp_path / "run") == supervised
    made, times = digests(run), {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert with_reranker(tmp_path / "run", tmp_path / "reranked", config) == (run, reason)
    assert digests(run) == made
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == times


def test_control_never_learns(run: Path, model_directory: Path, users: Users, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, requests=2)
    rounds = loop(run, model_directory, users, config, 0, tmp_path / "serving", learns=False)
    assert [one.decision for one in rounds] == ["", ""]
    assert rounds[0].version == rounds[1].version
    for one in rounds:
        np.testing.assert_allclose(one.reward, 0.5 * one.taken + 0.5 * one.rating, rtol=1e-5)
