"""Rules with an index give the answers of the whole product."""

from pathlib import Path

import pytest

from serve.model import rules as model_rules
from serve.model.directory import Artifact, read_artifact
from serve.model.events import Event
from serve.model.recommender import Answer, Query, Recommender
from serve.model.rules import Boost, Pin, Rules, Subject
from serve.observability.metrics import Metrics
from serve.serving.loaded import LoadedModel
from serve.stores.base import EventStore


@pytest.mark.parametrize(
    "rules",
    [
        Rules(diversity=0.4),
        Rules(max_per_tag=2),
        Rules((Boost(Subject(tag="Drama"), 20.0), Boost(Subject(5), 90.0)), 0.2, 3, (Pin(Subject(60), 2),)),
    ],
    ids=["diversity", "max_per_tag", "all"],
)
def test_rules_with_an_index_are_those_without(
    indexed: Artifact,
    model_directory: Path,
    store: EventStore,
    rules: Rules,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_rules, "CANDIDATES", 20)

    def answers(artifact: Artifact) -> list[Answer]:
        model = Recommender(artifact, "cpu")
        assert model.engine.search_by == ("exact" if artifact.index is None else "index")
        loaded, ids = LoadedModel(model, store, Metrics()), model.catalog.item_ids
        last = Event(ids[2], None, 1_000_000_001)
        histories = [[Event(ids[at], 4.0, 1_000_000_000), last] for at in range(10, 20)]
        return [loaded.recommend(Query(events, 8, rules=rules)) for events in histories]

    for found, expected in zip(answers(indexed), answers(read_artifact(model_directory)), strict=True):
        assert found.items.tolist() == expected.items.tolist()
        assert found.scores == pytest.approx(expected.scores, rel=1e-4, abs=1e-4)
        assert found.applied == expected.applied
