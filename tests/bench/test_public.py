"""Public benchmark files: how they are read, EASE by hand, and the table."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench import public
from bench.linear import best_ease, ease, ease_scorer
from bench.publish import write_arrays
from bench.quality import prepared, scorers
from jaxrec.config import PrepareConfig
from jaxrec.data.batches import case_batches
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, TIME, USER
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import Shared
from jaxrec.models.hybrid import Hybrid
from jaxrec.runs.directory import RERANKER_OUTCOME_FILE

USERS, ITEMS = 60, 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Users who walk through the items in a circle, each from another one; the ids' order says nothing."""
    names = [str(100 + 7 * item % 83) for item in range(ITEMS)]
    users = [[names[(user + step) % ITEMS] for step in range(6 + user % 3)] for user in range(USERS)]
    (tmp_path / "sequences.txt").write_text(
        "".join(f"{500 - user} {' '.join(items)}\n" for user, items in enumerate(users)) + "\n"
    )
    (tmp_path / "item2attributes.json").write_text(json.dumps({name: [int(name) % 3, 7] for name in names[1:]}))
    return tmp_path


def test_a_file_keeps_its_order_and_attributes(folder: Path) -> None:
    data = prepared(folder / "work/data", "circle", folder)
    raw = data.catalog.ids.raw_ids.astype(str)
    lines = {line.split()[0]: line.split()[1:] for line in (folder / "sequences.txt").read_text().splitlines() if line}
    read = [raw[np.asarray(data.histories.items)[data.histories.users() == user] - 1].tolist() for user in range(USERS)]
    assert sorted(read) == sorted(lines.values())
    assert len(set(np.asarray(data.histories.times).tolist())) == 1
    first = next(iter(lines.values()))[0]
    genres = dict(zip(raw, data.catalog.item_genres, strict=True))
    assert genres[first] == ()
    assert all(set(genres[item]) == {f"a{int(item) % 3}", "a7"} for item in raw if item != first)


def test_the_peer_runs_in_its_own_environment(folder: Path) -> None:
    """It recommends the same three items to all; the first event of the log is of one of them."""
    data = prepared(folder / "work/data", "circle", folder)
    python = folder / "peers/bin/python"
    python.parent.mkdir(parents=True)
    answer = {"items": {str(user): [1, 2, 3] for user in range(USERS)}, "epochs": 2, "seconds": 1.5, "version": "1"}
    (folder / "answer").write_text(json.dumps(answer))
    python.write_text(f'#!/bin/sh\ntest -f "$1" && test -f "$2" && cp "{folder}/answer" "$3"\n')
    python.chmod(0o755)
    found = np.load(public.measure_sasrec(folder / "work", folder / "peers"))
    targets = np.asarray(data.histories.items)[data.split.test.rows]
    assert found["ranks"].tolist() == np.where(targets <= 3, targets, public.MISSED).tolist()
    assert int(found["epochs"]) == 2


def two_items() -> PreparedData:
    """Of 5 users with events on both items in training, and 3 with events on the first one of them alone."""
    both = [(user, item) for user in range(5) for item in (1, 2, 3, 4)]
    one = [(user, item) for user in range(5, 8) for item in (1, 3, 4)]
    log = pd.DataFrame([*both, *one], columns=[USER, ITEM])
    return prepare(log.assign(**{TIME: np.arange(len(log))}), None, PrepareConfig(1, 1))


def test_ease_is_the_ridge_regression_of_each_item_on_the_others() -> None:
    """Validation is item 3 and test item 4 of all, so training has items 1 (8 users) and 2 (5 of them)."""
    weights = ease(two_items(), penalty=2.0)
    assert weights.shape == (5, 5)
    assert weights[1, 2] == pytest.approx(5 / (8 + 2))  # item 2 from item 1: both / (users of item 1 + penalty)
    assert weights[2, 1] == pytest.approx(5 / (5 + 2))
    np.testing.assert_array_equal(np.diag(weights), 0)
    assert not weights[0].any()
    assert not weights[:, 0].any()


def test_the_last_event_counts_whole_and_earlier_ones_less() -> None:
    data = two_items()
    weights = np.zeros((5, 5), np.float32)
    weights[1, 4], weights[2, 4], weights[3, 4] = 100, 10, 1
    (batch,) = case_batches(data, data.split.test, 200)
    scores = ease_scorer(weights, decay=0.5)(batch)
    assert scores[: len(data.split.test), 4].tolist() == [1 + 0.5 * 10 + 0.25 * 100] * 5 + [1 + 0.5 * 100] * 3


def test_ease_is_chosen_on_validation_and_finds_the_circle(folder: Path) -> None:
    data = prepared(folder / "work/data", "circle", folder)
    scorer, _, decay = best_ease(data, 50)
    assert decay < 1
    assert ndcg(rank_cases(scorer, data, data.split.test, 50, False).ranks, 10).mean() > 0.8


def test_a_peer_gets_the_parts_and_its_lists_become_ranks(folder: Path) -> None:
    data = prepared(folder / "work/data", "circle", folder)
    public.write_parts(data, folder / "log.csv")
    log = pd.read_csv(folder / "log.csv")
    assert log["part"].value_counts().to_dict() == {"train": len(log) - 2 * USERS, "validation": USERS, "test": USERS}
    last = log.groupby("user").tail(2)
    assert last["part"].tolist() == ["validation", "test"] * USERS
    targets = log[log["part"] == "test"].set_index("user")["item"]
    lists = {str(user): [99, 98, target] for user, target in targets.items() if user != 3}
    lists["4"] = [99]
    expected = np.full(USERS, 3)
    expected[3] = expected[4] = public.MISSED
    assert public.ranks_of(lists, data).tolist() == expected.tolist()


def test_the_table_has_what_was_published_beside_what_was_run(
    folder: Path, small_data: PreparedData, small_hybrid: Hybrid
) -> None:
    """The ranks of a model are those under its own name; the two seeds have the first and the third place."""
    data = prepared(folder / "work/data", "circle", folder)
    names = ["policy", *scorers(small_hybrid, DecayedCounts.of(small_data), Shared())]
    seeds = []
    for seed in range(2):
        seeds.append(folder / f"ranks-{seed}.npz")
        every = {f"{name}|False|ranks": np.full(USERS, 100) for name in names}
        write_arrays(seeds[-1], every | {"hybrid|False|ranks": np.full(USERS, 1 + 2 * seed)})
        (folder / f"run-{seed}").mkdir()
        (folder / f"run-{seed}" / RERANKER_OUTCOME_FILE).write_text(json.dumps({"used": seed == 0}))
    write_arrays(folder / "ease.npz", {"ranks": np.full(USERS, 2), "penalty": 100.0, "decay": 0.9})
    lines = public.table("yelp", data, seeds, {public.EASE: folder / "ease.npz"})
    assert "| BSARec | BSARec, AAAI 2024, a user's run | 0.0442 | 0.0226 |" in lines
    assert f"| {public.EASE} | run here | 1.0000 (1.0000 to 1.0000) | 0.6309 (0.6309 to 0.6309) |" in lines
    assert "| jaxrec, hybrid | run here | 1.0000 (1.0000 to 1.0000) | 0.7500 (0.7500 to 0.7500) |" in lines
    for model in ("policy", "content model alone", "LSTM alone"):
        assert f"| jaxrec, {model} | run here | 0.0000 (0.0000 to 0.0000) | 0.0000 (0.0000 to 0.0000) |" in lines
    assert "EASE: penalty 100, decay 0.9." in lines
    assert "The gate let 1 of 2 policies be used." in lines
