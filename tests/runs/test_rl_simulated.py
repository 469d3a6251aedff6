"""`jaxrec rl RUN --simulator`: whom the simulators are made of, what the gate says, and what it leaves in the run."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from jaxrec.config import to_json
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, TIME, USER
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.files import read_json_lines, sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.cases import CaseResults
from jaxrec.rl.config import SimulatedConfig
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import frozen_scoring, policy_logits, supervised_logits
from jaxrec.rl.simulated.evaluate import RolloutResults, SimulatedResults, simulated_outcome
from jaxrec.rl.simulated.fit import SimulatorFit
from jaxrec.rl.simulated.policy import recommender_policy
from jaxrec.rl.simulated.split_people import two_simulators
from jaxrec.rl.states import PolicyState
from jaxrec.runs import rl_simulated as simulator_run
from jaxrec.runs.directory import (
    POLICY_FILES,
    POLICY_FOLDER,
    POLICY_PREVIOUS_FOLDER,
    SIMULATED_OUTCOME_FILE,
    SIMULATED_PLOT_FILE,
    SIMULATOR_PARTIAL_FOLDER,
    open_run,
)
from jaxrec.runs.policy import LoadedRun, load_policy, policy_in_use, read_record, write_policy
from jaxrec.runs.rl_simulated import (
    SIMULATED_METHOD,
    SimulatedTraining,
    real_events_of,
    require_slates,
    run_simulated,
)
from tests.rl.simulated.simulated import FIRST_USER, genre_lovers, hand_made

CONFIG = SimulatedConfig(updates=20, users=16, slate_size=3, learning_rate=1e-3)
STRANGERS = 60


def log_of(data: PreparedData, users: int = STRANGERS) -> pd.DataFrame:
    """Strangers to the run, one of whom has 10 events only, and two of its own users."""
    strangers = genre_lovers(data, users=users)
    few = strangers[USER] == strangers[USER].min()
    own = strangers[strangers[USER] > strangers[USER].max() - 2]
    own = own.assign(**{USER: data.users.raw_ids[own[USER] - own[USER].min()]})
    return pd.concat([strangers[~few], strangers[few][:10], own], ignore_index=True)


@pytest.fixture(scope="module")
def supervised(small_hybrid: Hybrid) -> Hybrid:
    return small_hybrid.with_policy(None)


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
    head = nnx.to_pure_dict(nnx.state(small_hybrid.policy))
    write_policy(open_run(folder), supervised, TrainedPolicy(PolicyOutcome(True, ""), head, []), CONFIG, "served")
    return folder


@pytest.fixture
def run(of_log: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(of_log, tmp_path / "run"))


@pytest.fixture
def loaded(run: Path, small_data: PreparedData, supervised: Hybrid) -> LoadedRun:
    return LoadedRun(open_run(run), small_data, supervised)


def let_pass(patch: pytest.MonkeyPatch) -> None:
    def outcome(*results: Any) -> PolicyOutcome:
        return dataclasses.replace(simulated_outcome(*results), used=True)

    patch.setattr(simulator_run, "simulated_outcome", outcome)


@pytest.fixture(scope="module")
def passed(
    of_log: Path,
    ratings: Path,
    small_data: PreparedData,
    supervised: Hybrid,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A copy of the run that uses what 20 updates made of its policy."""
    folder = Path(shutil.copytree(of_log, tmp_path_factory.mktemp("passed") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        let_pass(patch)
        assert run_simulated(LoadedRun(open_run(folder), small_data, supervised), ratings, CONFIG).used
    return folder


def test_what_passes_is_used_and_started_from_the_policy_in_use(passed: Path, of_log: Path, supervised: Hybrid) -> None:
    record, before = read_record(open_run(passed)), load_policy(open_run(of_log), supervised)
    assert record is not None
    assert record.method == SIMULATED_METHOD
    assert record.config == to_json(CONFIG)
    assert record.outcome.figures.keys() == {"policy", "before", "supervised"}
    assert record.outcome.differences.keys() == {"reward", "ndcg_10"}
    assert [step["step"] for step in read_json_lines(passed / "policy/steps.jsonl", "")] == [10, 20]
    assert sha256(passed / POLICY_PREVIOUS_FOLDER / "policy.npz") == sha256(of_log / POLICY_FOLDER / "policy.npz")
    assert not (passed / SIMULATOR_PARTIAL_FOLDER).exists()
    assert sha256(passed / SIMULATED_PLOT_FILE) == sha256(passed / POLICY_FOLDER / "training.png")
    assert {path.name for path in passed.iterdir()} <= {"run.json", *POLICY_FILES}  # which new data removes
    # Adam moves no weight further than about the learning rate in an update.
    new = load_policy(open_run(passed), supervised)
    assert new is not None
    assert before is not None
    moved = np.abs(new.policy.item_bias[...] - before.policy.item_bias[...])[1:]
    assert 0 < moved.max() < 2 * CONFIG.updates * CONFIG.learning_rate < np.abs(before.policy.item_bias[...]).max()


def test_real_events_are_those_of_people_whose_taste_is_not_known(
    small_data: PreparedData, small_hybrid: Hybrid, supervised: Hybrid
) -> None:
    """The last 40 events of two fifths of the people whose simulated copies train, without repeats."""
    log = log_of(small_data)
    simulators = two_simulators(log, small_data, 0)
    graphdef, variables = nnx.split(small_hybrid.policy)
    scoring = frozen_scoring(supervised, fit_reward_tables(small_data))
    policy = recommender_policy(graphdef, nnx.to_pure_dict(variables), scoring)
    found = real_events_of(simulators, supervised, small_data, policy, 8)
    of_taste = simulators.training.without_taste
    assert of_taste.sum() == len(of_taste) - 3 * len(of_taste) // 5
    expected = []
    for name in simulators.training_users[of_taste]:
        items = small_data.catalog.ids.encode(log[log[USER] == name].sort_values(TIME, kind="stable")[ITEM].to_numpy())
        for row in range(max(1, len(items) - 40), len(items)):
            if items[row] not in items[:row]:
                expected.append((items[row], sorted(set(items[:row]))))
    before = [sorted(set(row[row > 0])) for row in np.asarray(found.histories)]
    assert list(zip(np.asarray(found.targets), before, strict=True)) == expected


def test_training_on_a_server_s_log_starts_from_it(passed: Path, supervised: Hybrid) -> None:
    """`jaxrec rl served` starts from the policy in use, whatever made it: so both sources are used in turn."""
    with np.load(passed / POLICY_FOLDER / "policy.npz") as arrays:
        np.testing.assert_array_equal(
            policy_in_use(open_run(passed), supervised).variables["item_bias"], arrays["item_bias"]
        )


def test_interrupted_and_resumed_is_the_same(
    run: Path, loaded: LoadedRun, passed: Path, ratings: Path, tmp_path: Path
) -> None:
    asked = iter([True])
    with pytest.raises(TrainingStopped, match="stopped after update 10 of 20; the checkpoint is written"):
        run_simulated(loaded, ratings, CONFIG, stop=lambda: next(asked, False))
    frame = pd.read_csv(ratings)
    frame[frame.userId != frame.userId.max()].to_csv(tmp_path / "fewer.csv", index=False)
    with pytest.raises(DataError, match="was started with other users than now; start again without --resume"):
        run_simulated(loaded, tmp_path / "fewer.csv", resume=True)
    with pytest.MonkeyPatch.context() as patch:
        let_pass(patch)
        run_simulated(loaded, ratings, resume=True)
    for name in ("policy.npz", "steps.jsonl"):
        assert sha256(run / POLICY_FOLDER / name) == sha256(passed / POLICY_FOLDER / name)
    with pytest.raises(DataError, match="no interrupted training to resume"):
        run_simulated(loaded, ratings, resume=True)


def test_a_policy_that_came_into_use_meanwhile_is_not_replaced(
    run: Path, loaded: LoadedRun, ratings: Path, supervised: Hybrid
) -> None:
    other = {**policy_in_use(open_run(run), supervised).variables, "item_bias": np.zeros(61, np.float32)}

    def meanwhile() -> bool:
        trained = TrainedPolicy(PolicyOutcome(True, "for the test"), other, [])
        write_policy(open_run(run), supervised, trained, CONFIG, "served")
        return False

    with pytest.MonkeyPatch.context() as patch:
        let_pass(patch)
        with pytest.raises(DataError, match="the policy in use is not the one that the new policy was compared with"):
            run_simulated(loaded, ratings, CONFIG, stop=meanwhile)
    record = read_record(open_run(run))
    assert record is not None
    assert record.method == "served"


def test_what_gains_nothing_is_refused_and_the_users_are_reported(run: Path, loaded: LoadedRun, ratings: Path) -> None:
    digest = sha256(run / POLICY_FOLDER / "policy.json")
    idle = dataclasses.replace(CONFIG, learning_rate=1e-30)
    found = run_simulated(loaded, ratings, idle)
    assert not found.used
    assert found.reason.startswith("keeping the policy in use: the reward of the simulated users did not improve")
    assert "+0.0000 (+0.0000 to +0.0000)" in found.reason
    assert f"{STRANGERS + 2} users, of whom 2 are left out because the run was trained on them, and 1 " in found.summary
    assert sha256(run / POLICY_FOLDER / "policy.json") == digest
    assert not (run / POLICY_PREVIOUS_FOLDER).exists()
    assert json.loads((run / SIMULATED_OUTCOME_FILE).read_text())["reason"] == found.reason
    assert (run / SIMULATED_PLOT_FILE).is_file()  # also of a training whose policy is refused


def test_the_outcome_is_written_before_the_plot(run: Path, loaded: LoadedRun, ratings: Path) -> None:
    (run / SIMULATED_PLOT_FILE).mkdir()
    with pytest.raises(DataError, match=SIMULATED_PLOT_FILE):
        run_simulated(loaded, ratings, dataclasses.replace(CONFIG, updates=1))
    assert json.loads((run / SIMULATED_OUTCOME_FILE).read_text())["simulator"] == str(ratings)
    assert not (run / SIMULATOR_PARTIAL_FOLDER).exists()


def results(reward: float, ndcg_rank: np.ndarray, spread: float = 0.0) -> SimulatedResults:
    """40 users around a mean reward, and cases with these ranks."""
    rewards = reward + spread * np.tile([-1.0, 1.0], 20)
    ranks = np.stack([ndcg_rank, ndcg_rank])
    zeros = np.zeros(ranks.shape)
    logged = CaseResults(
        ranks,
        zeros,
        {},
        zeros,
        np.ones(len(ndcg_rank)),
        np.ones((2, len(ndcg_rank), 10), np.int64),
        60,
        np.arange(len(ndcg_rank)),
    )
    return SimulatedResults(RolloutResults(rewards, rewards, rewards, 0.5), logged)


FIRST, MIXED = np.ones(100, np.int64), np.tile([1, 2], 50)
TWO_LOST = np.where(np.arange(100) < 2, 11, FIRST)
REWARD = "the reward of the simulated users did not improve significantly"
LOWER, MUCH_LOWER = "NDCG@10 fell significantly below the supervised models'", "NDCG@10 fell by more than 1%"


@pytest.mark.parametrize(
    ("new", "before", "supervised", "failed"),
    [
        (results(0.3, FIRST), results(0.2, FIRST), FIRST, ""),
        (results(0.2, FIRST), results(0.2, FIRST), FIRST, REWARD),
        (results(0.21, FIRST, spread=0.2), results(0.2, FIRST), FIRST, REWARD),
        (results(0.3, MIXED), results(0.2, MIXED), FIRST, f"{LOWER} and {MUCH_LOWER}"),
        (results(0.3, TWO_LOST), results(0.2, TWO_LOST), FIRST, MUCH_LOWER),
        (results(0.3, MIXED), results(0.2, FIRST), MIXED, ""),
        (results(0.3, FIRST), results(0.2, FIRST), MIXED, ""),
    ],
)
def test_gate(new: SimulatedResults, before: SimulatedResults, supervised: np.ndarray, failed: str) -> None:
    """Two of a hundred cases lost: 2 % of NDCG@10, which chance alone can do; half of them second instead of first:
    more than chance. What the policy in use has lost does not count, and what it has won may be lost."""
    outcome = simulated_outcome(new, before, results(0.0, supervised).logged)
    assert outcome.used == (not failed)
    assert outcome.reason.startswith(f"keeping the policy in use: {failed}: " if failed else "the new policy is used: ")
    gain = new.rollouts.reward.mean() - before.rollouts.reward.mean()
    assert outcome.differences["reward"]["mean"] == pytest.approx(gain)


def test_simulators_share_no_user(small_data: PreparedData) -> None:
    found = two_simulators(log_of(small_data), small_data, seed=0)
    users = found.training_users.tolist(), found.evaluation_users.tolist()
    assert not set(users[0]) & set(users[1])
    assert set(users[0]) | set(users[1]) == set(range(FIRST_USER + 1, FIRST_USER + STRANGERS))
    # Of different kinds: EASE's matrix has negative entries, that of the nearest neighbours none.
    assert found.training.params.item_item.min() == 0.0 > found.evaluation.params.item_item.min()
    halves = [len(fit.params.profile) for fit in (found.training, found.evaluation)]
    assert sum(halves) == STRANGERS - 1
    assert halves == [len(some) for some in users]
    assert min(halves) > 15
    assert (
        f"{halves[0]} for training (taste by nearest neighbours), {halves[1]} for evaluation (taste by EASE)"
        in found.summary
    )
    for fit in (found.training, found.evaluation):
        assert f"{fit.nats:.3f} nats each (popularity alone {fit.popularity_nats:.3f}, chance " in found.summary
    again = two_simulators(log_of(small_data).sample(frac=1, random_state=0), small_data, seed=0)
    assert again.digest == found.digest
    assert two_simulators(log_of(small_data, users=50), small_data, seed=0).digest != found.digest
    other = two_simulators(log_of(small_data), small_data, seed=1)
    assert (other.training_users.tolist(), other.evaluation_users.tolist()) == users  # no user changes sides
    assert other.training.nats != found.training.nats


def test_of_too_many_strangers_the_same_are_chosen_whatever_the_seed(
    small_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 80
    monkeypatch.setattr("jaxrec.rl.simulated.split_people.MAX_USERS", most)
    users = []
    for seed in (0, 1):
        found = two_simulators(log_of(small_data, users=2 * most), small_data, seed)
        users.append((found.training_users.tolist(), found.evaluation_users.tolist()))
    assert users[0] == users[1]
    assert sum(map(len, users[0])) == most


def test_too_few_strangers_or_ratings_are_named(small_data: PreparedData) -> None:
    with pytest.raises(DataError, match=r"39 of 42 users were not in .* more than 10 events .*expected at least 40"):
        two_simulators(log_of(small_data, users=40), small_data, seed=0)
    log = log_of(small_data)
    with pytest.raises(DataError, match="0 of 62 users were not in the run's training data"):
        two_simulators(log.assign(**{ITEM: 1}), small_data, seed=0)
    with pytest.raises(DataError, match="1 different ratings, expected two or more"):
        two_simulators(log.assign(rating=4.0), small_data, seed=0)
    few = log.assign(rating=log["rating"].where(np.arange(len(log)) % 40 == 0))
    with pytest.raises(
        DataError,
        match=r"\d+ events with a rating are left for training .* at least 20 of each",
    ):
        two_simulators(few, small_data, seed=0)
    config = dataclasses.replace(small_data.config, rating_scale=None)
    with pytest.raises(DataError, match="trained without ratings"):
        two_simulators(log, dataclasses.replace(small_data, config=config), seed=0)


@pytest.mark.parametrize(
    ("bad", "figures", "named"),
    [
        ("training", (3.0, 3.0, 4.0), r"training .* 3\.000 nats each \(popularity alone 3\.000, chance 4\.000\)"),
        ("evaluation", (3.5, 3.6, 3.4), r"evaluation .* 3\.500 nats each \(popularity alone 3\.600, chance 3\.400\)"),
        ("evaluation", (2.9, 3.0, 3.0), ""),
    ],
)
def test_simulators_that_predict_nothing_are_refused(
    small_data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    bad: str,
    figures: tuple[float, float, float],
    named: str,
) -> None:
    made: list[SimulatorFit] = []

    def fit(*_: object, **__: object) -> SimulatorFit:
        of_this = figures if bad == ("evaluation" if made else "training") else (2.0, 3.0, 4.0)
        made.append(SimulatorFit(hand_made(), *of_this, 0.0, 0.0, 1.0, 1.0, np.zeros(0, bool)))
        return made[-1]

    monkeypatch.setattr("jaxrec.rl.simulated.split_people.fit_simulator", fit)
    if named:
        with pytest.raises(DataError, match=named):
            two_simulators(log_of(small_data), small_data, seed=0)
    else:
        assert two_simulators(log_of(small_data), small_data, seed=0).evaluation is made[1]


def test_impossible_slates_are_refused_before_the_log_is_read(
    run: Path, loaded: LoadedRun, small_data: PreparedData
) -> None:
    with pytest.raises(DataError, match="slates of 1, expected 2 to 60"):
        run_simulated(loaded, run / "nothing", dataclasses.replace(CONFIG, slate_size=1))
    require_slates(small_data, 60)
    with pytest.raises(DataError, match="slates of 61, expected 2 to 60"):
        require_slates(small_data, 61)
    split = dataclasses.replace(small_data.split, validation=small_data.split.validation.at_most(0))
    with pytest.raises(DataError, match="no validation case is left"):
        require_slates(dataclasses.replace(small_data, split=split), 3)


def test_the_supervised_head_is_that_of_the_supervised_models(
    small_data: PreparedData, supervised: Hybrid, small_hybrid: Hybrid
) -> None:
    scoring = frozen_scoring(supervised, fit_reward_tables(small_data))
    graphdef, variables = nnx.split(small_hybrid.policy)
    policy = recommender_policy(graphdef, nnx.to_pure_dict(variables), scoring)
    recent = jnp.zeros((2, 10), jnp.int32).at[0, :3].set(jnp.array([1, 2, 3]))
    state = PolicyState(jnp.ones((2, scoring.item_vectors.shape[1])), recent)
    own = policy_logits(nnx.merge(graphdef, policy.start.head), state, scoring)
    assert not np.array_equal(own, supervised_logits(state, scoring))
    evaluated: list[Any] = []
    SimulatedTraining(None, policy, None, None, None, evaluated.append).supervised()  # type: ignore[arg-type]
    with_head = policy_logits(nnx.merge(graphdef, evaluated[0]), state, scoring)
    np.testing.assert_array_equal(with_head, supervised_logits(state, scoring))
