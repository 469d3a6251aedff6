"""Installs jaxrec as its users do, each time into a fresh environment, for bench/installations.md.

    python -m bench.installations [--publish]

The wheel is built from the files that git tracks. Every installation comes from the package index, so this needs the
network and some minutes. It is checked what can be imported, what is not there, what a command says whose extra is
missing, and the size of site-packages without pip and setuptools. A server of `serve-cpu` answers with a model of
random weights.
"""

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from bench.publish import ROOT, Page, publish_option

MB = 1e6
INSTALLERS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
START_S = 60
DEMO_S = 300
HEAVY = ("jax", "jaxlib", "flax", "pandas", "duckdb", "tensorflow", "scipy", "matplotlib")


PASSED = (
    "All checks passed: what each can import and what it has not, the sentences for missing extras, and a server of"
    " `serve-cpu` from its start over `check` and `ask` to SIGTERM, and `jaxrec demo` of `all` until it trains."
)


class Installation(NamedTuple):
    """What to install, and what is expected of it."""

    extras: str
    most_mb: int | None
    """Goal for the size; None: there is none."""
    imports: tuple[str, ...]
    absent: tuple[str, ...]
    refused: dict[str, str]
    """By command: the extras that its sentence names."""


INSTALLATIONS = (
    Installation(
        "",
        60,
        ("serve.client", "jaxrec"),
        (*HEAVY, "numpy", "onnxruntime"),
        {
            "jaxrec train data --out run": "train",
            "jaxrec prepare log.csv --out data": "train",
            "jaxrec export run --out model": "export,serve",
            "jaxrec demo": "demo,serve",
            "python -m serve run model": "serve",
            "python -m serve log a b": "serve",
        },
    ),
    Installation(
        "serve-cpu",
        250,
        ("serve.client", "serve.front.server", "onnxruntime"),
        (*HEAVY, "faiss"),
        {"jaxrec train data --out run": "train", "jaxrec recommend model --history log.csv --out top.csv": "train"},
    ),
    Installation("all", None, ("jaxrec.runs.demo", "jaxrec.onnx.convert", "serve.front.server"), ("mlflow",), {}),
    Installation(
        "train",
        None,
        ("jaxrec.runs.train", "jaxrec.data.prepare", "serve.client"),
        ("tensorflow", "onnxruntime"),
        {"jaxrec export run --out model": "export,serve", "python -m serve run model": "serve"},
    ),
)


