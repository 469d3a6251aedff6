"""The versions of a model: which is loaded, what is refused, who is answered by which, and the way back."""

import gc
import os
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import grpc
import pytest

from bench.model_versions import DAMAGES, add_version, edit_manifest, flip_a_byte, garble_the_manifest
from serve.api.pages import item_page_token
from serve.client import RecommenderClient, recommend_request
from serve.front.limits import SLOW_WORKERS
from serve.front.server import create_server
from serve.model.events import Event
from serve.model.manifest import ArtifactError
from serve.model.recommender import Query
from serve.observability.metrics import Metrics
from serve.pb import model_admin_pb2 as pb
from serve.pb.model_admin_pb2_grpc import ModelAdminStub
from serve.serving import sweeper
from serve.serving.errors import RefusedModel, UnknownModel
from serve.serving.loading import ModelLoader, open_models
from serve.serving.versions import Division, ModelLibrary, State, position
from serve.stores.base import EventStore, Slate, SpilledState, Swept, UserEvent

DEADLINE_S = 30.0
WATCH_S = 0.05
QUERY = Query([Event("1007", None, 0)], k=5)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def attempts(metrics: Metrics, result: str) -> int:
    return int(metrics.registry.get_sample_value("jaxrec_model_reloads_total", {"result": result}) or 0)


@pytest.fixture
def versions(tmp_path: Path, model_directory: Path) -> Path:
    """A directory with the version 1."""
    add_version(tmp_path / "versions", model_directory, "1")
    return tmp_path / "versions"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def models(versions: Path, store: EventStore, metrics: Metrics) -> Iterator[ModelLibrary]:
    with open_models(versions, ModelLoader(store, metrics, "cpu"), watch_s=WATCH_S) as opened:
        yield opened


def test_the_newest_valid_version_is_loaded(
    versions: Path, model_directory: Path, store: EventStore, metrics: Metrics
) -> None:
    add_version(versions, model_directory, "2")
    add_version(versions, model_directory, "3", damage=flip_a_byte)
    (versions / "notes").mkdir()
    with open_models(versions, ModelLoader(store, metrics, "cpu"), watch_s=0) as models:
        assert models.versions() == ["2"]
        assert models.for_user("u").recommend(QUERY).items.size == 5
        states = {report.model_version: report.state for report in models.report()}
        assert states == {"3": State.REFUSED, "2": State.READY, "1": State.AVAILABLE}
    assert (attempts(metrics, "loaded"), attempts(metrics, "refused")) == (1, 1)


def test_refused_folders_that_are_gone_are_forgotten(
    versions: Path, model_directory: Path, models: ModelLibrary
) -> None:
    for name in ("2", "3"):
        damaged = add_version(versions, model_directory, name, damage=flip_a_byte)
        wait_for(lambda: State.REFUSED in {report.state for report in models.report()})
        shutil.rmtree(damaged)
    wait_for(lambda: not models._refused)


def test_states_of_versions_that_left_are_forgotten_in_the_background(
    versions: Path, store: EventStore, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "DROPPED_AT_ONCE", 2)
    users = [f"u{at}" for at in range(7)]
    store.record([UserEvent(user, user, Event("1007", None, 0)) for user in users])
    old = [SpilledState(user, "0", store.revision(user), b"x") for user in users]
    store.save_states([*old, old[0]._replace(model_version="1")])
    store.flush()
    drop, may_drop = store.drop_states, threading.Event()
    parts: list[Swept] = []

    def watched_drop(versions: Collection[str], most: int, place: object) -> Swept:
        assert may_drop.wait(DEADLINE_S)
        parts.append(drop(versions, most, place))
        return parts[-1]

    monkeypatch.setattr(store, "drop_states", watched_drop)
    with open_models(versions, ModelLoader(store, metrics, "cpu"), watch_s=0) as models:
        # It serves though nothing was forgotten yet.
        assert models.versions() == ["1"]
        may_drop.set()
        # Once until all are dropped, and once more, since some may have come meanwhile.
        wait_for(lambda: [one.place for one in parts].count(None) == 2)
    counts = [one.dropped_count for one in parts]
    assert (sum(counts), max(counts), counts[-1]) == (7, 2, 0)
    assert [store.load_state(user, "0") for user in users] == [None] * 7
    assert store.load_state("u0", "1") is not None


