"""How a page of bench/ comes about.

A bench measures into a work folder and writes its page there (`WORK/NAME.md`), or prints it where it needs no folder.
`--publish` also writes `bench/NAME.md`. That is refused unless everything that the page needs was measured, at one
commit, without changes that are not committed. So a page is written whole or not at all, and a smaller run never
replaces it. Each result says at which commit, on which machine and with which versions it was measured.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from jaxrec.files import new_file, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "bench"
CODE = ("jaxrec", "serve", "bench", "tests", "deploy", "pyproject.toml", "requirements.lock")
CODE += (":!bench/*.md", ":!bench/*.svg")
PACKAGES = ("jax", "flax", "numpy", "onnxruntime", "onnxruntime-gpu")

publish_option = click.option("--publish", is_flag=True, help="Write the page in bench/, too, if it is whole.")


class Origin(NamedTuple):
    """The `commit` of a checkout, with `-dirty` where its code was changed, and the `machine` with its versions."""

    commit: str
    machine: str


def commit(folder: Path | None = None) -> str:
    """The commit of a checkout (None: this one), with `-dirty` where its code differs; pages and pictures are none."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder or ROOT, check=True, text=True, capture_output=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *CODE) else "")


def machine() -> str:
    """Cores, model of the CPU and versions, without names of hosts."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0))
    installed = [one for name in PACKAGES for one in importlib.metadata.distributions(name=name)]
    versions = ", ".join(f"{one.name} {one.version}" for one in installed)
    return f"{cores} cores of {cpu} ({platform.machine()}), Python {platform.python_version()}, {versions}"


@functools.cache
def here() -> Origin:
    """Of this process, when it was first asked: later changes of the checkout change no code that is loaded."""
    return Origin(commit(), machine())


def write_figures(path: Path, figures: Any) -> None:
    """Writes figures, as JSON values, with their origin."""
    write_text(path, json.dumps({**here()._asdict(), "figures": figures}))


def begin(path: Path, *made: Path) -> Path:
    """Writes where something that can be interrupted and resumed was begun, unless the file is there already.

    Raises click.ClickException where something that is `made` of it is there without the file: it is of another commit.
    """
    if not path.is_file():
        for one in made:
            if one.exists():
                raise click.ClickException(f"{path} is missing, so {one} is of an unknown commit; delete it, too")
        write_figures(path, None)
    return path


def read_figures(path: Path) -> Any:
    """The figures of a file by `write_figures`."""
    return json.loads(path.read_text("utf-8"))["figures"]


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays as .npz, with their origin as further arrays."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **here()._asdict(), **arrays)


def origin(path: Path) -> Origin:
    """Where a file by `write_figures` or `write_arrays` was measured."""
    found = np.load(path) if path.suffix == ".npz" else json.loads(path.read_text("utf-8"))
    if "commit" not in found:
        raise click.ClickException(
            f"{path} does not say at which commit it was measured; delete it to measure it again"
        )
    return Origin(*(str(found[name]) for name in Origin._fields))


def less(**asked: tuple[int, int] | tuple[Collection[str], Collection[str]]) -> list[str]:
    """What was asked for is less than a page needs: a text for each NAME=(asked, needed) where it is.

    Examples:
        >>> less(seeds=(2, 5), logs=(["a"], ["a", "b"]), rounds=(9, 9))
        ['seeds: 2 of 5', 'logs: without b']
    """
    found = []
    for name, (some, needed) in asked.items():
        if isinstance(some, int) and isinstance(needed, int):
            if some < needed:
                found.append(f"{name}: {some} of {needed}")
        elif without := sorted(set(needed) - set(some)):  # type: ignore[arg-type]
            found.append(f"{name}: without {', '.join(without)}")
    return found


def paragraph(text: str | None, number: int = 2) -> str:
    """A paragraph of a docstring as one line. In a script's own, 0 is its title, and 1 how it is called.

    Examples:
        >>> paragraph("Title.\\n\\n    python -m it\\n\\nWhat it\\nmeasures.\\n")
        'What it measures.'
    """
    return " ".join((text or "").split("\n\n")[number].split())


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Of repeated measurements: the median (lowest to highest).

    Examples:
        >>> spread([3.0, 1.0, 2.0])
        '2.0 (1.0 to 3.0)'
    """
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


@dataclasses.dataclass(frozen=True)
class Page:
    """A bench's page. To be made before anything is measured: what cannot be published is refused then.

    Attributes:
        name: Of bench/NAME.md.
        title: Its first line.
        publish: Whether to write bench/NAME.md.
        work: Folder of WORK/NAME.md; None prints the page.
        less: Why the page would be smaller than it has to be, from `less`.
    """

    name: str
    title: str
    publish: bool
    work: Path | None = None
    less: Sequence[str] = ()

    def __post_init__(self) -> None:
        here()  # of the start
        if self.publish:
            self._refuse(self._reasons(()))

    def write(self, body: Sequence[str], results: Sequence[Path] = (), less: Sequence[str] = ()) -> None:
        """Writes or prints the page, and publishes it if that was asked for.

        Args:
            body: lines below the head.
            results: all files that were asked for, by `write_figures` or `write_arrays`. None: all was measured by
                this process.
            less: why the results are less than a page needs.

        Raises:
            click.ClickException: the page is to be published and must not be; it is written to the work folder.
        """
        reasons = [*self._reasons(results), *less]
        origins = _origins(results)
        lines = [f"# {self.title}", "", f"`{_command(self.name)}`", ""]
        lines += [f"- measured at commit {', '.join(sorted({one.commit for one in origins}))}"]
        lines += [f"- {on}" for on in sorted({one.machine for one in origins})]
        lines += [f"- not to be published: {reason}" for reason in reasons]
        text = "\n".join([*lines, "", *body]) + "\n"
        if self.work is None:
            click.echo(text)
        else:
            write_text(self.work / f"{self.name}.md", text)
        if self.publish:
            self._refuse(reasons)
            write_text(PAGES / f"{self.name}.md", text)

    def _reasons(self, results: Sequence[Path]) -> list[str]:
        """Why the page must not be published."""
        commits = sorted({one.commit for one in _origins(results)})
        reasons = [*self.less, *(f"{path} is missing" for path in results if not path.is_file())]
        if len(commits) > 1:
            reasons.append(f"the results are of different commits: {', '.join(commits)}")
        if any(one.endswith("-dirty") for one in commits):
            reasons.append("measured with changes that were not committed")
        if (now := commit()) != here().commit:
            reasons.append(f"the checkout was at {here().commit} at the start, and is at {now}")
        elif results and now.endswith("-dirty"):
            reasons.append("the checkout has changes that are not committed")
        return reasons

    def _refuse(self, reasons: list[str]) -> None:
        if reasons:
            raise click.ClickException(f"bench/{self.name}.md is left as it is: {'; '.join(reasons)}")


def _origins(results: Sequence[Path]) -> set[Origin]:
    return {origin(path) for path in results if path.is_file()} if results else {here()}


def _command(name: str) -> str:
    """As it was called, without the folders that are this machine's own."""
    return " ".join([f"python -m bench.{name}", *(_without_folder(argument) for argument in sys.argv[1:])])


def _without_folder(argument: str) -> str:
    """NAME=RATINGS with PATH for the folder of RATINGS, and FILE:PLACE with FILE for a path."""
    if (mounted := re.fullmatch(r"/[^:]*:(/.*)", argument)) is not None:
        return f"FILE:{mounted[1]}"
    name, equals, path = argument.partition("=")
    if equals:
        return f"{name}=PATH/{Path(path).name}"
    return "FOLDER" if "/" in argument else argument
