"""A short attack: bench/fault_hostile.py has the long one."""

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from serve.model.recommender import Recommender
from tests.serve.front.proxy import FRONTS, Sockets, running_proxy
from tests.serve.process import running_server

SCRIPT = Path(__file__).parents[3] / "bench" / "fault_hostile.py"
SPEC = importlib.util.spec_from_file_location("fault_hostile", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
fault_hostile = importlib.util.module_from_spec(SPEC)
sys.modules["fault_hostile"] = fault_hostile
SPEC.loader.exec_module(fault_hostile)


@pytest.mark.parametrize("front", FRONTS)
def test_a_server_withstands_hostile_requests(
    model_directory: Path, model: Recommender, tmp_path: Path, front: str
) -> None:
    log, sockets = tmp_path / "log", Sockets.of(tmp_path)
    behind = front != "default"
    address, options = (sockets.default, ["--fast", sockets.fast]) if behind else ("127.0.0.1:0", [])
    with (
        log.open("w") as stream,
        running_server(
            model_directory, tmp_path / "s", provider="cpu", stderr=stream, address=address, options=options
        ) as server,
        running_proxy(sockets) if behind else nullcontext(),
    ):
        outcome = fault_hostile.attack_server(
            *(sockets.proxy if behind else server.address, server.process.pid, model.catalog.item_ids[1:]),
            requests=3_000,
            seed=1,
            behind_nginx=behind,
        )
        assert server.process.poll() is None
    assert outcome.broken == []
    assert outcome.hostile + outcome.good == 3_000
    assert outcome.good == 300
    # Not all was turned away at the door, and not all was let through.
    assert outcome.statuses["OK"] > 300
    assert outcome.statuses["INVALID_ARGUMENT"] > 300
    assert '"level": "ERROR"' not in log.read_text()


def test_the_http_door_withstands_hostile_requests(model_directory: Path, model: Recommender, tmp_path: Path) -> None:
    log = tmp_path / "log"
    store, options = tmp_path / "events.sqlite", ("--http", "127.0.0.1:0")
    with (
        log.open("w") as stream,
        running_server(model_directory, store, provider="cpu", options=options, stderr=stream) as server,
    ):
        url = server.line.split(" and ")[1].split(" ")[0]
        outcome = fault_hostile.attack_http(
            server.address, url, server.process.pid, model.catalog.item_ids[1:], requests=2_000, seed=1
        )
        assert server.process.poll() is None
    assert outcome.broken == []
    assert (outcome.hostile, outcome.good) == (1_800, 200)
    assert outcome.statuses["200"] > 200
    assert outcome.statuses["400"] > 200
    assert '"level": "ERROR"' not in log.read_text()


def test_a_wrong_answer_and_a_broken_server_would_be_found(model: Recommender) -> None:
    ids = frozenset(model.catalog.item_ids[1:])
    request = fault_hostile.recommend_request(history=[fault_hostile.Event(item_id="1007", timestamp=1)], k=2)
    answer = fault_hostile.RecommendResponse(recommendation_id="a", model_version="v", policy="p")
    asked = request.SerializeToString()
    answer.recommendations.add(item_id="1014", score=1)
    assert fault_hostile.is_answer(asked, answer.SerializeToString(), ids)
    for bad in (
        {"item_id": "1007", "score": 1},
        {"item_id": "1014", "score": 1},
        {"item_id": "none", "score": 1},
        {"item_id": "1021", "score": float("nan")},
    ):
        broken = fault_hostile.RecommendResponse()
        broken.CopyFrom(answer)
        broken.recommendations.add(**bad)
        assert not fault_hostile.is_answer(asked, broken.SerializeToString(), ids)
        assert not fault_hostile.same_answer(answer, broken)


def test_an_answer_that_breaks_its_rules_would_be_found() -> None:
    asked = fault_hostile.recommend_request(user_id="u", rules=fault_hostile.Rules(max_per_tag=1))
    answer = fault_hostile.RecommendResponse(recommendation_id="a", model_version="v", policy="p")
    for item_id, tag in (("1", "Drama"), ("2", "Comedy")):
        answer.recommendations.add(item_id=item_id, genres=[tag])
    ids = frozenset({"1", "2", "3"})
    assert fault_hostile.is_answer(asked.SerializeToString(), answer.SerializeToString(), ids)
    answer.recommendations.add(item_id="3", genres=["Drama"])
    assert not fault_hostile.is_answer(asked.SerializeToString(), answer.SerializeToString(), ids)
    popular = fault_hostile.TrendingRequest(k=2, exclude_item_ids=["9"]).SerializeToString()
    answers = {(("1", 2.0), ("2", 1.0)): True, (("1", 1.0), ("2", 2.0)): False, (("9", 1.0),): False}
    answers |= {(("1", 2.0), ("1", 2.0)): False, (("1", 3.0), ("2", 2.0), ("3", 1.0)): False, (("1", -1.0),): False}
    for items, is_good in answers.items():
        found = fault_hostile.TrendingResponse()
        for item_id, count in items:
            found.items.add(item_id=item_id, count=count)
        assert fault_hostile.is_trending(popular, found.SerializeToString()) == is_good
