"""The policy of a run directory, from `jaxrec rl` to the hybrid that is exported."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError, TrainingError, TrainingStopped
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.files import sha256
from jaxrec.models.hybrid import Hybrid, MixWeights
from jaxrec.rl.config import LoggedConfig, RewardWeights, ServedConfig
from jaxrec.rl.logged import train as train_module
from jaxrec.rl.logged.methods import TOP_K
from jaxrec.rl.logged.train import train_logged
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.scoring import new_head
from jaxrec.rl.updates import Learner
from jaxrec.runs.directory import (
    POLICY_FILES,
    POLICY_FOLDER,
    POLICY_PREVIOUS_FOLDER,
    POLICY_REFUSED_FOLDER,
    POLICY_SCHEMA_VERSION,
    Run,
    open_run,
)
from jaxrec.runs.policy import (
    LoadedRun,
    load_policy,
    load_served,
    policy_name,
    read_outcome,
    read_policy_evaluations,
    read_policy_updates,
    read_record,
    write_policy,
)
from jaxrec.runs.rl_logged import run_logged

SHORT = LoggedConfig(updates=40, updates_per_evaluation=20, batch_size=16, policy_width=8, learning_rate=3e-3)


@pytest.fixture(scope="module")
def supervised(small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]) -> Hybrid:
    """Random models in place of the run's trained ones, which tests of the command line train."""
    return random_hybrid(small_data, 0, False)


