"""One short turn of the closed loop (bench/rl_loop.py) with a real server and a small model."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.rl_loop import LoopConfig, Round, fitted_users, loop
from jaxrec.config import ModelConfig, TrainConfig
from jaxrec.export.run import export_run
from jaxrec.prepare import PreparedData, write_prepared
from jaxrec.runs import train_run
from jaxrec.served_log import read_served_log
from tests.rl.simulated import genre_lovers

SMALL = ModelConfig(embedding=16, hidden=16, rating_width=4, time_width=4, max_length=50)
CONFIG = LoopConfig(rounds=1, requests=4, slate=3, temperature=1.0, events=6)


@pytest.fixture(scope="module")
def play(
    small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], tuple[list[Round], Path]]:
    folder = tmp_path_factory.mktemp("loop")
    write_prepared(small_data, folder / "data")
    train_run(folder / "data", folder / "run", SMALL, TrainConfig(max_epochs=1))
    export_run(folder / "run", folder / "model")
    users, _ = fitted_users(genre_lovers(small_data), small_data)
    learning = dataclasses.replace(CONFIG.learning, steps=20, steps_per_evaluation=10, batch_size=64)

    def played(learns: bool) -> tuple[list[Round], Path]:
        work = folder / f"serving-{learns}"
        shutil.copytree(folder / "run", folder / f"run-{learns}")
        config = dataclasses.replace(CONFIG, learning=learning)
        return loop(folder / f"run-{learns}", folder / "model", users, config, 0, work, learns), work

    return played


def test_loop_serves_logs_learns_and_asks_the_gate(
    play: Callable[[bool], tuple[list[Round], Path]], small_data: PreparedData
) -> None:
    rounds, work = play(True)
    assert len(rounds) == 2
    first = rounds[0]
    assert "decisions of 20 users" in first.decision or "effective sample size" in first.decision
    assert (rounds[1].version != first.version) == first.used
    log = read_served_log(work / "events.sqlite", small_data.catalog)
    assert log.shown == 2 * 40 * 4
    assert len(log.recommendations) == log.shown  # all of them can be learned from
    taken = sum(len(one.answers) for one in log.recommendations)
    assert taken == pytest.approx(4 * sum(one.taken.sum() for one in rounds))
    assert 0 < taken < log.shown
    for one in log.recommendations:
        assert len(one.history.items) >= 6
        assert not set(one.slate.tolist()) & set(one.history.items.tolist())


def test_control_never_learns(play: Callable[[bool], tuple[list[Round], Path]]) -> None:
    rounds, _ = play(False)
    assert [one.decision for one in rounds] == ["", ""]
    assert rounds[0].version == rounds[1].version
    for one in rounds:
        np.testing.assert_allclose(one.reward, 0.5 * one.taken + 0.5 * one.rating, rtol=1e-5)
