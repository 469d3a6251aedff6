"""The committed stubs are what `make stubs` writes from the protos."""

import subprocess
import sys
from pathlib import Path

import pytest

import serve

ROOT = Path(serve.__file__).parent.parent
GENERATED = ["recommender_pb2.py", "recommender_pb2.pyi", "recommender_pb2_grpc.py", "recommender_pb2_grpc.pyi"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    # The environment that runs this test is the one to use, as it is.
    variables = [f"BIN={Path(sys.executable).parent}", f"STUBS_ROOT={out}"]
    command = ["make", "--old-file=.venv/installed", "stubs", *variables]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return out / "serve" / "pb"


def test_nothing_else_is_generated(generated: Path) -> None:
    assert sorted(path.name for path in generated.iterdir()) == GENERATED


@pytest.mark.parametrize("name", GENERATED)
def test_stub_is_current(generated: Path, name: str) -> None:
    committed = ROOT / "serve" / "pb" / name
    assert (generated / name).read_text() == committed.read_text(), f"{committed} is out of date: run `make stubs`"
