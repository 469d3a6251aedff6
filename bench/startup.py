"""Measures what it costs to start: `import jaxrec` and the help of the command line; writes a table.

    python bench/startup.py --before CHECKOUT --out bench/startup.md

Each command runs `--runs` times in each checkout in turn, so that a busy moment of the machine hits both. A figure is
the median of the CPU seconds (user and system) of the whole process, with the smallest and the largest.
"""

import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import click

from jaxrec.files import write_text

HERE = Path(__file__).resolve().parents[1]
COMMAND_LINE = "import sys; {}; sys.argv = ['jaxrec', *{!r}]; main()"
BEFORE, AFTER = "from jaxrec.cli import main", "from jaxrec.cli.main import main"


@click.command()
@click.option("--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An earlier checkout.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Where the table goes.")
@click.option("--runs", type=click.IntRange(3), default=5, show_default=True, help="Counted runs of each command.")
def main(before: Path | None, out: Path, runs: int) -> None:
    """Refuses a checkout with changes that are not committed: a figure belongs to a commit."""
    checkouts = {"this commit": HERE} | ({"before": before.resolve()} if before else {})
    commits = {name: _commit(folder) for name, folder in checkouts.items()}
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
        rows.append([label, *(_cell(seconds[name]) for name in checkouts)])
    lines = [
        "# Start-up",
        "",
        f"`python bench/startup.py{' --before CHECKOUT' if before else ''} --out bench/startup.md`; CPU seconds of the "
        f"whole process, median of {runs} runs (smallest to largest), checkouts in turn. Python "
        f"{platform.python_version()}, {os.cpu_count()} shared cores.",
        "",
        "| | " + " | ".join(f"{name} ({commits[name]})" for name in checkouts) + " |",
        "|---|" + "---|" * len(checkouts),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    write_text(out, "\n".join(lines) + "\n")
    click.echo("\n".join(lines))


def _commit(folder: Path) -> str:
    if subprocess.check_output(["git", "status", "--porcelain", "--untracked-files=no"], cwd=folder, text=True).strip():
        raise click.ClickException(f"{folder} has changes that are not committed")
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True).strip()


def _cpu_seconds(folder: Path, arguments: list[str] | None) -> float:
    script = AFTER if (folder / "jaxrec" / "cli").is_dir() else BEFORE
    program = "import jaxrec" if arguments is None else COMMAND_LINE.format(script, arguments)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main()
