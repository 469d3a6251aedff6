"""An accepted policy is published on top of the models that serve; a training follows before the next policy."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxrec
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.runs.directory import MLFLOW_FILE, POLICY_FOLDER, open_run
from jaxrec.runs.learn import stages
from jaxrec.runs.learn.loop import learn
from jaxrec.runs.learn.state import POLICY
from jaxrec.runs.policy import LoadedRun, policy_in_use, write_policy
from serve.stores import open_store
from serve.stores.base import Slate
from tests.runs.learn.conftest import CONFIG, Loop, events_of_round, new_loop
from tests.tracked import mlflow_client

pytestmark = [  # of MLflow's own code
    pytest.mark.filterwarnings("ignore:.*type hint"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def loop(base: Path, tmp_path: Path) -> Loop:
    """With new events, and a recommendation that was shown."""
    loop = new_loop(base, tmp_path / "loop")
    loop.record(events_of_round(1))
    with open_store(loop.places.store) as store:
        store.log_slate(Slate("r", "7", ("1", "2"), (), "supervised", "1", 1_700_000_000))
    return loop


def test_an_accepted_policy_is_published_and_a_training_follows(
    loop: Loop, base: Path, new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `jaxrec rl served` decides is tested where it decides: here it accepts a policy that shifts every score."""

    def accepts(loaded: LoadedRun, log: Path, config: Any, stop: Any) -> PolicyOutcome:
        head = jax.tree.map(lambda leaf: leaf + 0.25, policy_in_use(loaded.run, loaded.supervised).variables)
        outcome = PolicyOutcome(True, "it earns more")
        write_policy(loaded.run, loaded.supervised, TrainedPolicy(outcome, head, []), config, "served")
        return outcome

    monkeypatch.chdir(tmp_path)
    uri, run = f"sqlite:///{shutil.copy(new_store, tmp_path / 'mlflow.db')}", tmp_path / "run"
    shutil.copytree(base / "run", run)
    elsewhere = {"run_id": "0" * 32, "data_version": open_run(run).data_version}  # in a store that is no longer used
    (run / MLFLOW_FILE).write_text(json.dumps(elsewhere))
    loop = Loop(dataclasses.replace(loop.places, run=run))
    config = dataclasses.replace(CONFIG, served=True, mlflow=uri)
    monkeypatch.setattr(stages, "run_served", accepts)
    state = learn(loop.places, config)
    assert list(state.history[-1].stages) == ["export-events", "append", "served", "export", "publish", "track"]
    assert (state.folder, state.changed, state.history[-1].reason) == ("2", POLICY, "it earns more")
    assert json.loads((loop.places.models / "2" / "manifest.json").read_text())["policy"] == "reinforce"
    assert (Path(state.run) / POLICY_FOLDER).is_dir()
    assert not (run / POLICY_FOLDER).exists()
    client, tracked = mlflow_client(uri), json.loads((Path(state.run) / MLFLOW_FILE).read_text("utf-8"))["run_id"]
    found = client.get_run(tracked)
    assert found.info.run_name.startswith("round 1, policy, ")
    assert found.data.tags["jaxrec.model_version"] == state.model_version
    assert [one.path for one in client.list_artifacts(tracked)] == ["model"]
    assert jaxrec.read_prepared(state.data).histories.event_count == 600 + 120
    monkeypatch.setattr(stages, "train_stage", lambda *given: {"trained": False, "reason": "refused: a loss is NaN"})
    loop.record(events_of_round(2))
    later = learn(loop.places, config)
    assert list(later.history[-1].stages) == ["export-events", "append", "train"]
    assert (later.folder, later.run, later.history[-1].reason) == ("2", state.run, "refused: a loss is NaN")
    assert jaxrec.read_prepared(later.data).histories.event_count == 600 + 240


def test_too_little_to_learn_from_is_a_result(loop: Loop, base: Path) -> None:
    """The slate was not drawn, so that it has no propensities."""
    folder = loop.places.work / "rounds" / "1"
    folder.mkdir(parents=True)
    found = stages.served_stage(loop.places.store, base / "run", folder, CONFIG, lambda: False)
    assert not found["used"]
    assert "no policy: " in found["reason"]
    assert "is the server run with --explore?" in found["reason"]
