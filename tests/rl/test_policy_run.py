"""The policy of a run directory, from `jaxrec rl` to the hybrid that is exported."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import RLConfig, TrainConfig, to_json
from jaxrec.evaluate import jit_scorer, rank_cases
from jaxrec.files import sha256
from jaxrec.metrics import ndcg
from jaxrec.models.hybrid import Hybrid
from jaxrec.prepare import PreparedData, write_prepared
from jaxrec.rl.policy_run import (
    POLICY_FOLDER,
    load_policy,
    load_served,
    policy_name,
    read_log,
    read_outcome,
    rl_run,
)
from jaxrec.rl.train_policy import train_policy
from jaxrec.runs import SCHEMA_VERSION, Run, open_run
from jaxrec.schema import DataError
from jaxrec.train import TrainingError

SHORT = RLConfig(steps=30, steps_per_evaluation=20, batch_size=16, policy_width=8, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def supervised(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> Iterator[Hybrid]:
    """Random models in place of the run's trained ones, which tests of the command line train."""
    hybrid = random_hybrid(small_data, 0, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrec.rl.policy_run.load_supervised", lambda run, data: hybrid)
        yield hybrid


@pytest.fixture(scope="module")
def trained(small_data: PreparedData, supervised: Hybrid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a short-lived policy."""
    folder = tmp_path_factory.mktemp("rl")
    write_prepared(small_data, folder / "data")
    description = {
        "schema_version": SCHEMA_VERSION,
        "data": str(folder / "data"),
        "data_sha256": sha256(folder / "data/prepared.json"),
        "data_version": 0,
        "items": len(small_data.catalog),
        "items_sha256": "",
        "model": to_json(supervised.lstm.config),
        "train": to_json(TrainConfig()),
    }
    (folder / "run").mkdir()
    (folder / "run/run.json").write_text(json.dumps(description))
    rl_run(folder / "run", SHORT)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    """A copy of the run, to be changed."""
    return open_run(Path(shutil.copytree(trained, tmp_path / "run")))


def record_use(run: Run, used: bool) -> None:
    path = run.folder / POLICY_FOLDER / "policy.json"
    record = json.loads(path.read_text())
    record["outcome"]["used"] = used
    path.write_text(json.dumps(record))


def test_outcome_is_written_and_read_back(run: Run, small_data: PreparedData, supervised: Hybrid) -> None:
    outcome = read_outcome(run)
    again = train_policy(supervised, small_data, SHORT)
    assert outcome == again.outcome
    assert read_log(run.folder) == again.log
    assert [record["step"] for record in again.log] == [20, 30]
    assert outcome is not None
    assert outcome.step in (20, 30)
    assert again.log[0]["kl"] > 0


def test_judged_figures_are_those_of_the_loaded_policy(run: Run, small_data: PreparedData, supervised: Hybrid) -> None:
    """What was judged is what is served: the policy's validation NDCG@10 from its files, through the hybrid."""
    outcome, hybrid = read_outcome(run), load_policy(run, supervised, only_if_used=False)
    assert outcome is not None
    assert hybrid is not None
    for model, expected in ((supervised, outcome.supervised), (hybrid, outcome.policy)):
        scorer = jit_scorer(model, lambda model, events, gap: model.logits(events, gap)[0])
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
        read_log(run.folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "policy.npz").write_bytes(b"half"), r"policy\.npz: missing or damaged"),
        (lambda folder: (folder / "policy.npz").unlink(), r"policy\.npz: missing or damaged"),
        (lambda folder: (folder / "policy.json").write_text("{"), r"policy\.json: not JSON"),
        (lambda folder: (folder / "policy.json").unlink(), r"policy\.json: cannot be read"),
        (lambda folder: (folder / "policy.json").write_text("[]"), r"policy\.json: not a policy"),
        (lambda folder: (folder / "policy.json").write_text('{"schema_version": 2}'), "schema version 2, expected 1"),
        (lambda folder: (folder / "policy.json").write_text('{"schema_version": 1}'), "'outcome'"),
    ],
)
def test_damaged_files_are_reported(
    run: Run, supervised: Hybrid, damage: Callable[[Path], object], message: str
) -> None:
    damage(run.folder / POLICY_FOLDER)
    with pytest.raises(DataError, match=message):
        load_policy(run, supervised, only_if_used=False)


def test_policy_of_other_models_is_refused(
    run: Run, small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> None:
    hybrid = random_hybrid(small_data, 0, False)
    for model in (hybrid.lstm, hybrid.content):
        model.item_embedding = nnx.Param(jnp.zeros((len(small_data.catalog) + 1, 4)))
    hybrid.content.genre_projection = nnx.Linear(len(small_data.catalog.genres), 4, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(DataError, match="do not fit the models"):
        load_policy(run, hybrid, only_if_used=False)


def test_seed_decides_the_policy(small_data: PreparedData, supervised: Hybrid) -> None:
    config = dataclasses.replace(SHORT, seed=1)
    first, other = train_policy(supervised, small_data, SHORT), train_policy(supervised, small_data, config)
    assert first.log != other.log
    assert not np.array_equal(first.variables["item_bias"], other.variables["item_bias"])


def test_not_finite_stops_and_keeps_the_policy_before(run: Run) -> None:
    before = read_outcome(run)
    with pytest.raises(TrainingError, match=r"not finite at step 1 \(of steps 0\.\.19\)"):
        rl_run(run.folder, dataclasses.replace(SHORT, learning_rate=float("inf")))
    assert read_outcome(run) == before
    assert sorted(path.name for path in run.folder.iterdir() if path.name.startswith(".")) == []
