"""`jaxrec rl logged`: folds, resumption, refusal, and runs that use a reranker."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrec
from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError, ExportError, TrainingStopped
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.reranker import CONTEXT, FEATURES, Reranker, RerankerWeights, Scales
from jaxrec.rl.checkpoint import models_digest
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.logged.tables import with_reranker
from jaxrec.runs.directory import RERANKER_FILE, Run, load_supervised, open_run
from jaxrec.runs.policy import load_run
from jaxrec.runs.rl_logged import run_logged
from tests.synthetic import random_log

SMALL = ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=16)
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
        assert path.name in ("reranker.json", RERANKER_FILE)
        path.unlink()
    return open_run(run_folder)


def test_a_log_without_structure_gives_no_reranker_and_a_stopped_training_ends_the_same(run: Run) -> None:
    outcome = run_logged(run, QUICK)
    assert not outcome.used
    assert outcome.reason.startswith("the mix stays: ")
    assert "permuted rewards" in outcome.reason
    written = json.loads((run.folder / "reranker.json").read_text())
    assert written["used"] is False
    assert LoggedConfig(**written["configuration"] | {"rewards": QUICK.rewards}) == QUICK
    assert {path.name for path in run.folder.glob("reranker*")} == {"reranker.json"}
    data = run.read_data()
    assert load_supervised(run, data).reranker is None

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


def use_some_reranker(run: Run) -> tuple[PreparedData, Hybrid]:
    """Writes one with random weights, as a training that succeeds does."""
    data = run.read_data()
    supervised = load_supervised(run, data)
    rng = np.random.default_rng(0)
    reranker = with_reranker(supervised, data).reranker
    assert reranker is not None
    features, context = len(FEATURES), len(CONTEXT)
    scales = Scales(np.ones(features), np.zeros(context), np.full(context, 10.0))
    weights = RerankerWeights(rng.normal(size=features), rng.normal(size=(context, features)))
    own = Reranker(reranker.tables, scales, weights)
    arrays = own.tables._asdict() | own.scales._asdict() | own.weights._asdict()
    np.savez(run.folder / RERANKER_FILE, models=models_digest(supervised), **arrays)
    return data, supervised.with_reranker(own)


def test_a_run_with_a_reranker_is_read_exported_and_evaluated(run: Run, tmp_path: Path) -> None:
    data, expected = use_some_reranker(run)
    found = load_supervised(run, data)
    assert found.reranker is not None
    assert expected.reranker is not None
    jax.tree.map(np.testing.assert_array_equal, found.reranker.weights, expected.reranker.weights)
    assert load_supervised(run, data, reranker=False).reranker is None
    before = jaxrec.Run.recommend(run, [1, 2, 3], k=5)
    jaxrec.export(run, tmp_path / "model")  # holds the graphs against JAX
    (run.folder / RERANKER_FILE).unlink()
    assert not before.equals(jaxrec.Run.recommend(open_run(run), [1, 2, 3], k=5))


def test_what_a_reranker_rules_out(run: Run, tmp_path: Path) -> None:
    use_some_reranker(run)
    with pytest.raises(DataError, match="uses a reranker"):
        load_run(run.folder)
    with pytest.raises(ExportError, match="an index has no reranker"):
        jaxrec.export(run, tmp_path / "model", index=True)
    assert not (tmp_path / "model").exists()


def test_a_reranker_of_other_models_or_a_damaged_one_is_refused(run: Run) -> None:
    use_some_reranker(run)
    path = run.folder / RERANKER_FILE
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "models": "others"})
    data = run.read_data()
    with pytest.raises(DataError, match="on top of other models"):
        load_supervised(run, data)
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot be read"):
        load_supervised(run, data)


def test_diversity_is_refused(run: Run) -> None:
    rewards = dataclasses.replace(QUICK.rewards, diversity=0.1)
    with pytest.raises(ValueError, match="diversity"):
        dataclasses.replace(QUICK, rewards=rewards)
