"""Measures the preparation: time and peak memory of a child process per way, on one log, in one run.

    python bench/generate_log.py --rows 25000000 --format csv --out r25.csv
    python bench/generate_log.py --rows 250000000 --format parquet --out r250
    python -m venv peer && peer/bin/pip install rectools
    python -m venv recbole && recbole/bin/pip install recbole==1.2.1 "numpy<2" "pandas<2.2"
    python bench/prepare.py r25.csv --large r250 --peer-python peer/bin/python --recbole-python recbole/bin/python

Ways: `jaxrec` checks every row, filters, sorts, splits, writes and hashes; `pandas` does the same but for checks,
splits and hashes, as one would write it; `rectools` is Dataset.construct, which maps ids and keeps the events, unsorted
and unfiltered, in memory: less work than the others do; with `split` it also cuts validation and test (LastNSplitter),
which sorts. `recbole` is its Dataset with the same filter and split as ours, in memory, from its own file format, whose
making is not counted. Reading the file is part of each. `open`: read_prepared alone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click

JAXREC = """
import sys
from pathlib import Path
from jaxrec.data.prepare import prepare
data = prepare(Path(sys.argv[1]), out=Path(sys.argv[2]))
print(data.log.events.event_count)
"""
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


def measure(python: str, program: str, *arguments: Path) -> tuple[str, dict[str, float]]:
    """Runs a program in a process of its own: what it printed, and its figures."""
    command = [python, "-c", program, *map(str, arguments)]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise click.ClickException(f"a measured process ended with status {child.returncode}")
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss / 2**20,
    }
    return printed.strip(), figures


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
@click.option("--large", type=click.Path(exists=True, path_type=Path), help="A larger log, for jaxrec alone.")
@click.option("--peer-python", type=click.Path(exists=True), help="A Python that has rectools.")
@click.option("--recbole-python", type=click.Path(exists=True), help="A Python that has recbole.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/bench-prepare"))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    log: Path,
    large: Path | None,
    peer_python: str | None,
    recbole_python: str | None,
    scratch: Path,
    json_file: Path | None,
) -> None:
    """Prints one line per way: rows, seconds, rows per second, peak memory."""
    scratch.mkdir(parents=True)
    ways = [("jaxrec", sys.executable, JAXREC, log), ("pandas", sys.executable, PANDAS, log)]
    if peer_python is not None:
        ways.append(("rectools", peer_python, RECTOOLS, log))
        ways.append(("rectools, split", peer_python, RECTOOLS_SPLIT, log))
    if recbole_python is not None:
        ways.append(("recbole", recbole_python, RECBOLE, write_inter(log, scratch / "log")))
    if large is not None:
        ways.append(("jaxrec, large", sys.executable, JAXREC, large))
    results = {}
    for name, python, program, source in ways:
        printed, figures = measure(python, program, source, scratch / name.replace(", ", "-"))
        rows = int(printed)
        results[name] = {"rows": rows, **figures}
        click.echo(
            f"{name:15} {rows:>12,} rows {figures['seconds']:8.1f} s ({figures['cpu_seconds']:.1f} s of CPU) "
            f"{rows / figures['seconds']:>10,.0f} rows/s {figures['peak_gb']:6.2f} GB"
        )
    opened, _ = measure(sys.executable, OPEN, scratch / "jaxrec")
    click.echo(f"open: {1000 * float(opened):.0f} ms")
    results["open"] = {"seconds": float(opened)}
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
