"""Measures the tests, for bench/tests.md: how long all, the quick and the slowest take, their memory, and coverage.

    python -m bench.tests --work FOLDER --before CHECKOUT [--publish]

Runs `make test` in each checkout, with its own environment (`.venv`), then `make test-fast` and `make coverage` in this
one. A checkout whose `build/compiled` is kept from an earlier run finds its programs there; the page is of one without.
What is finished stays in the work folder.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import click

from bench import child
from bench.publish import ROOT, Page, commit, less, publish_option, read_figures, write_figures

SLOWEST = 30


class Measured(NamedTuple):
    """A run of the tests of a `commit` by `make target`: as `bench.child.Usage`, and the seconds of each test."""

    commit: str
    target: str
    seconds: float
    cpu_seconds: float
    peak_gb: float
    tests: dict[str, float]


class Covered(NamedTuple):
    """How much of a package the tests run."""

    lines: int
    lines_run: int
    branches: int
    branches_run: int


@click.command()
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Results stay here.")
@click.option("--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An earlier checkout.")
@publish_option
def main(work: Path, before: Path | None, publish: bool) -> None:
    """Runs all tests where that was not done yet, then writes the tables."""
    checkouts = ({"before": before.resolve()} if before else {}) | {"now": ROOT}
    page = Page("tests", "Tests", publish, work, less(checkouts=(checkouts, ["before", "now"])))
    runs = {**{name: (folder, "test") for name, folder in checkouts.items()}, "quick": (ROOT, "test-fast")}
    files = {name: work / f"{name}.json" for name in (*runs, "coverage")}
    for name, run in runs.items():
        if not files[name].is_file():
            write_figures(files[name], measure(*run)._asdict())
    if not files["coverage"].is_file():
        write_figures(files["coverage"], {name: one._asdict() for name, one in measure_coverage().items()})
    measured = {name: Measured(**read_figures(files[name])) for name in runs}
    covered = {name: Covered(**one) for name, one in read_figures(files["coverage"]).items()}
    page.write([*tables(measured), *table_of_coverage(covered)], list(files.values()))


def measure(checkout: Path, target: str) -> Measured:
    """Runs `make TARGET` without an earlier run's programs. Raises click.ClickException where a test fails."""
    shutil.rmtree(checkout / "build/compiled", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTEST_ADDOPTS": f"--junitxml={report}"}
        try:
            _, usage = child.run(["make", target], cwd=checkout, env=environment)
        except click.ClickException as error:
            raise click.ClickException(f"{checkout}: {error}") from error
        return Measured(commit(checkout), target, **usage._asdict(), tests=seconds_of_tests(report))


def measure_coverage() -> dict[str, Covered]:
    """By package, of all tests of this checkout. Raises click.ClickException where a test fails."""
    if subprocess.run(["make", "coverage"], cwd=ROOT, check=False).returncode:
        raise click.ClickException("make coverage failed")
    command = [ROOT / ".venv/bin/coverage", "json", "--quiet", "-o", "-"]
    return packages(json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout))


def packages(report: dict[str, Any]) -> dict[str, Covered]:
    """By package, of a JSON report by coverage.py."""
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    found: dict[str, Counter[str]] = {}
    for file, one in report["files"].items():
        found.setdefault(Path(file).parts[0], Counter()).update({name: one["summary"][name] for name in names})
    return {name: Covered(*(counts[one] for one in names)) for name, counts in sorted(found.items())}


def seconds_of_tests(report: Path) -> dict[str, float]:
    """By name, from a JUnit report by pytest: set-up, test and clean-up, the slowest first."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    found = {f"{case.get('classname')}::{case.get('name')}": float(case.get("time") or 0) for case in cases}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def tables(measured: dict[str, Measured]) -> list[str]:
    """Lines of Markdown: all runs side by side, then the slowest tests of each."""
    lines = ["| checkout | command | tests | s | CPU s | largest process, GB |", "|---|---|---|---|---|---|"]
    titles = {f"{name} ({one.commit})": one for name, one in measured.items()}
    for name, one in titles.items():
        figures = f"{one.seconds:,.0f} | {one.cpu_seconds:,.0f} | {one.peak_gb:.2f}"
        lines.append(f"| {name} | `make {one.target}` | {len(one.tests):,} | {figures} |")
    for name, one in titles.items():
        lines += ["", f"## The slowest, {name}", "", "| s | test |", "|---|---|"]
        lines += [f"| {seconds:.1f} | `{test}` |" for test, seconds in list(one.tests.items())[:SLOWEST]]
    return lines


def table_of_coverage(covered: dict[str, Covered]) -> list[str]:
    """Lines of Markdown."""
    lines = ["", "## Coverage, now", "", "| package | lines | run | branches | run |", "|---|---|---|---|---|"]
    for name, one in covered.items():
        shares = one.lines_run / one.lines, one.branches_run / max(one.branches, 1)
        lines.append(f"| {name} | {one.lines:,} | {shares[0]:.1%} | {one.branches:,} | {shares[1]:.1%} |")
    return lines


if __name__ == "__main__":
    main()
