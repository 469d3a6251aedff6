"""What the commands do beside calling the functions of `jaxrec`."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from jaxrec.cli.main import main
from jaxrec.config import ModelConfig, SeenItems, TrainConfig


def test_train_keeps_freed_memory_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr("jaxrec.training.host_memory.keep_freed_memory", lambda: calls.append(None))
    result = CliRunner().invoke(main, ["train", str(tmp_path), "--out", str(tmp_path / "run")])
    assert "expected a folder written by `jaxrec prepare`" in result.output
    assert len(calls) == 1


@pytest.mark.parametrize(("metrics", "notes"), [({}, 1), ({"rows": []}, 0)])
def test_export_says_when_the_run_was_not_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: dict[str, object], notes: int
) -> None:
    manifest = {"metrics": metrics, "model_version": "1", "policy": "supervised", "parity": {"max_abs_difference": 0}}
    monkeypatch.setattr("jaxrec.runs.export.export", lambda *arguments: manifest)
    result = CliRunner().invoke(main, ["export", str(tmp_path), "--out", str(tmp_path / "model")])
    assert result.exit_code == 0
    assert result.stderr.count("was not evaluated") == notes
    assert result.stdout == f"{tmp_path / 'model'}: model 1, policy supervised, within 0.0e+00 of JAX\n"


def test_a_device_is_no_new_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path), "--json", "/dev/null"])
    assert result.exit_code == 2
    assert "/dev/null is no regular file; it is not replaced" in result.output


def test_options_of_train_are_those_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[TrainConfig] = []

    def train(data: Path, out: Path, model: ModelConfig, config: TrainConfig, **_: object) -> None:
        configs.append(config)

    monkeypatch.setattr("jaxrec.runs.train.train", train)
    monkeypatch.setattr("jaxrec.training.host_memory.keep_freed_memory", lambda: None)
    for options in ([], ["--sampled-items", "0", "--batch-tokens", "800", "--seen", "allow"]):
        CliRunner().invoke(
            main, ["train", str(tmp_path), "--out", str(tmp_path / "run"), *options], catch_exceptions=False
        )
    assert configs == [TrainConfig(), TrainConfig(sampled_items=0, batch_tokens=800, seen=SeenItems.ALLOW)]
    resumed = CliRunner().invoke(main, ["train", "--out", str(tmp_path), "--resume", "--sampled-items", "0"])
    assert "--sampled-items cannot be changed on --resume" in resumed.output
