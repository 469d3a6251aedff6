"""Runs every fault of bench/faults.md, one after the other.

    python -m bench.faults --work FOLDER [--publish]

The two models have random weights (another seed each, so they answer differently), 10,000 items, two LSTMs of 128 and
a reranker. The server keeps events in SQLite unless another store is named. `kill -9` needs no server. The hostile
requests over HTTP and over TLS run on the default front, all others on the default front and on the fast front behind
nginx. MB are 10^6 bytes of the server's resident memory, without nginx. The load is the mean of the minute before a
part began, so it holds the part before.

Needs h2load (Debian's nghttp2-client), nginx with the extra fast, postgresql and redis-server, and the rights to
mount; what is missing is said. Each fault is a module of its own (`python -m bench.fault_kill --help`). A part that
came to its end stays in the work folder, also where it shows a flaw. One that was tried with other options is tried
again.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from bench.fault_reload import LEAST_RELOADS
from bench.fronts import require_proxy
from bench.load import require_h2load
from bench.publish import Page, begin, commit, here, less, paragraph, publish_option, read_figures, write_figures

KILLS, RELOADS, REQUESTS, SECONDS, MINUTES = 1000, 200, 100_000, 60, 20  # of the page
ITEMS = 10_000
CONNECTIONS = (4, 16, 64)
DEFAULT, FAST, NONE = "default", "fast, behind nginx", "none"
ENDS_S = 30.0
FLAW, LAST_LINES = 1, 20  # the exit status of click's errors; so many lines of others are shown


class Part(NamedTuple):
    """A fault on a front: `python -m bench.MODULE`, with so many `models`, and `options`."""

    fault: str
    front: str
    module: str
    models: int
    options: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its result's file."""
        fast = "-fast" if self.front == FAST else ""
        return "".join(one if one.isalnum() else "-" for one in self.fault) + f"{fast}.json"

    @property
    def command(self) -> str:
        """As one would type it."""
        return " ".join(["python -m", f"bench.{self.module}", *(["MODEL"] * self.models), *self.options])


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Models and results.")
@click.option("--kills", type=click.IntRange(1), default=KILLS)
@click.option("--reloads", type=click.IntRange(LEAST_RELOADS), default=RELOADS)
@click.option("--requests", type=click.IntRange(1), default=REQUESTS, help="Of each hostile client.")
@click.option("--seconds", type=click.FloatRange(1), default=SECONDS, help="Of overload.")
@click.option("--minutes", type=click.FloatRange(0.1), default=MINUTES, help="Of soak.")
@publish_option
def main(work: Path, kills: int, reloads: int, requests: int, seconds: float, minutes: float, publish: bool) -> None:
    """Tries each fault that was not tried yet, and writes WORK/faults.md; ends with 1 where a part shows a flaw."""
    missing = less(
        kills=(kills, KILLS),
        reloads=(reloads, RELOADS),
        requests=(requests, REQUESTS),
        seconds=(int(seconds), SECONDS),
        minutes=(int(minutes), MINUTES),
    )
    page = Page("faults", "What happens when things go wrong", publish, work, missing)
    require_h2load()
    require_proxy()
    work.mkdir(parents=True, exist_ok=True)
    models = [made_model(work / f"model-{seed}", seed) for seed in (1, 2)]
    files = {part: work / part.file for part in parts(kills, reloads, requests, seconds, minutes)}
    for part, file in files.items():
        if not file.is_file() or read_figures(file)["command"] != part.command:
            click.echo(f"{part.fault}, {part.front}", err=True)
            write_figures(file, attempt(part, models))
    found = {part: read_figures(file) for part, file in files.items()}
    flawed = {part: files[part] for part, one in found.items() if not one["is_right"]}
    reasons = [f"{part.fault} ({part.front}) shows a flaw, see {file}" for part, file in flawed.items()]
    page.write(table(found), [*files.values(), *(model.with_suffix(".json") for model in models)], reasons)
    if reasons:
        raise click.ClickException(f"{'; '.join(reasons)}. A part is tried again once its file is deleted")


