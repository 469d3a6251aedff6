"""bench/gpu.py on the CPU at tiny sizes: each part measures what it says, and no page of a GPU comes of it."""

import json
import subprocess
from math import inf, nan
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from bench import gpu, gpu_parts
from bench.gpu_parts import TINY, TOP_K, Figures
from bench.train_steps import our_step, random_batch, random_weights

SMALL = TINY._replace(batches=(2,), search_batches=(3,))
PARTS = ("device", "parity", "recurrence", "step", "epoch", "search")


@pytest.fixture(scope="module")
def measured() -> dict[str, Figures]:
    return {name: getattr(gpu_parts, name)(SMALL, inf) for name in PARTS}


def test_losses_and_gradients_are_those_of_float64(measured: dict[str, Figures]) -> None:
    rows = measured["parity"]["rows"]
    assert [row[:2] for row in rows] == [["cpu", name] for name in gpu_parts.LIMITS]
    assert all(row[5] for row in rows)
    exact, rough = rows[0], rows[2]
    assert max(exact[2:4]) < 1e-6 < rough[3]  # bfloat16 has 8 bits


def test_a_wrong_gradient_is_out_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = gpu_parts._loss_and_gradients

    def wrong(weights: object, batch: object, dtype: object) -> list[np.ndarray]:
        found = compute(weights, batch, dtype)
        return found if found[1].dtype == dtype else [found[0], *(1.001 * one for one in found[1:])]

    monkeypatch.setattr(gpu_parts, "_loss_and_gradients", wrong)
    assert not gpu_parts.parity(SMALL, inf)["rows"][0][5]


def test_a_gradient_that_is_nan_is_out_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    deviations = iter([1e-9, nan] * len(gpu_parts.LIMITS))
    monkeypatch.setattr(gpu_parts, "_deviation", lambda found, expected: next(deviations))
    assert [row[5] for row in gpu_parts.parity(SMALL, inf)["rows"]] == [False] * len(gpu_parts.LIMITS)


def test_each_recurrence_of_the_backend_is_measured_and_equal(measured: dict[str, Figures]) -> None:
    rows = measured["recurrence"]["rows"]
    assert [row[:2] for row in rows] == [[2, "scan"], [2, "unrolled by 8"]]
    assert all(row[2] > 0 and row[3] < 1e-5 for row in rows)


def test_the_fastest_recurrence_is_one_that_can_train() -> None:
    rows = [[2, "scan", 1.0, 0], [8, "scan", 4.0, 0], [8, "unrolled by 8", 3.0, 0], [8, "cudnn", 1.0, 0]]
    assert "`unrolled by 8` is the fastest at batch 8" in gpu.fastest({"rows": rows})


def test_rates_follow_from_the_times(measured: dict[str, Figures]) -> None:
    for batch, _, ms, tokens, teraflops, share in measured["step"]["rows"]:
        shape = SMALL.step._replace(batch=batch)
        assert tokens == pytest.approx(shape.batch * shape.length / ms * 1000)
        assert teraflops == pytest.approx(shape.flop / ms / 1e9)
        assert share > 0
    ((events, ms, _, epoch),) = measured["epoch"]["rows"]
    assert events == 2 * 10
    assert epoch == pytest.approx(1000 / 20 * ms / 1000)


def test_bfloat16_is_another_computation_of_the_same_step() -> None:
    weights, batch = random_weights(SMALL.step), random_batch(SMALL.step)
    exact, rough = our_step(weights, *batch)(), our_step(weights, *batch, jnp.bfloat16)()
    assert rough == pytest.approx(exact, rel=0.02)
    assert rough != exact


def test_the_search_finds_the_best_items(measured: dict[str, Figures]) -> None:
    vectors = np.random.default_rng(0).normal(size=(gpu_parts.SEARCH_WIDTH, 500)).astype(np.float32)
    query = np.random.default_rng(1).normal(size=(4, gpu_parts.SEARCH_WIDTH)).astype(np.float32)
    session = onnxruntime.InferenceSession(gpu_parts._search_graph(vectors), providers=[gpu_parts.CPU])
    _, items = session.run(None, {"query": query})
    np.testing.assert_array_equal(items, np.argsort(-(query @ vectors), axis=1)[:, :TOP_K])
    assert [row[:2] + row[4:] for row in measured["search"]["rows"]] == [["CPU", 3, 1.0]]


def run(work: Path, *options: str) -> Result:
    return CliRunner().invoke(gpu.main, ["--work", str(work), *options])


