"""Tasks of `jaxrec recommend` that wait for a test.

As a program: the command, whose part FIRST is never answered, and which prints a line for each part that is.

    python -m tests.runs.batch.held_back FIRST FIFO recommend ...
"""

import concurrent.futures
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from jaxrec.cli.main import main
from jaxrec.runs.batch import cluster, local
from jaxrec.runs.batch.scoring import Scoring

FIRST, FIFO = "JAXREC_TEST_FIRST", "JAXREC_TEST_FIFO"
answer_part, answer_shard = local._answer_part, cluster._answer_shard


def answer_others(scoring: Scoring, folder: Path, part: local.Part) -> int:
    """Answers any part but FIRST, for which it waits until somebody opens FIFO."""
    if part.first == int(os.environ[FIRST]):
        Path(os.environ[FIFO]).read_bytes()
    return answer_part(scoring, folder, part)


def tell(futures: Iterable[Future[int]]) -> Iterator[Future[int]]:
    """Prints a line for each that is finished."""
    for future in concurrent.futures.as_completed(futures):
        print("finished", flush=True)
        yield future


def answer_in_turn(scoring: Scoring, folder: Path, out: Path) -> None:
    """Answers the first shard when the second task has begun, and the second shard when FIFO `go` is opened."""
    begun, go = (out.parents[2] / name for name in ("begun", "go"))
    if out.name == "part-00000.parquet":
        begun.read_bytes()
    elif out.name == "part-00001.parquet":
        begun.write_bytes(b"")
        go.read_bytes()
    answer_shard(scoring, folder, out)


def die(scoring: Scoring, folder: Path, out: Path) -> None:
    """Ends the worker."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.environ[FIRST], os.environ[FIFO], *arguments = sys.argv[1:]
    local._answer_part, local.as_completed = answer_others, tell
    main(arguments)
