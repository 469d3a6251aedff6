"""A policy improved from what the server's own code drew, logged and was told, or kept because the gate says no."""

import dataclasses
import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError
from jaxrec.files import read_json_lines, sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx.model_directory import export_model
from jaxrec.rl.config import RewardWeights, ServedConfig
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.scoring import OF_RERANKER
from jaxrec.rl.served.event_store import (
    DETERMINISTIC,
    NO_HISTORY,
    SENT_ALONG,
    STILL_OPEN,
    UNKNOWN_ITEM,
    UNNOTED,
    read_served_log,
)
from jaxrec.runs.directory import POLICY_FILES, POLICY_FOLDER, POLICY_PREVIOUS_FOLDER, open_run
from jaxrec.runs.policy import (
    LoadedRun,
    load_policy,
    policy_in_use,
    read_record,
    write_policy,
)
from jaxrec.runs.rl_served import run_served
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.exploration import Exploration
from serve.model.recommender import Query, Recommender
from serve.observability.metrics import Metrics
from serve.serving.loaded import LoadedModel
from serve.serving.trend import TrendRefresher
from serve.stores.base import Slate, UserEvent
from serve.stores.sqlite.store import SQLiteStore
from tests.serve.stores.slates import log_now

TEMPERATURE, USERS, ROUNDS, SLOTS = 1.5, 150, 4, 4
START = 1_200_000_000
HITS = RewardWeights(hit=1.0, genre=0.0, rating=0.0)
CONFIG = ServedConfig(
    updates=100,
    batch_size=64,
    learning_rate=3e-2,
    kl_target=0.3,
    importance_cap=20.0,
    rewards=HITS,
    minimum_effective=20.0,
)


@pytest.fixture(scope="module")
def supervised(small_hybrid: Hybrid) -> Hybrid:
    """The models under the policy of `model_directory`, in place of the run's trained ones."""
    return small_hybrid.with_policy(None)


@pytest.fixture
def loaded(
    tmp_path: Path,
    new_run: Callable[[Path, Hybrid], Path],
    small_data: PreparedData,
    supervised: Hybrid,
    small_hybrid: Hybrid,
) -> LoadedRun:
    """A run that uses the policy of `model_directory`."""
    run = open_run(new_run(tmp_path, supervised))
    write_policy(run, supervised, in_use(nnx.to_pure_dict(nnx.state(small_hybrid.policy))), CONFIG, "reinforce")
    return LoadedRun(run, small_data, supervised)


@pytest.fixture
def run(loaded: LoadedRun) -> Path:
    return loaded.run.folder


def in_use(head: dict) -> TrainedPolicy:
    return TrainedPolicy(PolicyOutcome(True, "for the test"), head, [])


def serve_and_log(
    model_directory: Path,
    data: PreparedData,
    store: SQLiteStore,
    takes: Callable[[int, np.random.Generator], bool],
    users: int = USERS,
    trend_times: Mapping[int, int] = {},
) -> None:
    """`users` users of the server's own code ask ROUNDS times and respond to what they like of each slate. From the
    users in `trend_times` on, the trend is that of the export's counts as of that time in seconds, and is noted."""
    model = LoadedModel(Recommender(read_artifact(model_directory)), store, Metrics(), Exploration(TEMPERATURE, seed=4))
    rng, raw_ids = np.random.default_rng(3), data.catalog.ids.raw_ids.astype(str)
    number = 0
    for user in range(users):
        name, time = f"visitor {user}", START + 1000 * user
        if user in trend_times:
            TrendRefresher(None, clock=lambda at=trend_times[user]: at).prepare(model.model)
        for item in rng.choice(raw_ids, rng.integers(2, 9), replace=False):
            number, time = number + 1, time + int(rng.integers(1, 50))
            store.record([UserEvent(f"e{number}", name, Event(str(item), float(rng.integers(1, 6)), time))])
        number += 1  # the first request comes within the second of the last event
        for _ in range(ROUNDS):
            answer = model.recommend(Query((), SLOTS, user_id=name))
            items = tuple(str(model.model.catalog.item_ids[item]) for item in answer.items.tolist())
            drawn = answer.log_propensities, answer.policy, "v1", time, TEMPERATURE
            shown = Slate(f"r{number}", name, items, *drawn)
            if trend_times:
                shown = shown._replace(trend_time=answer.counted.time, trend_arrival=answer.counted.arrival)
            log_now(store, shown)
            for item in items:
                if takes(int(item), rng):
                    event = Event(item, float(rng.integers(1, 6)), time)
                    store.record([UserEvent(f"e{number}", name, event, shown.recommendation_id)])
                    number += 1
            number, time = number + 1, time + int(rng.integers(0, 2))  # the next may come within the same second


