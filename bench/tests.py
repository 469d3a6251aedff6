"""Measures how long the tests take, for bench/tests.md: all of them, the slowest, and the memory of a process.

    python -m bench.tests --before CHECKOUT [--publish]

Runs `make test` in each checkout, with its own environment (`.venv`). A checkout whose `build/compiled` is kept from an
earlier run finds its programs there; the page is of one without.
"""

import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import click

from bench.publish import ROOT, Page, commit, less, publish_option

SLOWEST = 30


class Measured(NamedTuple):
    """A run of all tests: `seconds`, CPU seconds and the largest process in MB, and the seconds of each test."""

    seconds: float
    cpu_seconds: float
    largest_mb: float
    tests: dict[str, float]


@click.command()
@click.option("--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An earlier checkout.")
@publish_option
def main(before: Path | None, publish: bool) -> None:
    """Runs all tests, then prints the tables."""
    checkouts = ({"before": before.resolve()} if before else {}) | {"now": ROOT}
    page = Page("tests", "Tests", publish, less=less(checkouts=(checkouts, ["before", "now"])))
    measured = {f"{name} ({commit(folder)})": measure(folder) for name, folder in checkouts.items()}
    page.write(tables(measured))


def measure(checkout: Path) -> Measured:
    """Runs `make test` without an earlier run's programs. Raises click.ClickException where a test fails."""
    shutil.rmtree(checkout / "build/compiled", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTEST_ADDOPTS": f"--junitxml={report}"}
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        ended = subprocess.run(["make", "test"], cwd=checkout, env=environment, check=False)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if ended.returncode:
            raise click.ClickException(f"{checkout}: make test ended with {ended.returncode}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Measured(seconds, cpu, after.ru_maxrss / 1024, seconds_of_tests(report))


def seconds_of_tests(report: Path) -> dict[str, float]:
    """By name, from a JUnit report by pytest: set-up, test and clean-up, the slowest first."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    found = {f"{case.get('classname')}::{case.get('name')}": float(case.get("time") or 0) for case in cases}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def tables(measured: dict[str, Measured]) -> list[str]:
    """Lines of Markdown: all runs side by side, then the slowest tests of each."""
    lines = ["| checkout | tests | s | CPU s | largest process, MB |", "|---|---|---|---|---|"]
    for name, one in measured.items():
        figures = f"{one.seconds:,.0f} | {one.cpu_seconds:,.0f} | {one.largest_mb:,.0f}"
        lines.append(f"| {name} | {len(one.tests):,} | {figures} |")
    for name, one in measured.items():
        lines += ["", f"## The slowest, {name}", "", "| s | test |", "|---|---|"]
        lines += [f"| {seconds:.1f} | `{test}` |" for test, seconds in list(one.tests.items())[:SLOWEST]]
    return lines


if __name__ == "__main__":
    main()
