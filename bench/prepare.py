"""Measures the preparation: time and peak memory of a child process per way, on one log, in one run.

    python -m bench.generate_log --rows 25000000 --format csv --out r25.csv
    python -m bench.dirty_log r25.csv --out dirty.csv
    python -m bench.prepare r25.csv --dirty dirty.csv --before CHECKOUT [--publish]

With peers, each in an environment of its own, and a larger log (bench/prepare_peers.md):

    python -m bench.generate_log --rows 250000000 --format parquet --out r250
    python -m venv peer && peer/bin/pip install rectools
    python -m venv recbole && recbole/bin/pip install recbole==1.2.1 "numpy<2" "pandas<2.2"
    python -m bench.prepare r25.csv --large r250 --peer-python peer/bin/python --recbole-python recbole/bin/python

Ways: jaxrec checks every row, filters, sorts, splits, writes and hashes; `dirty` also sets 1 % broken and 4 % repeated
rows aside, each with its reason; `pandas` does the same but for checks, splits and hashes, as one would write it;
`rectools` is Dataset.construct, which maps ids and keeps the events, unsorted and unfiltered, in memory: less work than
the others do; with `split` it also cuts validation and test (LastNSplitter), which sorts. `recbole` is its Dataset with
the same filter and split as ours, in memory, from its own file format, whose making is not counted. Reading the file is
part of each.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import click

from bench import child
from bench.child import Usage
from bench.publish import Page, commit, here, less, publish_option, spread

RUNS = 3  # of the page
ROWS = 25_000_000  # of the page's logs, at least

JAXREC = """
import sys
from pathlib import Path
from jaxrec.data.prepare import prepare
data = prepare(Path(sys.argv[1]), out=Path(sys.argv[2]))
print(data.log.events.event_count)
"""
DIRTY = JAXREC.replace(
    "import prepare\n", "import prepare\nfrom jaxrec.data.reading.bad_rows import OnBadRows\n"
).replace("out=Path(sys.argv[2])", "out=Path(sys.argv[2]), on_bad_rows=OnBadRows.QUARANTINE")
PANDAS = """
import sys
from pathlib import Path
import numpy as np
import pandas as pd
frame = pd.read_csv(sys.argv[1], dtype={"rating": np.float32})
rows = len(frame)
while True:
    by_user = frame.groupby("userId")["userId"].transform("size")
    by_item = frame.groupby("movieId")["movieId"].transform("size")
    kept = frame[(by_user >= 10) & (by_item >= 5)]
    if len(kept) == len(frame):
        break
    frame = kept
frame = frame.sort_values(["userId", "timestamp"], kind="stable")
users, user_ids = pd.factorize(frame["userId"], sort=True)
items, item_ids = pd.factorize(frame["movieId"], sort=True)
out = Path(sys.argv[2])
out.mkdir()
np.save(out / "offsets.npy", np.concatenate([[0], np.cumsum(np.bincount(users))]))
np.save(out / "items.npy", (items + 1).astype(np.int32))
np.save(out / "ratings.npy", frame["rating"].to_numpy())
np.save(out / "times.npy", frame["timestamp"].to_numpy())
print(rows)
"""
RECTOOLS = """
import sys
import pandas as pd
from rectools import Columns
from rectools.dataset import Dataset
frame = pd.read_csv(sys.argv[1])
frame.columns = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
dataset = Dataset.construct(frame)
print(len(dataset.interactions.df))
"""
RECTOOLS_SPLIT = RECTOOLS.replace(
    "print(",
    """