@pytest.fixture(scope="module")
def liked(model_directory: Path, small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of users who all like the same third of the items."""
    path = tmp_path_factory.mktemp("liked") / "events.sqlite"
    with SQLiteStore(path) as store:
        serve_and_log(
            model_directory, small_data, store, lambda item, rng: rng.random() < (0.5 if _good(item) else 0.02)
        )
    return path


@pytest.fixture(scope="module")
def indifferent(model_directory: Path, small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of users who take anything as often."""
    path = tmp_path_factory.mktemp("indifferent") / "events.sqlite"
    with SQLiteStore(path) as store:
        serve_and_log(model_directory, small_data, store, lambda item, rng: rng.random() < 0.2)
    return path


def _good(raw_id: int) -> bool:
    return (raw_id - 1000) // 7 % 3 == 0


def test_a_better_policy_replaces_the_one_in_use(
    run: Path, loaded: LoadedRun, liked: Path, small_data: PreparedData, supervised: Hybrid
) -> None:
    """The log's propensities are reproduced by the run's own models; the new policy shows more of what users like; the
    old one is kept beside it."""
    old = load_policy(open_run(run), supervised)
    digest, before = sha256(run / POLICY_FOLDER / "policy.npz"), sha256(liked)
    found = run_served(loaded, liked, CONFIG)
    assert found.used, found.reason
    assert f"{ROUNDS * USERS} recommendations shown" in found.summary
    assert f"; {ROUNDS * USERS} by v1 (the policy in use); attribution window 0 s." in found.summary
    assert "the new policy may be used" in found.reason
    new = load_policy(open_run(run), supervised)
    assert new is not None
    assert old is not None
    assert new.policy is not None
    assert old.policy is not None
    shift = np.asarray(new.policy.item_bias[...] - old.policy.item_bias[...])[1:]
    good = np.array([_good(raw) for raw in small_data.catalog.ids.raw_ids.tolist()])
    assert shift[good].mean() > shift[~good].mean() + 0.1
    assert sha256(run / POLICY_PREVIOUS_FOLDER / "policy.npz") == digest
    assert sha256(liked) == before
    assert {path.name for path in run.iterdir()} <= {"run.json", *POLICY_FILES}  # which new data removes
    record = json.loads((run / "policy_from_log.json").read_text())
    robust, gain = record["doubly_robust_gain"], record["gate"]["gain"]
    assert f"the doubly robust gain is {robust['value']:.4f} ({robust['low']:.4f} to {robust['high']:.4f})" in (
        found.reason
    )
    assert robust["low"] < gain["value"] < robust["high"]
    assert gain["low"] < robust["value"] < gain["high"]
    written, steps = read_record(open_run(run)), read_json_lines(run / POLICY_FOLDER / "steps.jsonl", "")
    assert written is not None
    outcome = written.outcome
    assert outcome.figures["policy"]["value"] > outcome.figures["logged"]["value"]
    assert len(steps) == CONFIG.updates
    assert steps[0]["kl"] == 0.0 < steps[-1]["kl"] < 2 * CONFIG.kl_target
    assert steps[0]["ess_share"] > 0.99 > steps[-1]["ess_share"]


def test_a_policy_that_came_into_use_meanwhile_is_not_replaced(
    run: Path, loaded: LoadedRun, liked: Path, supervised: Hybrid
) -> None:
    other = in_use({**policy_in_use(loaded.run, supervised).variables, "item_bias": np.zeros(61, np.float32)})

    def meanwhile() -> bool:
        write_policy(loaded.run, supervised, other, CONFIG, "simulated")
        return False

    with pytest.raises(DataError, match="the policy in use is not the one that the new policy was compared with"):
        run_served(loaded, liked, CONFIG, meanwhile)
    record = read_record(open_run(run))
    assert record is not None
    assert record.method == "simulated"


def test_a_policy_that_is_not_shown_to_be_better_is_refused(run: Path, loaded: LoadedRun, indifferent: Path) -> None:
    digest = sha256(run / POLICY_FOLDER / "policy.json")
    found = run_served(loaded, indifferent, CONFIG)
    assert not found.used
    assert "a gain above 0 is not shown" in found.reason
    assert sha256(run / POLICY_FOLDER / "policy.json") == digest
    assert not (run / POLICY_PREVIOUS_FOLDER).exists()
    assert json.loads((run / "policy_from_log.json").read_text())["gate"]["reason"] == found.reason


def test_too_few_effective_users_are_refused(run: Path, loaded: LoadedRun, liked: Path) -> None:
    found = run_served(loaded, liked, dataclasses.replace(CONFIG, minimum_effective=USERS))
    assert not found.used
    assert f"expected at least {USERS}" in found.reason
    assert found.reason.endswith("; for the same reason there is no doubly robust gain")
    assert json.loads((run / "policy_from_log.json").read_text())["doubly_robust_gain"] is None


def test_a_log_of_another_policy_is_recognized(
    run: Path, loaded: LoadedRun, liked: Path, small_hybrid: Hybrid, supervised: Hybrid
) -> None:
    """A gain over what it earned would say nothing of the policy in use, which the log has nothing of."""
    variables = nnx.to_pure_dict(nnx.state(small_hybrid.policy))
    variables["item_bias"] = variables["item_bias"] + 0.3 * np.sin(np.arange(len(variables["item_bias"])))
    write_policy(open_run(run), supervised, in_use(variables), CONFIG, "reinforce")
    digest = sha256(run / POLICY_FOLDER / "policy.json")
    with pytest.raises(DataError, match=rf"{ROUNDS * USERS} by v1; none is the policy in use") as refused:
        run_served(loaded, liked, CONFIG)
    assert "0, served by the policy in use, for evaluation" in str(refused.value)
    assert sha256(run / POLICY_FOLDER / "policy.json") == digest


@pytest.mark.parametrize("reranked", [False, True])
def test_recommendations_are_reproduced_with_the_trends_that_ranked_them(
    loaded: LoadedRun,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    model_directory: Path,
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    tmp_path: Path,
    reranked: bool,
) -> None:
    """The trend of half of the users is that of the last second of the log, and of the others that of a day later."""
    if reranked:
        hybrid, model_directory = with_random_reranker(small_hybrid, small_data), tmp_path / "model"
        export_model(hybrid, small_data, model_directory, training={}, metrics={}, licence="none")
        loaded = loaded._replace(supervised=hybrid.with_policy(None))
        head = in_use(nnx.to_pure_dict(nnx.state(hybrid.policy)))
        write_policy(loaded.run, loaded.supervised, head, CONFIG, "reinforce")
    end = int(np.asarray(small_data.histories.times).max())
    with SQLiteStore(tmp_path / "events.sqlite") as store:
        serve_and_log(
            *(model_directory, small_data, store, lambda item, rng: rng.random() < 0.2),
            users=40,
            trend_times={0: end, 20: end + 86_400},
        )
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog, 0)
    assert set(log.moments) == {(end, None), (end + 86_400, None)}
    found = run_served(loaded, tmp_path / "events.sqlite", dataclasses.replace(CONFIG, updates=2))
    assert f"{ROUNDS * 40} by v1 (the policy in use)" in found.summary


