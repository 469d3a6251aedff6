"""`serve` meets `jaxrec` at the model directory and nowhere else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import serve

NEVER = {"jaxrec", "jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tf2onnx"}
# Fine elsewhere, too slow to load for a server.
NOT_IN_THE_SERVER = NEVER | {"pandas", "scipy", "matplotlib", "onnx"}
SOURCES = sorted(Path(serve.__file__).parent.rglob("*.py"))


def imported(source: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative imports hide where they go"
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_source_imports_nothing_of_training(source: Path) -> None:
    assert not imported(source) & NEVER


def test_running_server_has_loaded_nothing_of_training(model_directory: Path, tmp_path: Path) -> None:
    """Loads a model, serves and answers in a fresh process, then looks at all that was imported."""
    program = f"""
import sys
from pathlib import Path
import serve.cli.main, tests.serve.process
from serve.model.directory import read_artifact
from serve.client import RecommenderClient
from serve.model.recommender import Recommender
from serve.front.server import create_server
from tests.serve.one_model import one_model
from serve.stores import open_store
with open_store(Path({str(tmp_path / "s")!r})) as store:
    models = one_model(Recommender(read_artifact(Path({str(model_directory)!r}))), store)
    server = create_server(models, store, "127.0.0.1:0")
    server.start()
    with RecommenderClient(f"127.0.0.1:{{server.port}}", timeout_s=30) as client:
        assert len(client.recommend(user_id="u").recommendations) == 10
    server.drain()
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(ended.stdout.split())
    assert "onnxruntime" in loaded
    assert not loaded & NOT_IN_THE_SERVER


@pytest.mark.parametrize(
    ("program", "never"),
    [
        ("from serve.client import RecommenderClient, Event", {"numpy", "onnxruntime", "serve.front", "serve.model"}),
        ("from serve.cli.main import main; main(['--help'], standalone_mode=False)", {"grpc", "numpy", "serve.model"}),
        ("from serve.cli.main import main; main(['run', '--help'], standalone_mode=False)", {"grpc", "numpy"}),
    ],
)
def test_the_client_and_help_load_little(program: str, never: set[str]) -> None:
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert not never & set(loaded)


@pytest.mark.skipif(os.cpu_count() == 1, reason="OpenBLAS starts no threads on one core")
def test_the_command_line_has_no_threads_of_openblas() -> None:
    """They would spin after every product; who sets their number gets it."""
    program = """
import os, runpy, sys
sys.argv = ["serve", "--help"]
try:
    runpy.run_module("serve", run_name="__main__")
except SystemExit:
    pass
import numpy
print(len(os.listdir("/proc/self/task")))
"""
    names = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    ran = [
        subprocess.run(
            [sys.executable, "-c", program], env=names | more, check=True, capture_output=True, text=True, timeout=60
        )
        for more in ({}, {"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_NUM_THREADS": "2"})
    ]
    by_default, one, two = (int(of.stdout.splitlines()[-1]) for of in ran)
    assert (by_default, two) == (one, one + 1)


def test_the_command_line_has_one_thread_of_openmp() -> None:
    """In every thread; faiss' would spin after every batch. Who sets their number gets it."""
    program = """
import runpy, sys, threading
sys.argv = ["serve", "--help"]
try:
    runpy.run_module("serve", run_name="__main__")
except SystemExit:
    pass
import faiss
thread = threading.Thread(target=lambda: print(faiss.omp_get_max_threads()))
thread.start()
thread.join()
"""
    names = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for more, expected in (({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")):
        ran = subprocess.run(
            [sys.executable, "-c", program], env=names | more, check=True, capture_output=True, text=True, timeout=60
        )
        assert ran.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize("package", ["serve.model", "jaxrec.onnx"])
@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_onnx_runtime_reports_nothing_unless_that_is_asked_for(package: str, given: str | None, expected: str) -> None:
    """The variable has to be there before ONNX Runtime is imported, which the modules of the packages do."""
    program = f"import os, sys, {package}; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    names = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    names |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=names, check=True, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == [expected, "False"]