def test_a_model_directory_is_its_own_version(
    model_directory: Path, tmp_path: Path, store: EventStore, metrics: Metrics
) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    with open_models(tmp_path / "model", ModelLoader(store, metrics, "cpu"), watch_s=WATCH_S) as models:
        (report,) = models.report()
        assert (report.folder, report.state, report.traffic_share) == ("", State.READY, 1.0)
        edit_manifest(tmp_path / "model", lambda manifest: manifest.update(model_version="9"))
        wait_for(lambda: models.versions() == ["9"])


def test_nothing_to_load(tmp_path: Path, versions: Path, store: EventStore, metrics: Metrics) -> None:
    with pytest.raises(ArtifactError, match="nowhere: cannot be read: No such file"):
        open_models(tmp_path / "nowhere", ModelLoader(store, metrics))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="empty: expected a model directory, or one with model directories in it"):
        open_models(tmp_path / "empty", ModelLoader(store, metrics))
    flip_a_byte(versions / "1")
    with pytest.raises(ArtifactError, match=r"1/sequence\.onnx: has sha256"):
        open_models(versions, ModelLoader(store, metrics))


@pytest.mark.parametrize("forgets", [False, True])
def test_a_new_version_takes_over_and_an_old_one_leaves(
    forgets: bool, versions: Path, model_directory: Path, store: EventStore
) -> None:
    """At once, or as soon as it is not the one to roll back to any more."""
    loader = ModelLoader(store, Metrics(), "cpu")
    with open_models(versions, loader, watch_s=WATCH_S, keep_previous=not forgets) as models:
        takes_over(models, versions, model_directory, forgets)