def test_a_policy_of_the_version_before_shifts_no_weights(
    loaded: LoadedRun,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
) -> None:
    """It starts from the weights that the reranker has; of an earlier version no policy is read."""
    hybrid = with_random_reranker(small_hybrid, small_data)
    supervised, head = hybrid.with_policy(None), nnx.to_pure_dict(nnx.state(hybrid.policy))
    write_policy(loaded.run, supervised, in_use(head), CONFIG, "served")
    found = load_policy(loaded.run, supervised)
    assert found is not None
    assert found.policy is not None
    np.testing.assert_array_equal(found.policy.by_context[...], head["by_context"])
    folder = loaded.run.folder / POLICY_FOLDER
    with np.load(folder / "policy.npz") as arrays:
        np.savez(folder / "policy.npz", **{name: arrays[name] for name in arrays if name not in OF_RERANKER})
    record = json.loads((folder / "policy.json").read_text())
    before = {**record, "sha256": sha256(folder / "policy.npz"), "schema_version": 4}
    (folder / "policy.json").write_text(json.dumps(before))
    variables = policy_in_use(loaded.run, supervised).variables
    np.testing.assert_array_equal(variables["item_bias"], head["item_bias"])
    assert not variables["direct"].any()
    assert not variables["by_context"].any()
    (folder / "policy.json").write_text(json.dumps({**before, "schema_version": 3}))
    with pytest.raises(DataError, match=r"not a policy that this version can read \(schema version 3, expected 4 or 5"):
        load_policy(loaded.run, supervised)