from rectools.model_selection import LastNSplitter
splitter = LastNSplitter(1, n_splits=2, filter_cold_users=False, filter_cold_items=False, filter_already_seen=False)
folds = [(train, test) for train, test, _ in splitter.split(dataset.interactions)]
print(""",
)
RECBOLE = """
import sys
from pathlib import Path
from recbole.config import Config
from recbole.data import create_dataset
folder, sys.argv[1:] = Path(sys.argv[1]), []
config = Config(model="BPR", dataset=folder.name, config_dict={
    "data_path": str(folder.parent),
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    "user_inter_num_interval": "[10,inf)",
    "item_inter_num_interval": "[5,inf)",
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
    "use_gpu": False,
})
dataset = create_dataset(config)
kept = len(dataset.inter_feat)
print("kept, training, validation, test:", kept, *map(len, dataset.build()), file=sys.stderr)
print(sum(1 for _ in open(folder / f"{folder.name}.inter")) - 1)
"""
OPEN = """
import sys, time
from pathlib import Path
from jaxrec.data.store import read_prepared
times = []
for _ in range(5):
    start = time.perf_counter()
    read_prepared(Path(sys.argv[1]))
    times.append(time.perf_counter() - start)
print(sorted(times)[2])
"""


def row_count(path: Path) -> int:
    """The rows of a CSV with a header; 0 for a folder."""
    if path.is_dir():
        return 0
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b"")) - 1


def write_inter(log: Path, folder: Path) -> Path:
    """Writes a CSV of userId,movieId,rating,timestamp as RecBole reads it: FOLDER/NAME.inter, separated by tabs."""
    folder.mkdir()
    with open(log) as source, open(folder / f"{folder.name}.inter", "w") as out:
        next(source)
        out.write("user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
        out.writelines(line.replace(",", "\t") for line in source)
    return folder


@click.command(context_settings={"show_default": True})
@click.argument("log", type=click.Path(exists=True, path_type=Path))
@click.option("--dirty", type=click.Path(exists=True, path_type=Path), help="The same log, from bench.dirty_log.")
@click.option("--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An earlier checkout.")
@click.option("--large", type=click.Path(exists=True, path_type=Path), help="A larger log, for jaxrec alone.")
@click.option("--peer-python", type=click.Path(exists=True), help="A Python that has rectools.")
@click.option("--recbole-python", type=click.Path(exists=True), help="A Python that has recbole.")
@click.option("--runs", type=click.IntRange(1), default=RUNS, help="Runs of each way, all ways in turn.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/bench-prepare"))
@publish_option
def main(
    log: Path,
    dirty: Path | None,
    before: Path | None,
    large: Path | None,
    peer_python: str | None,
    recbole_python: str | None,
    runs: int,
    work: Path,
    publish: bool,
) -> None:
    """Measures every way `--runs` times, all ways in turn, and writes the page."""
    work.mkdir(parents=True)
    given = [name for name, one in (("dirty", dirty), ("before", before)) if one is not None]
    counts = {path: row_count(path) for path in (log, dirty) if path is not None}
    needed = less(runs=(runs, RUNS), options=(given, ["before", "dirty"]), rows=(min(counts.values()), ROWS))
    page = Page("prepare", "Preparation: time and memory", publish, work, less=needed)
    ours = f"jaxrec, {here().commit}"
    ways = [(ours, sys.executable, JAXREC, log), ("pandas", sys.executable, PANDAS, log)]
    if dirty is not None:
        ways.insert(1, (f"{ours}: dirty, into quarantine", sys.executable, DIRTY, dirty))
    if before is not None:
        program = f"import sys; sys.path.insert(0, {str(before.resolve())!r}){JAXREC}"
        if not (before / "jaxrec" / "data").is_dir():
            program = program.replace("jaxrec.data.prepare import prepare", "jaxrec.prepare import prepare_directory")
            program = program.replace("prepare(Path(sys.argv[1]), out=", "prepare_directory(Path(sys.argv[1]), None, ")
        ways.append((f"jaxrec, {commit(before)}", sys.executable, program, log))
    if peer_python is not None:
        ways.append(("rectools", peer_python, RECTOOLS, log))
        ways.append(("rectools, split", peer_python, RECTOOLS_SPLIT, log))
    if recbole_python is not None:
        ways.append(("recbole", recbole_python, RECBOLE, write_inter(log, work / "log")))
    if large is not None:
        ways.append((f"{ours}: large", sys.executable, JAXREC, large))
    rows: dict[str, int] = {}
    measured: dict[str, list[Usage]] = {name: [] for name, *_ in ways}
    for _ in range(runs):
        for name, python, program, source in ways:
            out = work / "out"
            printed, usage = child.run([python, "-c", program, source, out], stdout=subprocess.PIPE)
            rows[name] = int(printed)
            measured[name].append(usage)
            click.echo(f"{name}: {usage.seconds:.1f} s, {usage.peak_gb:.2f} GB", err=True)
            if name == ours:
                opened, _ = child.run([sys.executable, "-c", OPEN, out], stdout=subprocess.PIPE)
            shutil.rmtree(out, ignore_errors=True)
    page.write(
        [
            "Data: " + ", ".join(f"{path.name} with {count:,} rows" for path, count in counts.items()) + ".",
            "",
            f"Medians of {runs} runs (lowest to highest), all ways in turn; each run is a process of its own.",
            "",
            "| way | events | seconds | CPU seconds | peak GB |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {rows[name]:,} | "
                + " | ".join(
                    spread(list(values), digits)
                    for values, digits in zip(zip(*runs_of, strict=True), (1, 1, 2), strict=True)
                )
                + " |"
                for name, runs_of in measured.items()
            ),
            "",
            f"Opening the prepared data of the first way takes {1000 * float(opened):.0f} ms.",
        ]
    )


if __name__ == "__main__":
    main()
