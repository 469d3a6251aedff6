"""What a round does where something is lost, foreign, damaged or given otherwise: it says so, or resumes."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import jaxrec
from jaxrec.cli.main import main
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.files import locked
from jaxrec.runs.learn import stages
from jaxrec.runs.learn.loop import learn
from jaxrec.runs.learn.metrics import metrics_text
from jaxrec.runs.learn.start import location
from jaxrec.runs.learn.state import State, read_state
from serve.model.events import Event
from serve.stores.base import UserEvent
from tests.runs.learn.conftest import CONFIG, Loop, events_of_round, new_loop

REFUSED = {"accepted": False, "reason": "refused: it may be worse"}
Replaced = Mapping[str, Any]


@pytest.fixture
def loop(base: Path, tmp_path: Path) -> Loop:
    loop = new_loop(base, tmp_path / "loop")
    loop.record(events_of_round(1))
    return loop


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No model is trained, and the gate refuses: what is tested is around them."""
    monkeypatch.setattr(stages, "train_stage", lambda *given: {"trained": True})
    monkeypatch.setattr(stages, "gate_stage", lambda *given: REFUSED)
    return monkeypatch


def state_of(loop: Loop) -> State:
    state = read_state(loop.places.work)
    assert state is not None
    return state


def fails(*given: Any) -> Any:
    raise RuntimeError("the disk is gone")


def test_a_refused_round_keeps_the_run_and_the_grown_data(
    loop: Loop, base: Path, untrained: pytest.MonkeyPatch
) -> None:
    state = learn(loop.places, CONFIG)
    assert (state.run, state.folder, state.history[-1].reason) == (str(base / "run"), "1", REFUSED["reason"])
    assert jaxrec.read_prepared(state.data).histories.event_count == 600 + 120
    assert state.published_data == str(base / "data")
    loop.record(events_of_round(2))
    assert jaxrec.read_prepared(learn(loop.places, CONFIG).data).histories.event_count == 600 + 240


def test_events_that_cannot_be_used_or_are_known_end_the_round_and_not_the_loop(
    loop: Loop, base: Path, untrained: pytest.MonkeyPatch
) -> None:
    """Ids of text in data of whole numbers, a rating off the scale, line breaks, and what was learned from already."""
    learn(loop.places, CONFIG)
    bad = [("text", "x", "1", 3.0), ("rating", "1", "1", 99.0), ("row", "1", "1\n7,2,5.0,1600000000\n8", 3.0)]
    loop.record([UserEvent(name, user, Event(item, rating, 1_700_000_000)) for name, user, item, rating in bad])
    state = learn(loop.places, CONFIG)
    assert (state.revision, state.round, state.error) == (123, None, "")
    assert "every row is bad" in state.history[-1].reason
    assert "\njaxrec_learn_bad_events 3.0\n" in metrics_text(state)
    again = [one._replace(event_id=f"again {one.event_id}") for one in events_of_round(1)]
    loop.record(again)
    state = learn(loop.places, CONFIG)
    assert "all of its 120 usable events are in the data already" in state.history[-1].reason
    loop.record([*again, *events_of_round(2)])
    assert jaxrec.read_prepared(learn(loop.places, CONFIG).data).histories.event_count == 600 + 240


def test_a_store_that_was_replaced_is_an_error(loop: Loop, untrained: pytest.MonkeyPatch) -> None:
    learn(loop.places, CONFIG)
    for path in Path(loop.places.store).parent.glob("events.sqlite*"):
        path.unlink()
    loop.record(events_of_round(2)[:10])
    with pytest.raises(DataError, match="the store has come to revision 10, and the export begins after revision 120"):
        learn(loop.places, CONFIG)


def test_an_unexpected_error_is_noted_and_the_round_is_resumed(loop: Loop, untrained: pytest.MonkeyPatch) -> None:
    untrained.setattr(stages, "train_stage", fails)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        learn(loop.places, CONFIG)
    assert "\njaxrec_learn_failed 1.0\n" in metrics_text(state_of(loop))
    untrained.setattr(stages, "train_stage", lambda *given: {"trained": True})
    untrained.setattr(stages, "append_stage", None)  # it is done
    state = learn(loop.places, CONFIG)
    assert (state.error, state.history[-1].stages["train"]["attempts"]) == ("", 2)


def test_a_lost_events_file_is_exported_again(loop: Loop, untrained: pytest.MonkeyPatch) -> None:
    append_stage = stages.append_stage
    untrained.setattr(stages, "append_stage", fails)
    with pytest.raises(RuntimeError):
        learn(loop.places, CONFIG)
    (loop.places.work / "rounds" / "1" / "events.parquet").unlink()
    loop.record(events_of_round(2))
    untrained.setattr(stages, "append_stage", append_stage)
    state = learn(loop.places, CONFIG)
    assert (state.revision, jaxrec.read_prepared(state.data).histories.event_count) == (240, 600 + 240)