def test_a_log_without_responses_says_so(loaded: LoadedRun, liked: Path, tmp_path: Path) -> None:
    """As from clients that do not send the recommendation's id."""
    copy = tmp_path / "events.sqlite"
    with sqlite3.connect(liked) as log, sqlite3.connect(copy) as unanswered:
        log.backup(unanswered)
        unanswered.execute("UPDATE events SET recommendation_id = NULL")
    log.close()
    unanswered.close()
    with pytest.raises(DataError, match=r"0 of them have a response.*do clients send the recommendation_id"):
        run_served(loaded, copy, CONFIG)


def test_what_cannot_be_used_is_counted(loaded: LoadedRun, small_data: PreparedData, tmp_path: Path) -> None:
    raw = [str(item) for item in small_data.catalog.ids.raw_ids]
    lone = (-0.5,)
    with SQLiteStore(tmp_path / "events.sqlite") as store:
        store.record(
            [
                UserEvent("1", "u", Event(raw[0], 4.0, 100)),
                UserEvent("2", "u", Event("nobody knows it", 4.0, 101)),
                UserEvent("3", "u", Event(raw[1], None, 110), "a"),
                UserEvent("4", "u", Event(raw[2], 2.0, 110)),
                UserEvent("5", "u", Event(raw[3], 5.0, 200), "c"),
                UserEvent("7", "u", Event(raw[4], 5.0, 90), "c"),  # by a clock that is slow
                UserEvent("6", "stranger", Event("nobody knows it", 5.0, 50)),
            ]
        )
        for shown in (
            Slate("a", "u", (raw[1],), lone, "reinforce", "v", 110, 0.5),
            Slate("b", "u", (raw[5],), (), "supervised", "v", 110),
            Slate("c", "u", (raw[3], raw[4]), (-1.0, -2.0), "reinforce", "v", 110, 0.5),
            Slate("c", "u", (raw[3], raw[4]), (-1.0, -2.0), "reinforce", "v", 110, 0.5),
            Slate("d", "u", ("gone",), lone, "reinforce", "v", 150, 0.5),
            Slate("e", None, (raw[3],), lone, "reinforce", "v", 150, 0.5),
            Slate("f", "stranger", (raw[3],), lone, "reinforce", "v", 150, 0.5),
            Slate("g", "never seen", (raw[3],), lone, "reinforce", "v", 150, 0.5),
            Slate("h", "u", (raw[3],), lone, "reinforce", "v", 110),
            Slate("i", "u", (raw[3],), lone, "reinforce", "v", 111, 0.5),
        ):
            log_now(store, shown)
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog)
    # An answer came 90 seconds late and the last event is of 200: of what was shown after 110 more may come.
    assert log.skipped == {
        **{DETERMINISTIC: 1, UNKNOWN_ITEM: 1, SENT_ALONG: 1, NO_HISTORY: 2},
        **{UNNOTED: 1, STILL_OPEN: 1},
    }
    assert log.shown == 9  # the store keeps what is logged twice once
    first, second = log.recommendations
    # What the user did in the same second counts where it answers neither this recommendation nor a later one.
    assert first.history.items.tolist() == [1, 3]
    assert second.history.items.tolist() == [1, 2, 3]
    assert np.isnan(second.history.ratings[1])
    assert first.responses.tolist() == [2]
    assert second.responses.tolist() == [5, 4]
    assert second.slate.tolist() == [4, 5]
    with pytest.raises(DataError, match=r"usable recommendations of 1 users: \d for training"):
        run_served(loaded, tmp_path / "events.sqlite", CONFIG)


def test_a_log_without_propensities_says_so(loaded: LoadedRun, tmp_path: Path, small_data: PreparedData) -> None:
    with SQLiteStore(tmp_path / "events.sqlite") as store:
        item = str(small_data.catalog.ids.raw_ids[0])
        store.record([UserEvent("1", "u", Event(item, 4.0, 100))])
        log_now(store, Slate("a", "u", (item,), (), "supervised", "v", 110))
    with pytest.raises(DataError, match=r"nothing to learn from: .*no propensities.*--explore"):
        run_served(loaded, tmp_path / "events.sqlite", CONFIG)


def test_what_is_no_store_is_named(loaded: LoadedRun, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database")
    with pytest.raises(DataError, match=r"text: cannot be read .*expected the event store"):
        run_served(loaded, tmp_path / "text", CONFIG)
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE events (x)")
    connection.close()
    with pytest.raises(DataError, match="a database of application 0 in version 0, expected an event store"):
        run_served(loaded, tmp_path / "other.sqlite", CONFIG)