def takes_over(models: ModelLibrary, versions: Path, model_directory: Path, forgets: bool) -> None:
    asked_before = models.for_user("u")
    add_version(versions, model_directory, "2")
    wait_for(lambda: models.versions() == ["2"])
    assert models.for_user("u") is not asked_before
    if not forgets:
        assert models.roll_back() == "1"
        assert models.for_user("u") is asked_before
        assert models.roll_back() == "2"
        add_version(versions, model_directory, "3")
        assert models.load_newest()
    # Who came before the change is answered by the old one, and then it is gone.
    assert asked_before.recommend(QUERY).items.size == 5
    old = weakref.ref(asked_before.model)
    gc.disable()
    try:
        del asked_before
        # Without waiting for the garbage collector; the watching thread may hold it for another moment.
        wait_for(lambda: old() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_refused_and_the_old_one_serves(
    damage: Callable[[Path], None],
    versions: Path,
    model_directory: Path,
    models: ModelLibrary,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    serving = models.for_user("u")
    bad = add_version(versions, model_directory, "2", damage=damage)
    wait_for(lambda: attempts(metrics, "refused") == 1)
    assert models.for_user("u") is serving
    (report,) = (report for report in models.report() if report.folder == "2")
    assert report.state is State.REFUSED
    assert report.reason
    assert any("refused the model 2" in record.getMessage() for record in caplog.records)
    # It is not tried again as it is, and once it has been repaired it is loaded.
    add_version(versions, model_directory, "0")
    # At once: removed file by file it would be another damaged version for a moment.
    bad.rename(versions.parent / "removed")
    add_version(versions, model_directory, "2")
    wait_for(lambda: models.versions() == ["2"])
    assert attempts(metrics, "refused") == 1


def test_long_names_of_versions_are_cut_in_messages(
    versions: Path, model_directory: Path, store: EventStore, metrics: Metrics
) -> None:
    name = "9" * 1_000

    def damage(folder: Path) -> None:
        edit_manifest(folder, lambda manifest: manifest.update(model_version=name))
        flip_a_byte(folder)

    with open_models(versions, ModelLoader(store, metrics, "cpu"), watch_s=0) as models:
        with pytest.raises(UnknownModel) as unknown:
            models.version(name)
        with pytest.raises(UnknownModel) as absent:
            models.load(name)
        add_version(versions, model_directory, "2", damage=damage)
        with pytest.raises(RefusedModel) as refused:
            models.load(name)
        with pytest.raises(RefusedModel) as too_many:
            models.set_traffic({f"{name}{at}": 0.5 for at in range(3)})
    for failure in (unknown, absent, refused):
        assert f"'{'9' * 200}'..." in str(failure.value)
        assert "9" * 201 not in str(failure.value)
    assert str(too_many.value) == "expected one or two versions, came 3"


def test_half_a_copy_is_refused_until_it_is_whole(versions: Path, model_directory: Path, models: ModelLibrary) -> None:
    """Somebody copies file by file into place, and the manifest comes early."""
    whole = add_version(versions.parent / "elsewhere", model_directory, "2")
    (versions / "2").mkdir()
    names = sorted(os.listdir(whole), key=lambda name: name != "manifest.json")
    for name in names[:3]:
        shutil.copy(whole / name, versions / "2" / name)
    wait_for(lambda: [report.state for report in models.report() if report.folder == "2"] == [State.REFUSED])
    assert models.versions() == ["1"]
    for name in names[3:]:
        shutil.copy(whole / name, versions / "2" / name)
    wait_for(lambda: models.versions() == ["2"])


def test_traffic_is_divided_by_user(versions: Path, model_directory: Path, models: ModelLibrary) -> None:
    add_version(versions, model_directory, "0")
    users = [f"user {number}" for number in range(4000)]
    by_share = {}
    for share in (0.1, 0.3):
        assert models.set_traffic({"1": share, "0": 1 - share})
        assert not models.set_traffic({"0": 1 - share, "1": share})
        by_share[share] = {user for user in users if models.for_user(user) is models.version("1")}
        assert by_share[share] == {user for user in users if models.for_user(user) is models.version("1")}
        # Four standard deviations of a binomial share.
        assert abs(len(by_share[share]) / len(users) - share) < 4 * (share * (1 - share) / len(users)) ** 0.5
        assert models.for_user(None) is models.version("") is models.version("0")
    assert by_share[0.1] < by_share[0.3]
    assert models.versions() == ["0", "1"]
    assert [share for _, share in models.shares()] == [0.7, 0.3]


def test_positions_of_users_are_even_and_fixed() -> None:
    counts = Counter(int(10 * position(f"user {number}")) for number in range(10_000))
    assert set(counts) == set(range(10))
    assert max(abs(count - 1000) for count in counts.values()) < 4 * (10_000 * 0.1 * 0.9) ** 0.5
    assert position("7") == position("7") != position("8")


@pytest.mark.parametrize(
    ("division", "served", "previous"),
    [
        (Division({"1": 1.0}, False, "2"), ["1"], "2"),
        (Division({"gone": 1.0}, False, "1"), ["2"], "gone"),
        (Division({"2": 1.0}, True, "1"), ["2"], "1"),
        # As it was before there was a newer version.
        (Division({"1": 1.0}, True, None), ["2"], "1"),
    ],
)
def test_a_late_process_begins_as_the_others_divide_users(
    division: Division, served: list[str], previous: str, versions: Path, model_directory: Path, store: EventStore
) -> None:
    add_version(versions, model_directory, "2")
    with open_models(versions, ModelLoader(store, Metrics(), "cpu"), watch_s=0, load_now=False) as models:
        models.open(division)
        assert models.versions() == served
        states = {report.model_version: report.state for report in models.report()}
        assert [version for version, state in states.items() if state is State.READY] == served
        if previous == "gone":
            with pytest.raises(RefusedModel, match="'gone' is not in the model directory"):
                models.roll_back()
        else:
            assert models.roll_back() == previous


def test_changes_by_hand_stop_the_automatic_ones(versions: Path, model_directory: Path, models: ModelLibrary) -> None:
    with pytest.raises(RefusedModel, match="no other version has served"):
        models.roll_back()
    add_version(versions, model_directory, "2")
    wait_for(lambda: models.versions() == ["2"])
    assert models.roll_back() == "1"
    assert models.versions() == ["1"]
    assert not models.automatic
    add_version(versions, model_directory, "3")
    assert models.roll_back() == "2"
    assert models.load("2") is False
    with pytest.raises(UnknownModel, match="'4' is not in the model directory"):
        models.load("4")
    with pytest.raises(UnknownModel, match="'3' is not loaded"):
        models.version("3")
    garble_the_manifest(add_version(versions, model_directory, "5"))
    flip_a_byte(versions / "1")
    # It is in memory as it was.
    assert models.roll_back() == "1"
    assert models.roll_back() == "2"
    flip_a_byte(versions / "3")
    with pytest.raises(RefusedModel, match=r"'3' is refused: .*sequence\.onnx: has sha256"):
        models.load("3")
    # The one before stays in memory, though another one was to be loaded.
    assert models.roll_back() == "1"
    assert models.roll_back() == "2"
    add_version(versions.parent / "again", model_directory, "3")
    shutil.rmtree(versions / "3")
    (versions.parent / "again" / "3").rename(versions / "3")
    with pytest.raises(RefusedModel, match=r"came 0\.9"):
        models.set_traffic({"2": 0.4, "3": 0.5})
    assert models.versions() == ["2"]
    assert models.load_newest()
    assert models.versions() == ["3"]
    assert models.automatic
    add_version(versions, model_directory, "6")
    wait_for(lambda: models.versions() == ["6"])


def test_outcomes_keep_no_slow_call_waiting(
    models: ModelLibrary, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many are asked for as there are threads for slow calls, while a log is being read."""
    begun, goes_on = threading.Event(), threading.Event()

    def all_slates(*_: object) -> Iterator[list[Slate]]:
        begun.set()
        assert goes_on.wait(DEADLINE_S)
        yield []

    monkeypatch.setattr(store, "all_slates", all_slates)
    server = create_server(models, store, "127.0.0.1:0")
    server.start()
    address = f"127.0.0.1:{server.port}"
    with grpc.insecure_channel(address) as channel, RecommenderClient(address) as client:
        asked = [
            ModelAdminStub(channel).GetOutcomes.future(pb.GetOutcomesRequest(window=window), timeout=DEADLINE_S)
            for window in range(1, 1 + SLOW_WORKERS)
        ]
        assert begun.wait(DEADLINE_S)
        assert len(client.batch_recommend([recommend_request(user_id="7", k=1)])) == 1
        assert not any(one.done() for one in asked)
        goes_on.set()
        assert [len(one.result().outcomes) for one in asked] == [0] * SLOW_WORKERS
    server.drain()


def test_admin_service(versions: Path, model_directory: Path, models: ModelLibrary, store: EventStore) -> None:
    server = create_server(models, store, "127.0.0.1:0")
    server.start()
    address = f"127.0.0.1:{server.port}"
    with grpc.insecure_channel(address) as channel, RecommenderClient(address) as client:
        admin = ModelAdminStub(channel)

        def failure(call: Callable[..., object], request: object) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as raised:
                call(request, timeout=DEADLINE_S)
            code: grpc.StatusCode = raised.value.code()
            return code

        assert failure(admin.RollBack, pb.RollBackRequest()) is grpc.StatusCode.FAILED_PRECONDITION
        add_version(versions, model_directory, "0")
        shares = [pb.TrafficShare(model_version="0", share=0.5), pb.TrafficShare(model_version="1", share=0.5)]
        answer = admin.SetTraffic(pb.SetTrafficRequest(shares=shares), timeout=DEADLINE_S)
        assert {entry.model_version: entry.share for entry in answer.shares} == {"0": 0.5, "1": 0.5}
        served = Counter(client.recommend(user_id=str(user)).model_version for user in range(40))
        assert set(served) == {"0", "1"}
        assert served["0"] == sum(position(str(user)) < 0.5 for user in range(40))
        answer = admin.LoadModel(pb.LoadModelRequest(model_version="0"), timeout=DEADLINE_S)
        assert (answer.model_version, answer.loaded) == ("0", True)
        listed = admin.ListModels(pb.ListModelsRequest(), timeout=DEADLINE_S)
        assert not listed.automatic_reload
        assert [(one.model_version, one.folder, one.state, one.traffic_share) for one in listed.models] == [
            ("1", "1", pb.MODEL_STATE_AVAILABLE, 0.0),
            ("0", "0", pb.MODEL_STATE_READY, 1.0),
        ]
        assert listed.models[1].loaded_time > 0
        first = admin.ListModels(pb.ListModelsRequest(page_size=1), timeout=DEADLINE_S)
        rest = admin.ListModels(pb.ListModelsRequest(page_token=first.next_page_token), timeout=DEADLINE_S)
        assert ([*first.models, *rest.models], rest.next_page_token) == (list(listed.models), "")
        for bad in (pb.ListModelsRequest(page_size=-1), pb.ListModelsRequest(page_token=item_page_token("1"))):
            assert failure(admin.ListModels, bad) is grpc.StatusCode.INVALID_ARGUMENT
        answer = admin.LoadModel(pb.LoadModelRequest(), timeout=DEADLINE_S)
        assert (answer.model_version, answer.loaded) == ("1", True)
        assert admin.RollBack(pb.RollBackRequest(), timeout=DEADLINE_S).model_version == "0"
        assert failure(admin.LoadModel, pb.LoadModelRequest(model_version="7")) is grpc.StatusCode.NOT_FOUND
        add_version(versions, model_directory, "8", damage=flip_a_byte)
        assert failure(admin.LoadModel, pb.LoadModelRequest(model_version="8")) is grpc.StatusCode.FAILED_PRECONDITION
        store.flush()
        outcomes = admin.GetOutcomes(pb.GetOutcomesRequest(), timeout=DEADLINE_S)
        assert sum(outcomes.left_out.values()) + sum(one.recommendation_count for one in outcomes.outcomes) == 40
        assert failure(admin.GetOutcomes, pb.GetOutcomesRequest(window=-1)) is grpc.StatusCode.INVALID_ARGUMENT
        for bad in ([], [*shares, *shares], [shares[0]], [shares[0], shares[0]]):
            request = pb.SetTrafficRequest(shares=bad)
            assert failure(admin.SetTraffic, request) is grpc.StatusCode.INVALID_ARGUMENT
    server.drain()


def test_rolling_back_undoes_a_trial_of_another_version(
    versions: Path, model_directory: Path, models: ModelLibrary
) -> None:
    """Not what served before the version that most are still answered by."""
    add_version(versions, model_directory, "2")
    wait_for(lambda: models.versions() == ["2"])
    add_version(versions, model_directory, "0")
    models.set_traffic({"2": 0.9, "0": 0.1})
    assert models.roll_back() == "2"
    assert models.shares() == [("2", 1.0)]


def test_as_many_states_are_kept_as_are_asked_for(model_directory: Path, store: EventStore) -> None:
    users = ["ada", "bob", "cyd"]
    store.record([UserEvent(f"e-{user}", user, Event("1007", None, 1)) for user in users])
    model = ModelLoader(store, Metrics(), "cpu", states=2).load(model_directory)
    for user in users:
        model.recommend(Query([], k=5, user_id=user))
    assert [model.states.has(user) for user in users] == [False, True, True]
