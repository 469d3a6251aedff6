"""Where an own re-ranker comes from, and that a server asks it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.client import Event, RecommenderClient
from serve.serving.reranker import RerankerError, load_reranker
from tests.serve.process import StartError, running_server

CODE = """
def backwards(request, candidates):
    return [one.item_id for one in reversed(candidates)]

NUMBER = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With a module, and with the metadata of an installed package that names its function."""
    (tmp_path / "own_rules.py").write_text(CODE)
    (tmp_path / "own_broken.py").write_text("raise OSError('not here')")
    package = tmp_path / "own_rules-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rules\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[jaxrec.rerankers]\nbackwards = own_rules:backwards\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_rules", None)


@pytest.mark.usefixtures("folder")
def test_a_re_ranker_is_a_function_of_a_module_or_an_entry_point() -> None:
    function = load_reranker("own_rules:backwards")
    assert function is load_reranker("backwards")
    assert function.__name__ == "backwards"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forwards", r"expected MODULE:FUNCTION or an entry point of jaxrec.rerankers \(backwards\), came 'forwards'"),
        ("own_rules:forwards", "'own_rules:forwards' cannot be imported: AttributeError"),
        ("own_broken:backwards", "'own_broken:backwards' cannot be imported: OSError: not here"),
        ("no_such_module:backwards", "'no_such_module:backwards' cannot be imported: ModuleNotFoundError"),
        ("own_rules:NUMBER", "expected a function, 'own_rules:NUMBER' is int"),
    ],
)
def test_what_is_no_re_ranker_is_refused(name: str, message: str) -> None:
    with pytest.raises(RerankerError, match=message):
        load_reranker(name)


def test_a_server_asks_the_re_ranker_that_its_settings_name(
    folder: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [Event(item_id="1007", timestamp=1_000_000_000)]

    @contextmanager
    def asking(*options: str) -> Iterator[RecommenderClient]:
        with (
            running_server(model_directory, folder / "events.sqlite", options=options) as server,
            RecommenderClient(server.address) as client,
        ):
            yield client

    with asking() as client:
        plain = [one.item_id for one in client.recommend(history=history, k=1000).recommendations]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    with asking("--reranker", "own_rules:backwards", "--reranker-timeout-s", "30") as client:
        assert [one.item_id for one in client.recommend(history=history, k=1000).recommendations] == plain[::-1]
    with pytest.raises(StartError), asking("--reranker", "own_rules:NUMBER"):
        pass
