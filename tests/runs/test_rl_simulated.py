"""`jaxrec rl RUN --simulator`: whom the simulators are made of, what the gate says, and what it leaves in the run."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from jaxrec.config import LOG_RL, RLConfig
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, USER
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.files import sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.logged.evaluate import Decision, Judged
from jaxrec.rl.logged.train import PolicyOutcome
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import frozen_scoring, policy_logits, supervised_logits
from jaxrec.rl.simulated.evaluate import Measured, Played, decide
from jaxrec.rl.simulated.fit import SimulatorFit
from jaxrec.rl.simulated.policy import recommender_policy
from jaxrec.rl.simulated.split_people import two_simulators
from jaxrec.runs import rl_simulated as simulator_run
from jaxrec.runs.directory import (
    POLICY_FOLDER,
    POLICY_PREVIOUS_FOLDER,
    SIMULATED_OUTCOME_FILE,
    SIMULATOR_PARTIAL_FOLDER,
    open_run,
)
from jaxrec.runs.policy import load_policy, policy_in_use, read_record, read_steps, write_policy
from jaxrec.runs.rl_simulated import METHOD, refuse_unplayable, rl_simulator_run, supervised_head
from tests.rl.simulated.simulated import FIRST_USER, genre_lovers, hand_made

CONFIG = RLConfig(steps=20, batch_size=16, slate_size=3, policy_width=8, learning_rate=1e-3, kl_target=0.05)
STRANGERS = 60


def log_of(data: PreparedData, users: int = STRANGERS) -> pd.DataFrame:
    """Strangers to the run, one of whom has 10 events only, and two of its own users."""
    strangers = genre_lovers(data, users=users)
    few = strangers[USER] == strangers[USER].min()
    own = strangers[strangers[USER] > strangers[USER].max() - 2]
    own = own.assign(**{USER: data.users.raw_ids[own[USER] - own[USER].min()]})
    return pd.concat([strangers[~few], strangers[few][:10], own], ignore_index=True)


@pytest.fixture(scope="module")
def supervised(small_hybrid: Hybrid) -> Iterator[Hybrid]:
    hybrid = small_hybrid.with_policy(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrec.runs.rl_simulated.load_supervised", lambda run, data: hybrid)
        yield hybrid


@pytest.fixture(scope="module")
def ratings(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "ratings.csv"
    columns = ["userId", "movieId", "rating", "timestamp"]
    log_of(small_data).set_axis(columns, axis=1).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def of_log(
    tmp_path_factory: pytest.TempPathFactory,
    new_run: Callable[[Path, Hybrid], Path],
    supervised: Hybrid,
    small_hybrid: Hybrid,
) -> Path:
    """A run whose policy in use came from a server's log."""
    folder = new_run(tmp_path_factory.mktemp("simulator"), supervised)
    variables = nnx.to_pure_dict(nnx.state(small_hybrid.policy))
    write_policy(open_run(folder), supervised, PolicyOutcome(True, "", 0, {}, {}), CONFIG, "log", variables, [], [])
    return folder


@pytest.fixture
def run(of_log: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(of_log, tmp_path / "run"))


def let_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simulator_run, "decide", lambda *measured: Decision(True, "let pass", decide(*measured)[2]))


