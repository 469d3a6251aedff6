"""The first of several processes works alone: the others wait for any time, may stop it, and hear of its failure."""

import signal

from tests.ports import reserved_port
from tests.training.test_train_sharding import DEADLINE_SECONDS, start_python

ONE_OF_TWO = """
import os, signal, sys, time
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_timeout_seconds=3"
from jaxrec.errors import DataError, ProcessLost, TrainingError, TrainingStopped
from jaxrec.training.processes import any_process, in_first, join, leave, leave_at_once, noticing_loss

task, port, index = sys.argv[1], *map(int, sys.argv[2:])
join(f"127.0.0.1:{port}", 2, index)
deadline = time.monotonic() + 60


def be_long(asked):
    end = time.monotonic() + 8  # longer than a collective may take
    while time.monotonic() < end:
        sum(range(10000))


def until_asked(asked):
    while not asked():
        assert time.monotonic() < deadline
        sum(range(10000))
    raise TrainingStopped("stopped on request")


def fail_with(error):
    def work(asked):
        raise error

    return work


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


try:
    with noticing_loss():
        any_process(True)  # the first collective takes the longest
        if task == "long":
            in_first(be_long)
            print("waited")
        elif task == "stop":
            in_first(until_asked, lambda: index == 1)
        elif task == "fail":
            errors = DataError("a bad row"), TrainingError("a bad loss"), OSError(28, "No space left"), KeyError(7)
            for error in errors:
                try:
                    in_first(fail_with(error))
                except Exception as came:
                    print(f"{type(came).__name__}: {came}")
        elif task == "kill":
            in_first(until_asked, lambda: index == 1 and killed())
except TrainingStopped as stopped:
    print(stopped)
except ProcessLost as lost:
    print("the other process is gone:", lost)
    leave_at_once()
leave()
"""


def two_processes(task: str) -> tuple[list[int], list[list[str]]]:
    """Exit statuses and lines of output."""
    with reserved_port() as port:
        processes = [start_python(ONE_OF_TWO, 1, task, port, index) for index in (0, 1)]
        outputs = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
    return [process.returncode for process in processes], [output.splitlines() for output in outputs]


def test_the_others_wait_longer_than_a_collective_may_take() -> None:
    statuses, lines = two_processes("long")
    assert statuses == [0, 0], lines
    assert all("waited" in each for each in lines), lines


def test_a_stop_that_another_process_is_asked_for_is_heard_in_the_first() -> None:
    statuses, lines = two_processes("stop")
    assert statuses == [0, 0], lines
    assert "stopped on request" in lines[0], lines
    assert "stopped on request (in the first process)" in lines[1], lines


def test_all_processes_hear_why_the_first_one_failed() -> None:
    statuses, lines = two_processes("fail")
    assert statuses == [0, 0], lines
    own = ["DataError: a bad row", "TrainingError: a bad loss", "OSError: [Errno 28] No space left", "KeyError: 7"]
    assert [line for line in lines[0] if line in own] == own, lines
    of_first = "(in the first process)"
    heard = [
        f"DataError: a bad row {of_first}",
        f"TrainingError: a bad loss {of_first}",
        f"TrainingError: OSError: [Errno 28] No space left {of_first}",
        f"TrainingError: KeyError: 7 {of_first}",
    ]
    assert [line for line in lines[1] if of_first in line] == heard, lines


def test_the_first_one_stops_where_another_process_is_lost() -> None:
    statuses, lines = two_processes("kill")
    assert statuses == [1, -signal.SIGKILL], lines
    assert any(line.startswith("the other process is gone:") for line in lines[0]), lines
