"""One training run in several operating-system processes (on one host or many), tied together by `jax.distributed`.

Every process runs the same program, reads the events of its own users (`jaxrec.data.shares`), and works on its share of
each batch. The first one writes the logs; all write their parts of a checkpoint, so the run directory is on storage
that all of them see.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrec.errors import DataError, ProcessLost, TrainingError, TrainingStopped
from jaxrec.training.stopping import StopRequested, never

HEARTBEAT_SECONDS = 20  # a process that was silent for so long counts as dead
MOST_REASON = 1000  # bytes of why the first process failed that the others hear of
MEETING_SECONDS = 1  # between two questions of the others how the first process stands
HEARD_AS_SUCH = (DataError, TrainingStopped)  # errors of the first process that the others raise as the same type


def join(coordinator: str, process_count: int, process_index: int) -> None:
    """Makes this process one of `process_count`; the first one listens at `coordinator` (host:port).

    To be called before anything uses a device.
    """
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is handled by `jaxrec.training.stopping`
    jax.config.update("jax_enable_recoverability", True)  # the death of one is an error in the others, not an abort
    jax.distributed.initialize(coordinator, process_count, process_index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def is_first() -> bool:
    """Whether this is the process that writes what only one may write."""
    return jax.process_index() == 0


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag whether some process has set it. All processes have to call this at the same point."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(flag) for flag in multihost_utils.process_allgather(np.asarray(flags)).any(axis=0))


def sum_of_all(values: np.ndarray) -> np.ndarray:
    """The sum of the processes' arrays, in every process to the last bit. All processes have to call this.

    Args:
        values: [any] float64 or int64, of the same shape in all processes.

    Returns:
        The sum, of the same shape and type.
    """
    if jax.process_count() == 1:
        return values
    words = np.ascontiguousarray(values).view(np.uint32)  # JAX would make 32 bits of 64
    return np.asarray(multihost_utils.process_allgather(words)).view(values.dtype).sum(axis=0)


def of_first(values: dict[str, float]) -> dict[str, float]:
    """The first process' values, in every process: decisions that hang on them agree to the last bit."""
    if jax.process_count() == 1:
        return values
    numbers = multihost_utils.broadcast_one_to_all(np.asarray(list(values.values()), np.float64).view(np.uint32))
    return dict(zip(values, np.asarray(numbers).view(np.float64).tolist(), strict=True))


def wait_for_all(point: str) -> None:
    """Returns when every process has come to the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def in_first(work: Callable[[StopRequested], None], stop: StopRequested = never) -> None:
    """Does `work` in the first process, while the others wait for its end. All processes have to call this.

    The others wait in many short collectives, since a long one would time out.

    Args:
        work: It must not involve other processes. It is handed a function that tells whether any process is asked to
            stop, or is lost.
        stop: Whether this process is asked to stop.

    Raises:
        Exception: In the first process, what `work` raised. In the others the DataError or TrainingStopped of the
            first, or a TrainingError for any other exception, with the first MOST_REASON bytes of its text.
    """
    if jax.process_count() == 1:
        return work(stop)
    failure: BaseException | None = None
    if is_first():
        with _meeting_others(stop) as asked:
            try:
                work(asked)
            except BaseException as error:  # also Ctrl-C: the others hear of it
                failure = error
    else:
        while not any_process(stop(), False)[1]:
            pass
    ends = of_first({kind.__name__: isinstance(failure, kind) for kind in (*HEARD_AS_SUCH, BaseException)})
    if not any(ends.values()):
        return None
    known = isinstance(failure, (*HEARD_AS_SUCH, TrainingError))
    reason = _text_of_first(str(failure) if known else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    kind = next((kind for kind in HEARD_AS_SUCH if ends[kind.__name__]), TrainingError)
    raise kind(f"{reason} (in the first process)")


@contextlib.contextmanager
def _meeting_others(stop: StopRequested) -> Iterator[StopRequested]:
    """Meets the others of `in_first` in one collective after another, in a thread, until the block ends.

    Yields what tells whether any process is asked to stop, or is lost. Raises, at the end, the error of a collective.
    """
    ended, others_asked, lost = threading.Event(), threading.Event(), list[Exception]()

    def meet() -> None:
        try:
            while not ended.wait(MEETING_SECONDS):
                if any_process(False, False)[0]:
                    others_asked.set()
            any_process(False, True)
        except Exception as error:
            lost.append(error)
            others_asked.set()

    thread = threading.Thread(target=meet, name="meeting the other processes", daemon=True)
    thread.start()
    try:
        yield lambda: stop() or others_asked.is_set()
    finally:
        ended.set()
        thread.join()
    if lost:
        raise lost[0]


def _text_of_first(text: str) -> str:
    """The first MOST_REASON bytes of the first process' text, in every process."""
    if jax.process_count() == 1:
        return text
    own = np.frombuffer(text.encode()[:MOST_REASON].ljust(MOST_REASON, b"\0"), np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8)
    return sent.tobytes().rstrip(b"\0").decode("utf-8", "ignore")


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns the error of a collective or a barrier whose other side is gone into ProcessLost."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, TimeoutError, ValueError) as error:
        # Gloo's errors have no type of their own: outside of a compiled program they are ValueError.
        of_collective = not isinstance(error, ValueError) or "Gloo" in str(error)
        if jax.process_count() == 1 or not of_collective:
            raise
        raise ProcessLost(str(error).splitlines()[0]) from error


def leave() -> None:
    """Ends what `join` began, when all processes have come here; the first, which the others talk to, goes last."""
    if jax.process_count() == 1:
        return
    wait_for_all("every process is done")
    if is_first():
        with multihost_utils.live_devices(jax.devices()):  # waits for those that are still there
            pass
    jax.distributed.shutdown()


def leave_at_once() -> NoReturn:
    """Ends this process with exit status 1 where another one is gone: an orderly end would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
