"""The logs that a bench measures: its arguments, of which files data were prepared, and files of sequences.

S3-Rec (CIKM 2020) published its benchmark files so: with the order of events, and no times.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pandas as pd

from bench.publish import begin, read_figures, write_figures
from jaxrec.data.schema import GENRES, ITEM, TIME, TITLE, USER
from jaxrec.files import sha256

ONE_TIME = 1_262_304_000
SEQUENCES_FILE = "sequences.txt"


def _paths(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, Path]:
    """Raises click.BadParameter."""
    found: dict[str, Path] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or name in found or not path or not Path(path).exists():
            raise click.BadParameter(f"{value}: expected NAME=PATH of a log that is there, and each name once")
        found[name] = Path(path)
    return found


logs_argument = click.argument("logs", nargs=-1, required=True, metavar="NAME=PATH...", callback=_paths)


def is_sequences(log: Path) -> bool:
    """Whether a log is a folder with SEQUENCES_FILE: it has an order of events, and no times."""
    return (log / SEQUENCES_FILE).is_file()


def read_sequences(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """FOLDER/SEQUENCES_FILE as a log whose order is that of its rows, and the attributes of its items as genres."""
    lines = (folder / SEQUENCES_FILE).read_text("utf-8").splitlines()
    users = [line.split() for line in lines if line.strip()]
    counts = [len(user) - 1 for user in users]
    items = [item for _, *of_user in users for item in of_user]
    log = pd.DataFrame({USER: np.repeat([user[0] for user in users], counts), ITEM: items, TIME: ONE_TIME})
    attributes = json.loads((folder / "item2attributes.json").read_text("utf-8"))
    known = list(dict.fromkeys(items))
    genres = ["|".join(f"a{one}" for one in attributes.get(item, ())) for item in known]
    return log, pd.DataFrame({ITEM: known, TITLE: [f"item {item}" for item in known], GENRES: genres})


def require_source(source: Path, log: Path, out: Path) -> None:
    """Notes in `source` of which log, a file or a folder of files, the data in `out` are prepared.

    Raises click.ClickException where they are of another one, or are there already and it is not known of which.
    """
    digest = sha256(log) if log.is_file() else _folder_digest(log)
    if not source.is_file():
        begin(source, out)
        write_figures(source, digest)
    if read_figures(source) != digest:
        raise click.ClickException(f"{out} was made of another file than {log}; delete {source.parent}")


def _folder_digest(folder: Path) -> str:
    """SHA-256 of the names and the contents of its files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()