def made_model(folder: Path, seed: int) -> Path:
    """A model directory of this commit, made if it is not there."""
    begin(folder.with_suffix(".json"), folder)
    if not folder.is_dir():
        make = ["bench.make_model", "--items", str(ITEMS), "--no-index", "--reranker", "--seed", str(seed)]
        subprocess.run([sys.executable, "-m", *make, "--out", str(folder)], check=True)
    return folder


def parts(kills: int, reloads: int, requests: int, seconds: float, minutes: float) -> list[Part]:
    """Every fault on every front that it is for."""
    hostile = ("fault_hostile", 1, "--requests", str(requests))
    over_fronts = {
        "reloads under load": ("fault_reload", 2, "--reloads", str(reloads)),
        "hostile requests": hostile,
        **{
            f"overload, {connections} connections": (
                *("fault_overload", 1, "--seconds", f"{seconds:g}"),
                *("--connections", str(connections)),
            )
            for connections in CONNECTIONS
        },
        "the store goes away and comes back": ("fault_store", 1),
        "soak": ("fault_soak", 1, "--minutes", f"{minutes:g}"),
    }
    of_one = {
        "kill -9 while recording": (NONE, ("fault_kill", 0, "--kills", str(kills))),
        "hostile requests over HTTP": (DEFAULT, (*hostile, "--http")),
        "hostile requests over HTTP with TLS and tokens": (DEFAULT, (*hostile, "--http", "--tls")),
    }
    every = [(fault, front, command) for fault, (front, command) in of_one.items()]
    for fault, command in over_fronts.items():
        every += [(fault, DEFAULT, command), (fault, FAST, (*command, "--fast"))]
    return [Part(fault, front, module, count, tuple(options)) for fault, front, (module, count, *options) in every]


def attempt(part: Part, models: list[Path]) -> dict[str, Any]:
    """Runs a part to its end.

    Returns:
        Its `command`, the lines that it `said`, whether it `is_right`, and the `load` of the machine before.

    Raises:
        click.ClickException: It could not be tried as a whole, or was killed, or the checkout changed meanwhile.
    """
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", f"bench.{part.module}", *map(str, models[: part.models]), *part.options]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # Files, since a server that a killed part leaves would keep a pipe open. It ends with the part's session.
        with subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True) as child:
            try:
                child.wait()
            finally:
                _end(child)
        said, errors = (file.seek(0) or file.read().splitlines() for file in (out, err))
    flaw = errors[-1:] if child.returncode == FLAW and errors and errors[-1].startswith("Error: ") else []
    said += flaw
    untried = [line for line in said if "not tried" in line]
    if untried or (child.returncode and not flaw):
        reasons = untried or [f"exit status {child.returncode}", *errors[-LAST_LINES:]]
        raise click.ClickException("\n".join([f"{part.command} did not come to its end", *reasons]))
    if commit() != here().commit:
        raise click.ClickException(f"the checkout was at {here().commit} at the start, and is at {commit()}")
    return {"command": part.command, "said": said, "is_right": child.returncode == 0, "load": load}


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Ends a part, which then takes back what it did, and what is left of its processes."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.send_signal(signal.SIGINT)  # nothing where it ended
        child.wait(ENDS_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        time.sleep(ENDS_S / 10 if child.returncode is None else 0.2)
        os.killpg(child.pid, signal.SIGKILL)


def table(found: Mapping[Part, dict[str, Any]]) -> list[str]:
    """The lines of the page below its head: for each module, what it does, and what came of its parts."""
    loads = [one["load"] for one in found.values()]
    lines = [paragraph(__doc__), "", f"The load was {min(loads):.1f} to {max(loads):.1f}."]
    for module in dict.fromkeys(part.module for part in found):
        does = importlib.import_module(f"bench.{module}").__doc__
        lines += ["", f"## `bench.{module}`", "", f"{paragraph(does, 0)} {paragraph(does)}", ""]
        lines += ["| fault | front | what came of it |", "|---|---|---|"]
        for part, one in found.items():
            if part.module == module:
                lines.append(f"| {part.fault} | {part.front} | {'<br>'.join(one['said']).replace('|', '&#124;')} |")
        lines += ["", *(f"    {part.command}" for part in found if part.module == module)]
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a part's processes end, too
    main()
