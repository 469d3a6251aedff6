"""The page of the tests' own times says what a report by pytest holds."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from bench.tests import Covered, Measured, measure, packages, seconds_of_tests, table_of_coverage, tables

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="0" failures="0" skipped="1" tests="3" time="12.1">
<testcase classname="tests.test_a" name="test_quick" time="0.004" />
<testcase classname="tests.test_b" name="test_slow[1]" time="11.26"><system-out>said</system-out></testcase>
<testcase classname="tests.test_b" name="test_left" time="0.000"><skipped type="pytest.skip" /></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    return path


def test_the_slowest_test_is_first(report: Path) -> None:
    names = ["tests.test_b::test_slow[1]", "tests.test_a::test_quick", "tests.test_b::test_left"]
    assert list(seconds_of_tests(report).items()) == list(zip(names, (11.26, 0.004, 0.0), strict=True))


def test_the_tables_hold_the_run_and_its_slowest_tests(report: Path) -> None:
    lines = tables({"now": Measured("abc", "test", 12.1, 20.4, 1.8, seconds_of_tests(report))})
    assert lines[2] == "| now (abc) | `make test` | 3 | 12 | 20 | 1.80 |"
    assert lines[8] == "| 11.3 | `tests.test_b::test_slow[1]` |"


def test_coverage_is_that_of_each_package() -> None:
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    files = {"jaxrec/a.py": (10, 9, 4, 1), "jaxrec/b/c.py": (10, 10, 0, 0), "serve/d.py": (8, 2, 2, 2)}
    report = {"files": {file: {"summary": dict(zip(names, counts, strict=True))} for file, counts in files.items()}}
    found = packages(report)
    assert found == {"jaxrec": Covered(20, 19, 4, 1), "serve": Covered(8, 2, 2, 2)}
    assert table_of_coverage(found)[-2:] == [
        "| jaxrec | 20 | 95.0% | 4 | 25.0% |",
        "| serve | 8 | 25.0% | 2 | 100.0% |",
    ]


def test_each_run_has_its_own_memory(tmp_path: Path) -> None:
    """The first one takes 200 MB and the second one nothing."""
    python = f"{sys.executable} -c"
    run = "open(__import__('os').environ['PYTEST_ADDOPTS'].partition('=')[2], 'w').write('<testsuites/>')"
    (tmp_path / "Makefile").write_text(
        f'large:\n\t@{python} "x = b\'1\' * 200_000_000; {run}"\nsmall:\n\t@{python} "{run}"\nbroken:\n\t@false\n'
    )
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", "commit", "--allow-empty", "-qm", "a"]
    subprocess.run(command, check=True)
    # In a process of its own: a child begins with the memory of the process that starts it.
    program = "import sys, pathlib, bench.tests as t"
    program += "; found = [t.measure(pathlib.Path(sys.argv[1]), one).peak_gb for one in ('large', 'small')]"
    program += "; pathlib.Path(sys.argv[2]).write_text(' '.join(map(str, found)))"
    subprocess.run([sys.executable, "-c", program, tmp_path, tmp_path / "said"], check=True)
    large, small = map(float, (tmp_path / "said").read_text().split())
    assert large > 0.19 > small
    with pytest.raises(click.ClickException, match="exit status 2: make broken"):
        measure(tmp_path, "broken")
