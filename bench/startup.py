"""Measures what it costs to start: `import jaxrec` and the help of the command line, for bench/startup.md.

    python -m bench.startup --before CHECKOUT [--publish]

Each command runs `--runs` times in each checkout in turn, so that a busy moment of the machine hits both. A figure is
the median of the CPU seconds (user and system) of the whole process, with the smallest and the largest.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import click

from bench.publish import ROOT, Page, commit, less, publish_option, spread

RUNS = 5  # of the page
COMMAND_LINE = "import sys; {}; sys.argv = ['jaxrec', *{!r}]; main()"
BEFORE, AFTER = "from jaxrec.cli import main", "from jaxrec.cli.main import main"


@click.command()
@click.option("--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An earlier checkout.")
@click.option("--runs", type=click.IntRange(3), default=RUNS, show_default=True, help="Counted runs of each command.")
@publish_option
def main(before: Path | None, runs: int, publish: bool) -> None:
    """Measures, then prints the table."""
    checkouts = {"this commit": ROOT} | ({"before": before.resolve()} if before else {})
    page = Page("startup", "Start-up", publish, less=less(checkouts=(checkouts, ["before"]), runs=(runs, RUNS)))
    rows = []
    for label, arguments in {
        "`import jaxrec`": None,
        "`jaxrec --help`": ["--help"],
        "`jaxrec prepare --help`": ["prepare", "--help"],
        "`jaxrec rl --help`": ["rl", "--help"],
    }.items():
        seconds: dict[str, list[float]] = {name: [] for name in checkouts}
        for number in range(runs + 1):  # the first run of each fills the caches and is not counted
            for name, folder in checkouts.items():
                spent = _cpu_seconds(folder, arguments)
                if number:
                    seconds[name].append(spent)
        rows.append([label, *(spread(seconds[name], 2) for name in checkouts)])
    page.write(
        [
            f"CPU seconds of the whole process, median of {runs} runs (lowest to highest), checkouts in turn.",
            "",
            "| | " + " | ".join(f"{name} ({commit(folder)})" for name, folder in checkouts.items()) + " |",
            "|---|" + "---|" * len(checkouts),
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


def _cpu_seconds(folder: Path, arguments: list[str] | None) -> float:
    script = AFTER if (folder / "jaxrec" / "cli").is_dir() else BEFORE
    program = "import jaxrec" if arguments is None else COMMAND_LINE.format(script, arguments)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