@pytest.fixture
def calls(measured: dict[str, Figures], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are measured, which give the figures that were measured once."""
    names: list[str] = []
    for part in PARTS:
        monkeypatch.setattr(gpu_parts, part, lambda sizes, until, part=part: names.append(part) or measured[part])
    return names


def test_the_page_of_a_cpu_has_all_parts_and_is_not_published(
    calls: list[str], tmp_path: Path, measured: dict[str, Figures]
) -> None:
    for _ in range(2):  # the second time nothing is left to measure
        result = run(tmp_path, "--tiny")
        assert result.exit_code == 0, result.output
    assert calls == [*PARTS]
    page = (tmp_path / "gpu.md").read_text()
    for part in PARTS:
        assert f"{part}: there is no accelerator\n- not to be published: {part}: the sizes are tiny" in page
    for reason in ("end_to_end.json is missing", "search: without ONNX Runtime's CUDA provider"):
        assert reason in page
    assert ("step: without PyTorch" in page) == (measured["step"]["torch"] is None)
    for heading in ("Parity with float64", "The recurrence", "A training step", "An epoch", "The best 10 of 500 items"):
        assert f"## {heading}" in page
    refused = run(tmp_path, "--publish")
    assert refused.exit_code == 1
    assert "bench/gpu.md is left as it is: there is no accelerator" in refused.output


def test_figures_of_other_conditions_are_measured_again_and_never_published(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First tiny on the CPU, then at full size on a GPU, of which only some parts are measured."""
    assert run(tmp_path, "--tiny").exit_code == 0
    monkeypatch.setattr(gpu, "conditions", lambda tiny: {"tiny": tiny, "backend": "gpu", "device": "A"})
    calls.clear()

    def no_time(sizes: gpu_parts.Sizes, until: float) -> Figures:
        raise TimeoutError

    monkeypatch.setattr(gpu_parts, "recurrence", no_time)
    assert run(tmp_path).exit_code == 0
    assert calls == ["device", "parity"]
    page = (tmp_path / "gpu.md").read_text()
    for reason in ("recurrence: there is no accelerator", "search: the sizes are tiny", "different devices: A, cpu"):
        assert reason in page
    assert "parity: " not in page


def test_figures_without_conditions_are_no_reason_to_publish(measured: dict[str, Figures]) -> None:
    assert gpu.reasons({"parity": measured["parity"]}) == ["parity does not say on which device it was measured"]


def test_a_part_that_fails_is_named_and_the_others_are_measured(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sizes: gpu_parts.Sizes, until: float) -> Figures:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(gpu_parts, "step", fail)
    assert run(tmp_path, "--tiny").exit_code == 0
    assert calls == [part for part in PARTS if part != "step"]
    page = (tmp_path / "gpu.md").read_text()
    assert "not to be published: step failed: out of memory" in page
    assert "step.json is missing" in page


def test_a_limit_of_time_loses_only_what_follows(calls: list[str], tmp_path: Path) -> None:
    def no_time(sizes: gpu_parts.Sizes, until: float) -> Figures:
        raise TimeoutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_parts, "parity", no_time)
        result = run(tmp_path, "--tiny")
    assert "parity and what follows: no time is left" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.json", "gpu.md"]


@pytest.mark.parametrize("part", PARTS)
def test_no_figure_is_begun_after_the_limit(part: str) -> None:
    with pytest.raises(TimeoutError):
        getattr(gpu_parts, part)(SMALL, -inf)


def test_a_stage_is_ended_at_the_limit(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_parts.end_to_end(tmp_path / "u.data", tmp_path / "work", TINY, -inf)


def test_ml_100k_end_to_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [
        f"{user}\t{item}\t{rng.integers(1, 6)}\t{880000000 + at}"
        for user in range(1, 31)
        for at, item in enumerate(rng.choice(40, 15, replace=False) + 1)
    ]
    (tmp_path / "u.data").write_text("\n".join(lines) + "\n")
    figures = gpu_parts.end_to_end(tmp_path / "u.data", tmp_path / "work", TINY, inf)
    assert [name for name, _ in figures["rows"]] == ["prepare", "train", "evaluate", "export"]
    page = "\n".join(gpu.lines({"end_to_end": json.loads(json.dumps(figures))}))
    assert "NDCG@10 of the hybrid: 0." in page
    assert (tmp_path / "work/model/manifest.json").is_file()