@click.command()
@publish_option
def main(publish: bool) -> None:
    """Installs, checks and measures, then prints the table. Exits with 1 if a check fails."""
    page = Page("installations", "Installations", publish)
    rows, versions, failures, missed = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, model = build_wheel(folder), folder / "model"
        make_model = [sys.executable, "-m", "bench.make_model", "--items", "1000", "--out", str(model)]
        subprocess.run(make_model, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for one in INSTALLATIONS:
            what = f"jaxrec[{one.extras}]" if one.extras else "jaxrec"
            python = install(folder / f"environment-{one.extras}", wheel, one.extras)
            failures += [f"{what}: {text}" for text in differences(python, one)]
            if one.extras == "serve-cpu":
                failures += [f"{what}: {text}" for text in serving(python, model)]
            if one.extras == "all":
                failures += [f"{what}: {text}" for text in demo(python)]
            sizes, bytecode = folder_sizes(python), sum(folder_sizes(python, "*.pyc").values())
            total, goal = sum(sizes.values()), ""
            if one.most_mb is not None:
                goal = f"{one.most_mb}, {'missed' if total > one.most_mb else 'met'}"
                missed += [f"{what} has {total:.0f} MB, at most {one.most_mb}"] if total > one.most_mb else []
            versions.append(f"- `{what}`: {', '.join(installed(python))}")
            largest = ", ".join(f"{entry} {sizes[entry]:.0f}" for entry in sorted(sizes, key=sizes.__getitem__)[:-6:-1])
            rows.append(f"| `{what}` | {total:.0f} | {bytecode:.0f} | {goal} | {largest} |")
    page.write(
        [
            "Size of site-packages without pip and setuptools, in MB of 10^6 bytes. pip writes the bytecode beside the"
            " files of the packages.",
            "",
            "| installation | MB | of it bytecode, MB | goal: at most, MB | largest folders, MB |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Versions of each installation, from the package index:",
            "",
            *versions,
            "",
            *[f"- failed: {text}" for text in failures],
            *([""] if failures else []),
            " ".join([*([] if failures else [PASSED]), f"Goals missed: {'; '.join(missed) or 'none'}."]),
        ]
    )
    if failures:
        raise click.ClickException(f"{len(failures)} checks failed")


def build_wheel(folder: Path, *options: str) -> Path:
    """The wheel of the files that git tracks, as they are now, built by `pip wheel` with further options."""
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *options]
    run([*command, str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(environment: Path, wheel: Path, extras: str) -> Path:
    """The Python of a new environment that has the wheel with the extras."""
    python = environment / "bin/python"
    run([sys.executable, "-m", "venv", str(environment)], environment.parent)
    wanted = f"jaxrec[{extras}] @ {wheel.as_uri()}"
    run([str(python), "-m", "pip", "install", "--quiet", wanted], environment)
    return python


def installed(python: Path) -> list[str]:
    """The version of Python and those of all packages of an environment but its installers."""
    ended = call([str(python), "-m", "pip", "list", "--format", "json"], python.parents[1])
    if ended.returncode:
        raise click.ClickException(f"pip list: {ended.stderr.strip()}")
    names = [f"{one['name']} {one['version']}" for one in json.loads(ended.stdout) if one["name"] not in INSTALLERS]
    (packages,) = (python.parents[1] / "lib").glob("python*")
    return [packages.name.replace("python", "Python "), *names]


def run(command: list[str], folder: Path) -> None:
    """Runs a command that must succeed, in a folder that is no checkout."""
    ended = call(command, folder)
    if ended.returncode:
        raise click.ClickException(f"{shlex.join(command)}: {ended.stderr.strip()}")


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, without the variables of this environment that it would read."""
    return subprocess.run(command, cwd=folder, env=plain(), check=False, capture_output=True, text=True)


def plain() -> dict[str, str]:
    """The environment without what this checkout or a server's settings set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("JAXREC_", "PYTHON"))}


def differences(python: Path, expected: Installation) -> Iterator[str]:
    """What an installation lacks, has too much, or says in another way."""
    folder = python.parents[1]
    for module in expected.imports:
        ended = call([str(python), "-c", f"import {module}"], folder)
        if ended.returncode:
            yield f"import {module}: {ended.stderr.strip().splitlines()[-1]}"
    for module in expected.absent:
        program = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({module!r}) is not None)"
        if call([str(python), "-c", program], folder).returncode:
            yield f"{module} is there"
    for line, extras in expected.refused.items():
        program, *words = shlex.split(line)
        command = [str(python.parent / program), *words]
        ended = call(command, folder)
        lines = ended.stderr.splitlines()
        if (
            ended.returncode != 1
            or ended.stdout
            or len(lines) != 1
            or f'pip install "jaxrec[{extras}]"' not in lines[0]
        ):
            yield f"{line}: exit status {ended.returncode}, {ended.stdout}{ended.stderr}"


def serving(python: Path, model: Path) -> Iterator[str]:
    """What is wrong with a server, from its start to SIGTERM, and with the commands that ask it."""
    serve, folder = [str(python), "-m", "serve"], python.parents[1]
    command = [*serve, "run", str(model), "--address", "127.0.0.1:0", "--log-format", "text"]
    with subprocess.Popen(command, cwd=folder, env=plain(), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        came, _, _ = select.select([server.stdout], [], [], START_S)
        ready = server.stdout.readline() if came else f"nothing within {START_S} s"
        if not ready.startswith("serving "):
            server.kill()
            yield f"a server that does not start: {ready}"
            return
        address = ready.split(" on ", 1)[1].split(" ", 1)[0]
        for words, expected in ((["check"], "SERVING"), (["ask", "--watched", "1", "--k", "3"], "recommendation ")):
            ended = call([*serve, *words, "--address", address], folder)
            if ended.returncode or expected not in ended.stdout:
                yield f"python -m serve {' '.join(words)}: {ended.stdout}{ended.stderr}"
        server.send_signal(signal.SIGTERM)
    if server.returncode:
        yield f"SIGTERM: exit status {server.returncode}"


def demo(python: Path) -> Iterator[str]:
    """What is wrong with `jaxrec demo` until it trains: it writes its log, and reads and checks it."""
    folder = python.parents[1]
    command = [str(python.parent / "jaxrec"), "demo", "--out", str(folder / "demo")]
    variables = {**plain(), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(DEMO_S, process.kill)
        limit.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("== Train"):
                break
        else:
            yield f"jaxrec demo: ended before it trained: {''.join(lines)}"
        limit.cancel()
        process.kill()


def folder_sizes(python: Path, files: str = "*") -> dict[str, float]:
    """MB of the files in each entry of site-packages, without the installers."""
    (packages,) = (python.parents[1] / "lib").glob("python*/site-packages")
    sizes: dict[str, float] = {}
    for file in packages.rglob(files):
        entry = file.relative_to(packages).parts[0]
        if not entry.startswith(INSTALLERS) and file.is_file():
            sizes[entry] = sizes.get(entry, 0.0) + file.stat().st_size / MB
    return sizes


if __name__ == "__main__":
    main()
