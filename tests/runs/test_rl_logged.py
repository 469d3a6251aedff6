"""`jaxrec rl logged`: folds, resumption, refusal, and runs that use a reranker."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrec
from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.files import sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.checkpoint import models_digest
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.logged.fit import Fitted
from jaxrec.rl.logged.learn import Learned
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.scoring import new_head
from jaxrec.runs.directory import POLICY_FOLDER, RERANKER_FILE, Run, load_supervised, open_run
from jaxrec.runs.policy import write_policy
from jaxrec.runs.rl_logged import run_logged, write_reranker
from tests.synthetic import random_log

SMALL = ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=16)
WRITTEN = {"reranker.json", "reranker.npz", "reranker.png"}
QUICK = LoggedConfig(folds=2, fold_epochs=1, decisions=200, updates=20, samples=2)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranked")
    prepare(random_log(users=40, items=20, max_events=20, seed=5), None, PrepareConfig(1, 1), out=folder / "data")
    jaxrec.train(folder / "data", folder / "run", SMALL, TrainConfig(max_epochs=1))
    return folder / "run"


@pytest.fixture
def run(run_folder: Path) -> Run:
    for path in run_folder.glob("reranker*"):
        assert path.name in WRITTEN
        path.unlink()
    return open_run(run_folder)


def test_a_log_without_structure_gives_no_reranker_and_a_stopped_training_ends_the_same(run: Run) -> None:
    outcome = run_logged(run, QUICK)
    assert not outcome.used
    assert outcome.reason.startswith("what ranks now stays: ")
    assert "permuted rewards" in outcome.reason
    written = json.loads((run.folder / "reranker.json").read_text())
    assert written["used"] is False
    assert LoggedConfig(**written["configuration"] | {"rewards": QUICK.rewards}) == QUICK
    assert {path.name for path in run.folder.glob("reranker*")} == WRITTEN
    assert [(point["name"], point["step"]) for point in written["curves"]] == [
        ("imitation only", 20),
        ("imitation and rewards", 20),
        ("permuted rewards", 20),
    ]
    assert [point["reward_weight"] for point in written["frontier"]] == [0, 1]
    data = run.read_data()
    assert load_supervised(run, data).reranker is None
    evaluation = jaxrec.evaluate(run)
    assert evaluation.serving == "hybrid"
    assert [row.name for row in evaluation.rows][-6::2] == ["hybrid", "stacked", "policy"]
    assert {"stacked_less_hybrid_ndcg_10", "policy_less_hybrid_ndcg_10", "policy_less_stacked_ndcg_10"} <= set(
        evaluation.comparison
    )

    first_fold = run.folder / "reranker.partial/fold-0/decisions.npz"
    with pytest.raises(TrainingStopped):
        run_logged(run, QUICK, stop=first_fold.is_file)
    done = first_fold.stat().st_mtime_ns
    with pytest.raises(TrainingStopped):
        run_logged(run, resume=True, stop=lambda: True)
    assert first_fold.stat().st_mtime_ns == done
    again = run_logged(run, resume=True)
    assert json.loads((run.folder / "reranker.json").read_text()) == written
    assert again.reason == outcome.reason


def test_without_anything_to_resume(run: Run) -> None:
    with pytest.raises(DataError, match="no interrupted training to resume"):
        run_logged(run, resume=True)


@pytest.fixture
def use_some_reranker(
    run: Run, with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid]
) -> Callable[[], tuple[PreparedData, Hybrid]]:
    """Writes one with random weights, as a training that succeeds does; its data and the hybrid with it."""

    def use() -> tuple[PreparedData, Hybrid]:
        data = run.read_data()
        supervised = load_supervised(run, data)
        own = with_random_reranker(supervised, data).reranker
        assert own is not None
        outcome = PolicyOutcome(True, "made up")
        fits = (Fitted(own.scales, each, []) for each in (own.weights, jax.tree.map(np.zeros_like, own.weights)))
        write_reranker(run, supervised, own.tables, Learned(*fits, outcome, 1.0, [], []))
        return data, supervised.with_reranker(own)

    return use


def test_a_run_with_a_reranker_is_read_exported_and_evaluated(
    run: Run, tmp_path: Path, use_some_reranker: Callable[[], tuple[PreparedData, Hybrid]]
) -> None:
    data, expected = use_some_reranker()
    found = load_supervised(run, data)
    assert found.reranker is not None
    assert expected.reranker is not None
    jax.tree.map(np.testing.assert_array_equal, found.reranker.weights, expected.reranker.weights)
    assert load_supervised(run, data, reranker=False).reranker is None
    before = jaxrec.Run.recommend(run, [1, 2, 3], k=5)
    jaxrec.export(run, tmp_path / "model")  # holds the graphs against JAX
    manifest = json.loads((tmp_path / "model/manifest.json").read_text())
    assert manifest["policy"] == "reinforce"
    evaluation = jaxrec.evaluate(run)
    assert evaluation.serving == "policy"
    of_stacked, of_hybrid = (
        [dataclasses.replace(row, name="") for row in evaluation.rows if row.name == name]
        for name in ("stacked", "hybrid")
    )
    assert of_stacked == of_hybrid  # whose weights are zero
    (run.folder / RERANKER_FILE).unlink()
    assert not before.equals(jaxrec.Run.recommend(open_run(run), [1, 2, 3], k=5))


def test_a_reranker_of_other_models_or_a_damaged_one_is_refused(
    run: Run, use_some_reranker: Callable[[], tuple[PreparedData, Hybrid]]
) -> None:
    use_some_reranker()
    path = run.folder / RERANKER_FILE
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "models": "others"})
    data = run.read_data()
    with pytest.raises(DataError, match="on top of other models"):
        load_supervised(run, data)
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot be read"):
        load_supervised(run, data)


def test_a_refused_reranker_does_not_replace_the_one_in_use(
    run: Run, use_some_reranker: Callable[[], tuple[PreparedData, Hybrid]]
) -> None:
    use_some_reranker()
    digest = sha256(run.folder / RERANKER_FILE)
    (run.folder / "evaluation.json").write_text("{}")
    outcome = run_logged(run, QUICK)
    assert not outcome.used
    assert sha256(run.folder / RERANKER_FILE) == digest
    assert json.loads((run.folder / "reranker.refused.json").read_text())["reason"] == outcome.reason
    assert (run.folder / "evaluation.json").is_file()  # still of what is in use
    assert (run.folder / "reranker.refused.png").is_file()
    assert not (run.folder / "reranker.png").exists()  # that of what is in use, which was made up without one
    for path in run.folder.glob("reranker.refused*"):
        path.unlink()


def test_a_policy_on_top_of_the_models_keeps_a_new_reranker_out(run: Run) -> None:
    """One of other models does not, nor does a damaged one."""
    supervised = load_supervised(run, run.read_data())
    _, head = new_head(supervised.item_vectors().shape[1], len(supervised.item_bias()) - 1, 4, seed=0)
    write_policy(run, supervised, TrainedPolicy(PolicyOutcome(True, ""), head, []), QUICK, "served")
    with pytest.raises(DataError, match=r"policy: this policy is in use .*Move the folder away first"):
        run_logged(run, QUICK)
    assert not (run.folder / "reranker.partial").exists()
    record = run.folder / POLICY_FOLDER / "policy.json"
    record.write_text(record.read_text().replace(models_digest(supervised), "of others"))
    with pytest.raises(TrainingStopped):
        run_logged(run, QUICK, stop=lambda: True)
    record.write_text("{}")
    with pytest.raises(TrainingStopped):
        run_logged(run, QUICK, stop=lambda: True)
    shutil.rmtree(run.folder / POLICY_FOLDER)
    shutil.rmtree(run.folder / "reranker.partial")


def test_a_policy_that_came_into_use_meanwhile_keeps_it_out_too(run: Run) -> None:
    supervised = load_supervised(run, run.read_data())
    _, head = new_head(supervised.item_vectors().shape[1], len(supervised.item_bias()) - 1, 4, seed=0)

    def meanwhile() -> bool:
        if not (run.folder / POLICY_FOLDER).is_dir():
            write_policy(run, supervised, TrainedPolicy(PolicyOutcome(True, ""), head, []), QUICK, "served")
        return False

    with pytest.raises(DataError, match="this policy is in use"):
        run_logged(run, QUICK, stop=meanwhile)
    assert not (run.folder / RERANKER_FILE).exists()
    shutil.rmtree(run.folder / POLICY_FOLDER)
    shutil.rmtree(run.folder / "reranker.partial")


def test_a_part_without_decisions_is_named(run: Run) -> None:
    with pytest.raises(DataError, match=r"run: part \d+ of 60 has 0 decisions, .*choose fewer parts"):
        run_logged(run, dataclasses.replace(QUICK, folds=60, decisions=60))
    shutil.rmtree(run.folder / "reranker.partial")


def test_diversity_is_refused(run: Run) -> None:
    rewards = dataclasses.replace(QUICK.rewards, diversity=0.1)
    with pytest.raises(ValueError, match="diversity"):
        dataclasses.replace(QUICK, rewards=rewards)
