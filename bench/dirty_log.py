"""Makes a log dirty, from a seed: 1 % of the rows are broken, in eight ways, and 4 % are repeated further down.

    python bench/dirty_log.py r25.csv --out dirty.csv

Rows are added, none is changed: the dirty log holds the rows of the clean one, in their order.
"""

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

BROKEN: tuple[Callable[[list[bytes]], bytes], ...] = (
    lambda row: b",".join(row[:3]),
    lambda row: b",".join([*row, b"5"]),
    lambda row: b",".join([row[0], row[1], b"good", row[3]]),
    lambda row: b",".join([b"", *row[1:]]),
    lambda row: b",".join([row[0], b"x" + row[1], *row[2:]]),
    lambda row: b",".join([*row[:3], b"4000000000"]),
    lambda row: b",".join([row[0], b'"' + row[1], *row[2:]]),
    lambda row: b",".join([row[0], row[1] + b"\xff", *row[2:]]),
)
CHUNK_LINES = 1_000_000


@click.command(context_settings={"show_default": True})
@click.argument("log", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--bad", type=float, default=0.01, help="Broken rows to a row of the log.")
@click.option("--repeats", type=float, default=0.04, help="Repeated rows to a row of the log.")
@click.option("--seed", type=int, default=0)
def main(log: Path, out: Path, bad: float, repeats: float, seed: int) -> None:
    """Prints how many rows of each kind were added."""
    rng = np.random.default_rng(seed)
    counts = np.zeros(2, np.int64)
    with open(log, "rb") as source, open(out, "wb") as target:
        target.write(next(source))
        while lines := source.readlines(CHUNK_LINES * 28):
            kinds = rng.random(len(lines))
            sources = rng.integers(0, np.arange(1, len(lines) + 1))  # a row of this chunk, up to this one
            added: dict[int, bytes] = {at: lines[sources[at]] for at in np.flatnonzero(kinds < repeats).tolist()}
            broken = np.flatnonzero((kinds >= repeats) & (kinds < repeats + bad)).tolist()
            for number, at in enumerate(broken):
                added[at] = BROKEN[number % len(BROKEN)](lines[at].rstrip(b"\n").split(b",")) + b"\n"
            for at, line in enumerate(lines):
                target.write(line if line.endswith(b"\n") else line + b"\n")
                if at in added:
                    target.write(added[at])
            counts += (len(broken), len(added) - len(broken))
    click.echo(f"added {counts[0]:,} broken and {counts[1]:,} repeated rows")


if __name__ == "__main__":
    main()
