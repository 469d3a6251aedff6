"""The committed stubs are those of the protos, and the contract keeps its style and its promises."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import serve

ROOT = Path(serve.__file__).parent.parent
GENERATED = sorted(
    [
        "contract.binpb",
        *(
            f"{proto}_{kind}"
            for proto in ("model_admin", "open_inference", "recommender")
            for kind in ("pb2.py", "pb2.pyi", "pb2_grpc.py", "pb2_grpc.pyi")
        ),
    ]
)


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
    assert (generated / name).read_bytes() == committed.read_bytes(), f"{committed} is out of date: run `make stubs`"


@pytest.mark.parametrize(
    ("line", "changed", "complaint"),
    [
        # Clients that send or read the field by its number or type would get something else.
        ("  string user_id = 1;", "  string user_id = 70;", 'Previously present field "1"'),
        ("  int32 k = 4;", "  string k = 4;", 'changed type from "int32" to "string"'),
        (
            "  rpc SimilarItems(SimilarItemsRequest) returns (SimilarItemsResponse);",
            "",
            'Previously present RPC "SimilarItems"',
        ),
    ],
)
def test_a_change_that_breaks_clients_is_found(tmp_path: Path, line: str, changed: str, complaint: str) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    buf = [Path(sys.executable).parent / "buf", "breaking", "proto", "--against", "proto/baseline.binpb"]
    subprocess.run(buf, cwd=tmp_path, check=True, timeout=60)
    proto = tmp_path / "proto" / "jaxrec" / "v1" / "recommender.proto"
    text = proto.read_text()
    assert line in text
    proto.write_text(text.replace(line, changed, 1))
    ended = subprocess.run(buf, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert complaint in ended.stdout


def test_the_contract_keeps_its_style_and_the_released_one() -> None:
    command = ["make", "--old-file=.venv/installed", "protos", f"BIN={Path(sys.executable).parent}"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
