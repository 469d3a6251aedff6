"""The examples, as they stand, on a small log: each prints or plots what it promises."""

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

import jaxrec
from tests.synthetic import markov_log

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 60
QUICK = jaxrec.LoggedConfig(folds=2, fold_epochs=1, updates=20, samples=2)


def example(name: str) -> ModuleType:
    """The module of an example, whose `main` is what the command calls."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `own_csv.py` leaves: data, run and model."""
    folder = tmp_path_factory.mktemp("examples")
    markov_log(users=60, items=30, events=10, stay=0.9, seed=0).to_csv(folder / "ratings.csv", index=False)
    example("own_csv").main(
        str(folder / "ratings.csv"),
        str(folder / "work"),
        model_config=jaxrec.ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=8),
        train_config=jaxrec.TrainConfig(max_epochs=2, batch_tokens=128),
    )
    return folder / "work"


def test_own_csv_leaves_a_model_that_a_server_takes(work: Path) -> None:
    assert (work / "model/manifest.json").is_file()
    found = jaxrec.open_run(work / "run").recommend([1, 2, 3], k=5)
    assert len(found) == 5
    assert set(found["item_id"]).isdisjoint([1, 2, 3])


def test_own_reward_says_whether_the_policy_is_used(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("own_reward").main(str(work / "run"), config=QUICK)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(("used: ", "not used: "))
    assert "chosen for a budget of 2.00% of NDCG@10" in lines[0]
    assert lines[-1] in ("exported and served: policy", "exported and served: hybrid")
    assert any(line.split()[0] == "policy" for line in lines)


def test_serve_record_learn_learns_or_says_why_not(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "events.sqlite"
    example("serve_record_learn").main(str(work / "run"), str(work / "model"), str(store), users=12)
    assert capsys.readouterr().out.startswith(("used: ", "not used: ", "cannot learn from this log: "))
    assert store.is_file()


def test_the_notebook_runs_and_plots(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jaxrec.fine_tune(work / "run", QUICK)
    monkeypatch.setenv("RUN_FOLDER", str(work / "run"))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "plots.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("text/html" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_the_notebook_is_short_and_kept_without_outputs() -> None:
    cells = nbformat.read(EXAMPLES / "plots.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert sum(len(cell.source.splitlines()) for cell in code) <= MOST_LINES
    assert [cell.outputs for cell in code] == [[]] * len(code)