def test_other_settings_are_refused_while_a_stage_is_done_with_them(loop: Loop, untrained: pytest.MonkeyPatch) -> None:
    untrained.setattr(stages, "export_stage", fails)
    untrained.setattr(stages, "gate_stage", lambda *given: {"accepted": True, "reason": "accepted"})
    with pytest.raises(RuntimeError):
        learn(loop.places, CONFIG)
    with pytest.raises(DataError, match=r"--margin is 0.5: the stage gate of round 1.* was done with 1.0"):
        learn(loop.places, dataclasses.replace(CONFIG, margin=0.5))
    with pytest.raises(DataError, match="was begun after revision 0, not 7"):
        learn(loop.places, dataclasses.replace(CONFIG, after=7))


def test_a_foreign_version_is_not_published_as_the_loops_own(
    loop: Loop, base: Path, untrained: pytest.MonkeyPatch
) -> None:
    """It comes between the export and the publication, under the number that the loop would have chosen."""
    untrained.setattr(stages, "gate_stage", lambda *given: {"accepted": True, "reason": "accepted"})
    untrained.setattr(
        stages, "train_stage", lambda run, folder, *given: {"trained": bool(shutil.copytree(run, folder / "run"))}
    )
    publish_stage = stages.publish_stage
    untrained.setattr(stages, "publish_stage", fails)
    with pytest.raises(RuntimeError):
        learn(loop.places, CONFIG)
    foreign = loop.places.models / "2"
    foreign.mkdir()
    content = json.loads((loop.places.models / "1" / "manifest.json").read_text())
    (foreign / "manifest.json").write_text(json.dumps({**content, "model_version": "2999"}))
    untrained.setattr(stages, "publish_stage", publish_stage)
    with pytest.raises(DataError, match=r"the newest version is 2999 \(2\)"):
        learn(loop.places, CONFIG)
    (foreign / "manifest.json").write_text(json.dumps({**content, "model_version": "1999"}))  # older: it stays
    state = learn(loop.places, CONFIG)
    assert (state.folder, state.published) == ("3", ("3",))
    assert json.loads((foreign / "manifest.json").read_text())["model_version"] == "1999"
    assert state.model_version == state.history[-1].result("export")["model_version"]  # type: ignore[index]


def test_one_loop_at_a_time_writes_a_folder_of_models(loop: Loop) -> None:
    with locked(loop.places.models, "learn"), pytest.raises(DataError, match="another `jaxrec learn` is at work there"):
        learn(loop.places, CONFIG)


def test_a_damaged_run_is_an_error_and_no_reason_for_no_policy(loop: Loop, base: Path, tmp_path: Path) -> None:
    from serve.stores import open_store
    from serve.stores.base import Slate

    with open_store(loop.places.store) as store:
        store.log_slate(Slate("r", "7", ("1", "2"), (), "supervised", "1", 1_700_000_000))
    shutil.copytree(base / "run", tmp_path / "run")
    (tmp_path / "run" / "hybrid.json").write_text("{")
    with pytest.raises(DataError, match="hybrid"):
        stages.served_stage(loop.places.store, tmp_path / "run", tmp_path, CONFIG, lambda: False)


def test_the_work_folder_may_be_a_link_and_is_closed_to_others(
    loop: Loop, tmp_path: Path, untrained: pytest.MonkeyPatch
) -> None:
    """As systemd's StateDirectory with DynamicUser; so may the folder of the data."""
    (tmp_path / "private").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "private")
    (tmp_path / "data").symlink_to(loop.places.data)
    places = dataclasses.replace(loop.places, work=tmp_path / "link" / "work", data=tmp_path / "data")
    learn(places, CONFIG)
    loop.record(events_of_round(2))
    assert learn(places, CONFIG).revision == 240
    assert (tmp_path / "private" / "work").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "store",
    [
        "postgresql://h/d?user=u&password=secret",
        "postgresql://u:secret@h/d",
        "postgresql://u:s?secret@h/d",
        "redis://:secret@h:6379/0",
    ],
)
def test_the_state_holds_no_password(store: str) -> None:
    assert "secret" not in location(store)
    assert location("redis://u@h:6379/0") != location("redis://h:6379/1")


def test_a_stopped_command_ends_with_75_and_a_failed_one_writes_metrics(
    loop: Loop, tmp_path: Path, untrained: pytest.MonkeyPatch
) -> None:
    metrics = tmp_path / "learn.prom"
    command = ["learn", "--store", loop.places.store, "--metrics-file", str(metrics), "--no-served"]
    for name in ("run", "data", "models", "work"):
        command += [f"--{name}", str(getattr(loop.places, name))]

    def stopped(*given: Any) -> Any:
        raise TrainingStopped("stopped after step 3")

    untrained.setattr(stages, "train_stage", stopped)
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.output) == (75, "stopped after step 3; the same command resumes there\n")
    assert "\njaxrec_learn_failed 0.0\n" in metrics.read_text()
    (loop.places.work / "state.json").write_text("{")
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, "state.json: not JSON" in result.output) == (1, True)
    assert "\njaxrec_learn_failed 1.0\n" in metrics.read_text()
