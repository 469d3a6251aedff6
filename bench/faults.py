"""Runs every fault of bench/faults.md, one after the other.

    python -m bench.faults --work FOLDER [--publish]

The two models have random weights (another seed each, so they answer differently), 10,000 items, two LSTMs of 128 and a
reranker. The server keeps events in SQLite unless another store is named. `kill -9` needs no server; the hostile
requests over HTTP and over TLS run on the default front, all others on the default front and on the fast front behind
nginx. Memory is in 10^6 bytes.

Needs h2load (Debian's nghttp2-client), nginx with the extra fast, postgresql and redis-server, and the rights to mount;
what is missing is said. Each fault is a module of its own (`python -m bench.fault_kill --help`), with a short version
in tests/serve/stores/test_faults.py. What is finished stays in the work folder.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import click

from bench.publish import Page, less, publish_option, read_figures, write_figures

KILLS, RELOADS, REQUESTS, SECONDS, MINUTES = 1000, 200, 100_000, 60.0, 20.0  # of the page
ITEMS = 10_000
CONNECTIONS = (4, 16, 64)
DEFAULT, FAST = "default", "fast, behind nginx"


class Part(NamedTuple):
    """A fault on a front, and the `bench.MODULE` with its arguments that tries it."""

    fault: str
    front: str
    module: str
    arguments: tuple[str, ...]

    @property
    def file(self) -> str:
        """Of its result."""
        fast = "-fast" if self.front == FAST else ""
        return "".join(one if one.isalnum() else "-" for one in self.fault) + f"{fast}.json"


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Models, results.")
@click.option("--kills", type=click.IntRange(1), default=KILLS)
@click.option("--reloads", type=click.IntRange(3), default=RELOADS)
@click.option("--requests", type=click.IntRange(1), default=REQUESTS, help="Of each hostile client.")
@click.option("--seconds", type=click.FloatRange(1), default=SECONDS, help="Of overload.")
@click.option("--minutes", type=click.FloatRange(0.1), default=MINUTES, help="Of soak.")
@publish_option
def main(work: Path, kills: int, reloads: int, requests: int, seconds: float, minutes: float, publish: bool) -> None:
    """Tries what was not tried yet, and writes WORK/faults.md; ends with 1 where a fault shows a flaw."""
    sizes = [(kills, KILLS), (reloads, RELOADS), (requests, REQUESTS), (seconds, SECONDS), (minutes, MINUTES)]
    names = ("kills", "reloads", "requests", "seconds", "minutes")
    missing = less(**{name: (int(asked), int(needed)) for name, (asked, needed) in zip(names, sizes, strict=True)})
    page = Page("faults", "What happens when things go wrong", publish, work, missing)
    work.mkdir(parents=True, exist_ok=True)
    models = [work / f"model-{seed}" for seed in (1, 2)]
    for seed, model in enumerate(models, 1):
        if not model.is_dir():
            make = ["bench.make_model", "--items", str(ITEMS), "--no-index", "--reranker", "--seed", str(seed)]
            subprocess.run([sys.executable, "-m", *make, "--out", str(model)], check=True)
    every = parts(models, kills, reloads, requests, seconds, minutes)
    files = {part: work / part.file for part in every}
    for part, file in files.items():
        if not file.is_file():
            click.echo(f"{part.fault}, {part.front}", err=True)
            write_figures(file, attempt(part))
    found = {part: read_figures(file) for part, file in files.items()}
    flaws = [f"{part.fault} ({part.front}) is not as it should be" for part in every if not found[part]["is_right"]]
    page.write(table(found), list(files.values()), flaws)
    if flaws:
        raise click.ClickException("; ".join(flaws))


def parts(models: list[Path], kills: int, reloads: int, requests: int, seconds: float, minutes: float) -> list[Part]:
    """Every fault on every front that it is for."""
    model = str(models[0])
    hostile = ["fault_hostile", model, "--requests", str(requests)]
    over_fronts = {
        "reloads under load": ["fault_reload", *map(str, models), "--reloads", str(reloads)],
        "hostile requests": hostile,
        **{
            f"overload, {connections} connections": [
                *("fault_overload", model, "--seconds", f"{seconds:g}", "--connections", str(connections))
            ]
            for connections in CONNECTIONS
        },
        "the store goes away and comes back": ["fault_store", model],
        "soak": ["fault_soak", model, "--minutes", f"{minutes:g}"],
    }
    of_one = {
        "kill -9 while recording": ("none", ["fault_kill", "--kills", str(kills)]),
        "hostile requests over HTTP": (DEFAULT, [*hostile, "--http"]),
        "hostile requests over HTTP with TLS and tokens": (DEFAULT, [*hostile, "--http", "--tls"]),
    }
    found = [Part(fault, front, module, tuple(rest)) for fault, (front, (module, *rest)) in of_one.items()]
    for fault, (module, *rest) in over_fronts.items():
        found += [Part(fault, DEFAULT, module, tuple(rest)), Part(fault, FAST, module, (*rest, "--fast"))]
    return found


def attempt(part: Part) -> dict[str, Any]:
    """The lines that a part `said`, whether all `is_right`, and the `load` of the machine when it began."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", f"bench.{part.module}", *part.arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ended.stdout.splitlines()
    if ended.returncode:
        said += ended.stderr.splitlines()[-1:]
    return {
        "said": said,
        "is_right": ended.returncode == 0 and not any("not tried" in line for line in said),
        "load": load,
    }


def table(found: dict[Part, dict[str, Any]]) -> list[str]:
    """The lines of the page below its head: for each module, what it does, and what came of its parts."""
    loads = [one["load"] for one in found.values()]
    lines = [
        _paragraph(__doc__, 2),
        "",
        f"The load of the machine was {min(loads):.1f} to {max(loads):.1f} when the parts began.",
    ]
    for module in dict.fromkeys(part.module for part in found):
        does = importlib.import_module(f"bench.{module}").__doc__
        lines += ["", f"## `bench.{module}`", "", f"{_paragraph(does, 0)} {_paragraph(does, 2)}", ""]
        lines += ["| fault | front | what came of it |", "|---|---|---|"]
        for part, one in found.items():
            if part.module == module:
                lines.append(f"| {part.fault} | {part.front} | {'<br>'.join(one['said']).replace('|', '&#124;')} |")
    return lines


def _paragraph(text: str | None, number: int) -> str:
    return (text or "").split("\n\n")[number].strip().replace("\n", " ")


if __name__ == "__main__":
    main()