@pytest.fixture(scope="module")
def trained(
    supervised: Hybrid,
    small_data: PreparedData,
    new_run: Callable[[Path, Hybrid], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run with a policy of few updates."""
    folder = new_run(tmp_path_factory.mktemp("rl"), supervised)
    run_logged(LoadedRun(open_run(folder), small_data, supervised), SHORT)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    """A copy of the run, to be changed."""
    return open_run(Path(shutil.copytree(trained, tmp_path / "run")))


@pytest.fixture
def loaded(run: Run, small_data: PreparedData, supervised: Hybrid) -> LoadedRun:
    return LoadedRun(run, small_data, supervised)


def record_use(run: Run, used: bool) -> None:
    path = run.folder / POLICY_FOLDER / "policy.json"
    record = json.loads(path.read_text())
    record["outcome"]["used"] = used
    path.write_text(json.dumps(record))


def test_outcome_is_written_and_read_back(run: Run, small_data: PreparedData, supervised: Hybrid) -> None:
    outcome = read_outcome(run)
    again = train_logged(supervised, small_data, SHORT)
    assert outcome == again.outcome
    assert outcome.figures.keys() == {"supervised", "policy", "imitation only", "permuted rewards"}
    assert read_policy_evaluations(run.folder) == again.evaluations
    assert read_policy_updates(run.folder) == again.updates
    assert [record["step"] for record in again.evaluations] == [20, 40]
    assert [record["step"] for record in again.updates] == list(range(40))
    assert again.evaluations[0]["kl"] > 0
    assert (run.folder / POLICY_FOLDER / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not (run.folder / "policy.partial").exists()


class StopAfter:
    """Asks to stop from the given call on."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("calls", [0, 2])  # within the policy's own training, and within a control's
def test_an_interrupted_training_is_resumed_with_the_same_result(trained: Path, loaded: LoadedRun, calls: int) -> None:
    run = loaded.run
    shutil.rmtree(run.folder / POLICY_FOLDER)
    with pytest.raises(TrainingStopped, match="stopped after update 20 of 40; the checkpoint is written"):
        run_logged(loaded, SHORT, stop=StopAfter(calls))
    assert not (run.folder / POLICY_FOLDER).exists()
    run_logged(loaded, resume=True)
    for name in ("policy.npz", "policy.json", "steps.jsonl", "log.jsonl"):
        assert sha256(run.folder / POLICY_FOLDER / name) == sha256(trained / POLICY_FOLDER / name), name
    assert not (run.folder / "policy.partial").exists()
    with pytest.raises(DataError, match="no interrupted training to resume"):
        run_logged(loaded, resume=True)


def test_an_interrupted_training_on_other_weights_is_refused(loaded: LoadedRun, supervised: Hybrid) -> None:
    with pytest.raises(TrainingStopped):
        run_logged(loaded, SHORT, stop=StopAfter(0))
    other = Hybrid(supervised.lstm, supervised.content, supervised.cooccurrence, MixWeights(0.5, 0.5, 0.3))
    with pytest.raises(DataError, match=r"policy\.partial: was started with other models than now"):
        run_logged(loaded._replace(supervised=other), resume=True)
    (loaded.run.folder / "policy.partial/20/arrays/_METADATA").write_bytes(b"half")
    with pytest.raises(DataError, match=r"policy\.partial/20: damaged"):
        run_logged(loaded, resume=True)


def test_policy_on_top_of_other_weights_is_refused(run: Run, supervised: Hybrid) -> None:
    """Of the same shapes: another mix of the same models is enough."""
    other = Hybrid(supervised.lstm, supervised.content, supervised.cooccurrence, MixWeights(0.4, 0.6, 0.31))
    with pytest.raises(DataError, match=r"the policy was trained on top of other weights than the models of .* have"):
        load_policy(run, other, only_if_used=False)


def test_a_refused_policy_does_not_replace_one_in_use(loaded: LoadedRun) -> None:
    run = loaded.run
    assert {path.name for path in run.folder.iterdir()} <= {"run.json", *POLICY_FILES}
    record_use(run, False)
    assert not run_logged(loaded, dataclasses.replace(SHORT, updates=20)).used
    assert not (run.folder / POLICY_REFUSED_FOLDER).exists()
    record_use(run, True)
    digest = sha256(run.folder / POLICY_FOLDER / "policy.npz")
    outcome = run_logged(loaded, dataclasses.replace(SHORT, updates=20, seed=1))
    assert not outcome.used
    assert outcome.reason.startswith("keeping the policy in use: ")
    assert outcome.reason.endswith(f"; the new policy is in {run.folder / POLICY_REFUSED_FOLDER}")
    assert {path.name for path in run.folder.iterdir()} <= {"run.json", *POLICY_FILES}  # which new data removes
    assert sha256(run.folder / POLICY_FOLDER / "policy.npz") == digest
    assert digest != sha256(run.folder / POLICY_REFUSED_FOLDER / "policy.npz")
    assert not (run.folder / POLICY_PREVIOUS_FOLDER).exists()


HITS = dataclasses.replace(SHORT, updates=1, rewards=RewardWeights(hit=1.0, genre=0.0, rating=0.0))


def biased_head(loaded: LoadedRun, strength: float) -> dict[str, Any]:
    """The head of a policy that prefers the targets of validation, as the supervised models cannot know."""
    cases = loaded.data.split.validation
    counts = np.bincount(loaded.data.histories.items[cases.rows], minlength=len(loaded.data.catalog) + 1)
    head = new_head(32, len(loaded.data.catalog), 8, seed=0)[1]
    return {**head, "item_bias": jnp.asarray(strength * counts, jnp.float32)}


def put_in_use(loaded: LoadedRun, strength: float) -> str:
    """Puts such a policy in use, as one that was learned from a server's log; returns the digest of its variables."""
    in_use = TrainedPolicy(PolicyOutcome(True, "for the test"), biased_head(loaded, strength), [], [])
    write_policy(loaded.run, loaded.supervised, in_use, ServedConfig(), "served")
    return sha256(loaded.run.folder / POLICY_FOLDER / "policy.npz")


def let_training_find(monkeypatch: pytest.MonkeyPatch, head: dict[str, Any], meanwhile: Callable[[], object]) -> None:
    """Training ends with this policy, and its controls as they started; `meanwhile` is called during it."""
    run_updates = train_module.run_updates

    def found(*arguments: Any) -> Iterator[tuple[Learner, list[dict[str, float]]]]:
        meanwhile()
        for learner, records in run_updates(*arguments):
            start = jax.tree.map(jnp.zeros_like, learner.params.head)
            of_phase = head if train_module.POLICY in arguments else start
            yield learner._replace(params=learner.params._replace(head=of_phase)), records

    monkeypatch.setattr(train_module, "run_updates", found)


@pytest.mark.parametrize(("strength", "used"), [(1.0, False), (4.0, True)])
def test_a_policy_is_compared_with_the_one_in_use_whatever_trained_that(
    loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch, strength: float, used: bool
) -> None:
    """Both are better than the supervised models; only the second one is better than the policy in use."""
    folder = loaded.run.folder
    shutil.rmtree(folder / POLICY_FOLDER)
    let_training_find(monkeypatch, biased_head(loaded, strength), lambda: None)
    alone = run_logged(loaded, HITS)
    assert alone.used, alone.reason
    shutil.rmtree(folder / POLICY_FOLDER)
    before = put_in_use(loaded, 2.0)
    outcome = run_logged(loaded, HITS)
    assert outcome.used is used, outcome.reason
    assert (sha256(folder / POLICY_FOLDER / "policy.npz") == before) is not used
    record = read_record(loaded.run)
    assert record is not None
    assert record.method == ("reinforce" if used else "served")
    if used:
        assert sha256(folder / POLICY_PREVIOUS_FOLDER / "policy.npz") == before
        assert record.outcome == outcome
    else:
        assert sha256(folder / POLICY_REFUSED_FOLDER / "policy.npz") != before
        assert not (folder / POLICY_PREVIOUS_FOLDER).exists()
    assert {"supervised", "policy in use", "policy"} <= outcome.figures.keys()
    ndcg_10 = [outcome.figures[name]["ndcg_10"] for name in ("supervised", "policy in use", "policy")]
    assert ndcg_10[0] < ndcg_10[1]
    assert (ndcg_10[1] < ndcg_10[2]) is used
    assert outcome.differences["ndcg_10_over_policy_in_use"]["mean"] == pytest.approx(ndcg_10[2] - ndcg_10[1])


def test_a_policy_that_came_into_use_meanwhile_is_not_replaced(
    loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not compared with the new one; --resume compares both."""
    shutil.rmtree(loaded.run.folder / POLICY_FOLDER)
    let_training_find(monkeypatch, biased_head(loaded, 1.0), lambda: put_in_use(loaded, 2.0))
    with pytest.raises(DataError, match="the policy in use is not the one that the new policy was compared with"):
        run_logged(loaded, HITS)
    record = read_record(loaded.run)
    assert record is not None
    assert record.method == "served"
    outcome = run_logged(loaded, resume=True)
    assert not outcome.used
    assert "over the policy in use" in outcome.reason


def test_a_policy_that_cannot_be_used_is_replaced_without_a_comparison(loaded: LoadedRun) -> None:
    """The summary says so, and the run is whole again."""
    record_use(loaded.run, True)
    (loaded.run.folder / POLICY_FOLDER / "policy.npz").write_bytes(b"half")
    with pytest.raises(DataError, match=r"missing or damaged.* run `jaxrec rl logged` again"):
        load_policy(loaded.run, loaded.supervised)
    outcome = run_logged(loaded, dataclasses.replace(SHORT, updates=20))
    assert not outcome.used
    assert "policy in use" not in outcome.figures
    assert outcome.summary.startswith("The policy before cannot be used and was not compared with the new one: ")
    assert read_outcome(loaded.run) == outcome
    assert load_served(loaded.run, loaded.supervised) is loaded.supervised


def test_off_policy_training_tells_how_good_its_behaviour_model_is(
    small_data: PreparedData, supervised: Hybrid
) -> None:
    trained = train_logged(supervised, small_data, SHORT, TOP_K)
    fit = trained.outcome.figures["behaviour model"]
    assert -10 < fit["log_likelihood"] < 0
    assert 0 < trained.updates[-1]["ess_share"] < 1


def test_evaluated_figures_are_those_of_the_loaded_policy(
    run: Run, small_data: PreparedData, supervised: Hybrid
) -> None:
    """What was evaluated is what is served: the policy's validation NDCG@10 from its files, through the hybrid."""
    outcome, hybrid = read_outcome(run), load_policy(run, supervised, only_if_used=False)
    assert outcome is not None
    assert hybrid is not None
    for model, expected in ((supervised, outcome.figures["supervised"]), (hybrid, outcome.figures["policy"])):
        scorer = hybrid_scorer(model)
        figures = [
            ndcg(rank_cases(scorer, small_data, small_data.split.validation, 50, time).ranks, 10).mean()
            for time in (False, True)
        ]
        assert np.mean(figures) == pytest.approx(expected["ndcg_10"], abs=1e-9)


@pytest.mark.parametrize(("used", "name"), [(True, "reinforce"), (False, "supervised")])
def test_policy_is_served_only_where_it_is_used(run: Run, supervised: Hybrid, used: bool, name: str) -> None:
    record_use(run, used)
    assert policy_name(run) == name
    assert (load_policy(run, supervised) is not None) is used
    assert (load_served(run, supervised).policy is not None) is used
    assert load_policy(run, supervised, only_if_used=False) is not None


def test_without_a_policy_the_supervised_hybrid_is_served(run: Run, supervised: Hybrid) -> None:
    shutil.rmtree(run.folder / POLICY_FOLDER)
    assert read_outcome(run) is None
    assert policy_name(run) == "supervised"
    assert load_served(run, supervised) is supervised
    with pytest.raises(DataError, match=r"log\.jsonl"):
        read_policy_evaluations(run.folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "policy.npz").write_bytes(b"half"), r"policy\.npz: missing or damaged"),
        (lambda folder: (folder / "policy.npz").unlink(), r"policy\.npz: missing or damaged"),
        (lambda folder: (folder / "policy.json").write_text("{"), r"policy\.json: not JSON"),
        (lambda folder: (folder / "policy.json").unlink(), r"policy\.json: cannot be read"),
        (lambda folder: (folder / "policy.json").write_text("[]"), r"policy\.json: not a policy"),
        (
            lambda folder: (folder / "policy.json").write_text('{"schema_version": 1}'),
            f"schema version 1, expected {POLICY_SCHEMA_VERSION}",
        ),
        (
            lambda folder: (folder / "policy.json").write_text(f'{{"schema_version": {POLICY_SCHEMA_VERSION}}}'),
            "'outcome'",
        ),
    ],
)
def test_damaged_files_are_reported(
    run: Run, supervised: Hybrid, damage: Callable[[Path], object], message: str
) -> None:
    damage(run.folder / POLICY_FOLDER)
    with pytest.raises(DataError, match=message):
        load_policy(run, supervised, only_if_used=False)


def test_seed_decides_the_policy(small_data: PreparedData, supervised: Hybrid) -> None:
    config = dataclasses.replace(SHORT, seed=1)
    first, other = train_logged(supervised, small_data, SHORT), train_logged(supervised, small_data, config)
    assert first.evaluations != other.evaluations
    assert not np.array_equal(first.head["item_bias"], other.head["item_bias"])


def test_not_finite_stops_and_keeps_the_policy_before(loaded: LoadedRun) -> None:
    run = loaded.run
    before = read_outcome(run)
    with pytest.raises(TrainingError, match=r"not finite at update 1 \(of updates 0\.\.19\)"):
        run_logged(loaded, dataclasses.replace(SHORT, learning_rate=float("inf")))
    assert read_outcome(run) == before
    assert sorted(path.name for path in run.folder.iterdir() if path.name.startswith(".")) == []