@pytest.fixture(scope="module")
def passed(of_log: Path, ratings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run that uses what 20 updates made of its policy."""
    folder = Path(shutil.copytree(of_log, tmp_path_factory.mktemp("passed") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        let_pass(patch)
        assert rl_simulator_run(folder, ratings, CONFIG).used
    return folder


def test_what_passes_is_used_and_started_from_the_policy_in_use(passed: Path, of_log: Path, supervised: Hybrid) -> None:
    record, before = read_record(open_run(passed)), load_policy(open_run(of_log), supervised)
    assert record is not None
    assert record.method == METHOD
    assert record.config == CONFIG
    assert record.outcome.figures.keys() == {"policy", "before", "supervised"}
    assert record.outcome.differences.keys() == {"reward", "ndcg_10"}
    assert [step["step"] for step in read_steps(passed)] == [10, 20]
    assert sha256(passed / POLICY_PREVIOUS_FOLDER / "policy.npz") == sha256(of_log / POLICY_FOLDER / "policy.npz")
    assert not (passed / SIMULATOR_PARTIAL_FOLDER).exists()
    # Adam moves no weight further than about the learning rate in an update.
    new = load_policy(open_run(passed), supervised)
    assert new is not None
    assert before is not None
    moved = np.abs(new.policy.item_bias[...] - before.policy.item_bias[...])[1:]
    assert 0 < moved.max() < 2 * CONFIG.steps * CONFIG.learning_rate < np.abs(before.policy.item_bias[...]).max()


def test_a_server_s_log_goes_on_from_it(passed: Path, supervised: Hybrid) -> None:
    """`jaxrec rl --log` starts from the policy in use, whatever made it: so both sources are used in turn."""
    with np.load(passed / POLICY_FOLDER / "policy.npz") as arrays:
        np.testing.assert_array_equal(
            policy_in_use(open_run(passed), supervised, LOG_RL).variables["item_bias"], arrays["item_bias"]
        )


def test_interrupted_and_resumed_is_the_same(run: Path, passed: Path, ratings: Path, tmp_path: Path) -> None:
    asked = iter([True])
    with pytest.raises(TrainingStopped, match="stopped and saved after update 10 of 20"):
        rl_simulator_run(run, ratings, CONFIG, stop=lambda: next(asked, False))
    frame = pd.read_csv(ratings)
    frame[frame.userId != frame.userId.max()].to_csv(tmp_path / "fewer.csv", index=False)
    with pytest.raises(DataError, match="another policy in use or other users; start anew"):
        rl_simulator_run(run, tmp_path / "fewer.csv", resume=True)
    with pytest.MonkeyPatch.context() as patch:
        let_pass(patch)
        rl_simulator_run(run, ratings, resume=True)
    for name in ("policy.npz", "steps.jsonl"):
        assert sha256(run / POLICY_FOLDER / name) == sha256(passed / POLICY_FOLDER / name)
    with pytest.raises(DataError, match="no interrupted training with simulated users"):
        rl_simulator_run(run, ratings, resume=True)


def test_what_gains_nothing_is_refused_and_says_who_judged(run: Path, ratings: Path) -> None:
    digest = sha256(run / POLICY_FOLDER / "policy.json")
    idle = dataclasses.replace(CONFIG, learning_rate=1e-30)
    found = rl_simulator_run(run, ratings, idle)
    assert not found.used
    assert found.reason.startswith("the policy that was in use stays: not shown is a higher reward")
    assert "+0.0000 (+0.0000 to +0.0000)" in found.reason
    assert f"{STRANGERS + 2} users, of whom 2 are left out because the run was trained on them, and 1 " in found.told
    assert sha256(run / POLICY_FOLDER / "policy.json") == digest
    assert not (run / POLICY_PREVIOUS_FOLDER).exists()
    assert json.loads((run / SIMULATED_OUTCOME_FILE).read_text())["reason"] == found.reason


def measured(reward: float, ndcg_rank: np.ndarray, spread: float = 0.0) -> Measured:
    """40 users around a mean reward, and cases with these ranks."""
    rewards = reward + spread * np.tile([-1.0, 1.0], 20)
    ranks = np.stack([ndcg_rank, ndcg_rank])
    zeros = np.zeros(ranks.shape)
    count = len(ndcg_rank)
    top = np.ones((2, count, 10), np.int64)
    logged = Judged(ranks, zeros, {}, zeros, np.ones(count), top, 60, np.arange(count))
    return Measured(Played(rewards, rewards, rewards, 0.5), logged)


FIRST, MIXED = np.ones(100, np.int64), np.tile([1, 2], 50)
TWO_LOST = np.where(np.arange(100) < 2, 11, FIRST)
NOT_LOWER, NOT_MUCH_LOWER = "an NDCG@10 that is not lower than the supervised models'", "one that is at most 1% lower"


@pytest.mark.parametrize(
    ("new", "before", "supervised", "failed"),
    [
        (measured(0.3, FIRST), measured(0.2, FIRST), FIRST, ""),
        (measured(0.2, FIRST), measured(0.2, FIRST), FIRST, "a higher reward"),
        (measured(0.21, FIRST, spread=0.2), measured(0.2, FIRST), FIRST, "a higher reward"),
        (measured(0.3, MIXED), measured(0.2, MIXED), FIRST, f"{NOT_LOWER} and {NOT_MUCH_LOWER}"),
        (measured(0.3, TWO_LOST), measured(0.2, TWO_LOST), FIRST, NOT_MUCH_LOWER),
        (measured(0.3, MIXED), measured(0.2, FIRST), MIXED, ""),
        (measured(0.3, FIRST), measured(0.2, FIRST), MIXED, ""),
    ],
)
def test_gate(new: Measured, before: Measured, supervised: np.ndarray, failed: str) -> None:
    """Two of a hundred cases lost: 2 % of NDCG@10, which chance alone can do; half of them second instead of first:
    more than chance. What the policy in use has lost does not count, and what it has won may be lost."""
    used, reason, differences = decide(new, before, measured(0.0, supervised).logged)
    assert used == (not failed)
    assert reason.startswith(f"the policy that was in use stays: not shown is {failed}" if failed else "the new policy")
    assert differences["reward"].mean == pytest.approx(new.played.reward.mean() - before.played.reward.mean())


def test_simulators_share_nobody(small_data: PreparedData) -> None:
    found = two_simulators(log_of(small_data), small_data, seed=0)
    users = found.training_users.tolist(), found.judging_users.tolist()
    assert not set(users[0]) & set(users[1])
    assert set(users[0]) | set(users[1]) == set(range(FIRST_USER + 1, FIRST_USER + STRANGERS))
    # Of different kinds: EASE's matrix has negative entries, that of the nearest neighbours none.
    assert found.training.params.item_item.min() == 0.0 > found.judging.params.item_item.min()
    halves = [len(fit.params.profile) for fit in (found.training, found.judging)]
    assert sum(halves) == STRANGERS - 1
    assert halves == [len(some) for some in users]
    assert min(halves) > 15
    assert f"{halves[0]} train (taste by nearest neighbours), {halves[1]} judge (taste by EASE)" in found.told
    for fit in (found.training, found.judging):
        assert f"{fit.nats:.3f} nats each (popularity alone {fit.popularity_nats:.3f}, chance " in found.told
    again = two_simulators(log_of(small_data).sample(frac=1, random_state=0), small_data, seed=0)
    assert again.digest == found.digest
    assert two_simulators(log_of(small_data, users=50), small_data, seed=0).digest != found.digest
    other = two_simulators(log_of(small_data), small_data, seed=1)
    assert (other.training_users.tolist(), other.judging_users.tolist()) == users  # nobody changes sides
    assert other.training.nats != found.training.nats


def test_of_too_many_strangers_the_same_are_chosen_whatever_the_seed(
    small_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 80
    monkeypatch.setattr("jaxrec.rl.simulated.split_people.MAX_USERS", most)
    users = []
    for seed in (0, 1):
        found = two_simulators(log_of(small_data, users=2 * most), small_data, seed)
        users.append((found.training_users.tolist(), found.judging_users.tolist()))
    assert users[0] == users[1]
    assert sum(map(len, users[0])) == most


def test_too_few_strangers_or_ratings_are_named(small_data: PreparedData) -> None:
    with pytest.raises(DataError, match=r"39 users of 42 are others .* more than 10 events .*expected at least 40"):
        two_simulators(log_of(small_data, users=40), small_data, seed=0)
    log = log_of(small_data)
    with pytest.raises(DataError, match="0 users of 62 are others"):
        two_simulators(log.assign(**{ITEM: 1}), small_data, seed=0)
    with pytest.raises(DataError, match="1 different ratings, expected two or more"):
        two_simulators(log.assign(rating=4.0), small_data, seed=0)
    few = log.assign(rating=log["rating"].where(np.arange(len(log)) % 40 == 0))
    with pytest.raises(DataError, match=r"\d+ events with a rating are of .* train and \d+ of .* at least 20 of each"):
        two_simulators(few, small_data, seed=0)
    config = dataclasses.replace(small_data.config, rating_scale=None)
    with pytest.raises(DataError, match="trained without ratings"):
        two_simulators(log, dataclasses.replace(small_data, config=config), seed=0)


@pytest.mark.parametrize(
    ("bad", "figures", "named"),
    [
        ("training", (3.0, 3.0, 4.0), r"training .* 3\.000 nats each \(popularity alone 3\.000, chance 4\.000\)"),
        ("judging", (3.5, 3.6, 3.4), r"judging .* 3\.500 nats each \(popularity alone 3\.600, chance 3\.400\)"),
        ("judging", (2.9, 3.0, 3.0), ""),
    ],
)
def test_simulators_that_foresee_nothing_are_refused(
    small_data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    bad: str,
    figures: tuple[float, float, float],
    named: str,
) -> None:
    made: list[SimulatorFit] = []

    def fit(*_: object, **__: object) -> SimulatorFit:
        of_this = figures if bad == ("judging" if made else "training") else (2.0, 3.0, 4.0)
        made.append(SimulatorFit(hand_made(), *of_this, 0.0, 0.0, 1.0, 1.0))
        return made[-1]

    monkeypatch.setattr("jaxrec.rl.simulated.split_people.fit_simulator", fit)
    if named:
        with pytest.raises(DataError, match=named):
            two_simulators(log_of(small_data), small_data, seed=0)
    else:
        assert two_simulators(log_of(small_data), small_data, seed=0).judging is made[1]


def test_what_cannot_be_played_is_refused_before_anything_is_read(run: Path, small_data: PreparedData) -> None:
    with pytest.raises(DataError, match="slates of 1, expected 2 to 60"):
        rl_simulator_run(run, run / "nothing", dataclasses.replace(CONFIG, slate_size=1))
    refuse_unplayable(small_data, 60)
    with pytest.raises(DataError, match="slates of 61, expected 2 to 60"):
        refuse_unplayable(small_data, 61)
    split = dataclasses.replace(small_data.split, validation=small_data.split.validation.at_most(0))
    with pytest.raises(DataError, match="no validation case is left"):
        refuse_unplayable(dataclasses.replace(small_data, split=split), 3)


def test_the_supervised_head_is_that_of_the_supervised_models(
    small_data: PreparedData, supervised: Hybrid, small_hybrid: Hybrid
) -> None:
    scoring = frozen_scoring(supervised, fit_reward_tables(small_data))
    graphdef, variables = nnx.split(small_hybrid.policy)
    policy = recommender_policy(graphdef, nnx.to_pure_dict(variables), scoring)
    query = jnp.ones((2, scoring.item_vectors.shape[1]))
    recent = jnp.zeros((2, 10), jnp.int32).at[0, :3].set(jnp.array([1, 2, 3]))
    own = policy_logits(nnx.merge(graphdef, policy.start.head), query, recent, scoring)
    assert not np.array_equal(own, supervised_logits(query, recent, scoring))
    with_head = policy_logits(nnx.merge(graphdef, supervised_head(policy)), query, recent, scoring)
    np.testing.assert_array_equal(with_head, supervised_logits(query, recent, scoring))
