"""Several server processes on one port: starts them, starts those again that end, and ends them together.

The supervisor holds the ports without listening on them, so that nobody else gets them while no process listens. It
loads no model and answers no call. Each process ends when its supervisor does, however that ends.
"""

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric

from serve.addresses import AddressError, host_and_port
from serve.front.channel import Channel
from serve.observability.merged import Merged, publish
from serve.settings import Settings

logger = logging.getLogger(__name__)

# A signal that comes just before a wait does not end it, since Python runs its handler between two waits only.
LOOK_S = 0.5
# From the end of a process to the start of the next one. It doubles each time, up to the longest, and is the first
# again once a process has answered for STEADY_S.
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0
# Beyond the time for calls under way, for a process to end by itself.
END_S = 10.0
# For a process to read what it is sent: it has a thread for that alone.
READ_S = 5.0


class StartError(Exception):
    """No process can serve; the message says why."""


class Process:
    """One server process, from its start to its end. What it says arrives by `tell`, from a thread of its own."""

    def __init__(
        self,
        settings: Settings,
        is_late: bool,
        division: bytes | None,
        tell: "Callable[[tuple[Process | None, str, Any]], None]",
    ) -> None:
        """Starts it; raises OSError or RuntimeError if the system has no room for it.

        Args:
            settings: Its own settings.
            is_late: Whether others answer already.
            division: How the others divide users; None: nothing changed since the start.
            tell: Gets this process, a word and what belongs to it; the last word is `ended`, with the exit status.
        """
        self.is_loaded = False
        self.serves_since: float | None = None
        self.message = ""
        self.metrics: Sequence[Metric] = ()
        self._asking = threading.Lock()
        self._has_ended = False
        # Set while no answer is outstanding.
        self._answered = threading.Event()
        self._answered.set()
        with ExitStack() as stack:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            number = theirs.fileno()
            # A group of its own: Ctrl-C is for the supervisor, which tells all of them.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.cli.worker", str(number)], pass_fds=[number], process_group=0
            )
            theirs.close()
            self._channel = Channel(ours, READ_S)
            self.send("settings", (settings, is_late, division))
            threading.Thread(target=self._read, args=[tell], name="process", daemon=True).start()
            # From now on the channel has it; without a channel the process ends.
            stack.pop_all()

    def send(self, kind: str, value: Any = None) -> None:
        """Kills it if it does not read."""
        if not self._channel.send(kind, value):
            logger.error("a server process does not read what it is told, and is killed")
            self._process.kill()

    def ask_for_metrics(self) -> None:
        """They are awaited by `wait_for_metrics`. Asks nothing new while an answer is outstanding."""
        with self._asking:
            if self._has_ended or not self._answered.is_set():
                return
            self._answered.clear()
        self.send("metrics")

    def wait_for_metrics(self, until: float) -> Sequence[Metric]:
        """Those that it sent until a time by `time.monotonic()`, or earlier ones."""
        self._answered.wait(max(0.0, until - time.monotonic()))
        return self.metrics

    def end(self) -> None:
        """Lets it finish the calls under way, as the end of the supervisor would."""
        self._channel.end()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within so many seconds."""
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self, tell: "Callable[[tuple[Process | None, str, Any]], None]") -> None:
        while (message := self._channel.receive()) is not None:
            kind, value = message
            if kind == "metrics":
                self.metrics = value
                self._answered.set()
            else:
                tell((self, kind, value))
        status = self._process.wait()
        with self._asking:
            self._has_ended = True
        self._answered.set()
        tell((self, "ended", status))


class Supervisor:
    """Runs as many servers as the settings say."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        """`say` gets the line of a server that is ready, once all are."""
        self._settings = settings
        self._say = say
        self._events: SimpleQueue[tuple[Process | None, str, Any]] = SimpleQueue()
        self._processes: list[Process] = []
        self._due: list[float] = []
        """When processes are to be started, by `time.monotonic()`."""
        self._pause_s = FIRST_PAUSE_S
        self._is_ready = False
        self._division: bytes | None = None
        self._is_automatic = True
        """Whether each process follows the model directory by itself."""
        self._registry = CollectorRegistry()
        self._merged = Merged()
        self._registry.register(self._merged)
        answering = Gauge("processes", "Server processes that answer.", namespace="jaxrec", registry=self._registry)
        answering.set_function(lambda: sum(one.serves_since is not None for one in list(self._processes)))
        self._restarts = Counter(
            "process_restarts_total",
            "Server processes that ended and were replaced.",
            namespace="jaxrec",
            registry=self._registry,
        )

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT; the exit status.

        Raises AddressError, SecurityError, and StartError when no process can serve.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._events.put((None, "stop", None)))
        settings = self._settings
        with ExitStack() as stack:

            def hold(address: str) -> str:
                holder = stack.enter_context(held(address, settings.shared_port))
                return f"{address.rpartition(':')[0]}:{holder.getsockname()[1]}"

            address = hold(settings.address)
            http = None if settings.http is None else hold(settings.http)
            if settings.metrics is not None:
                exposed = settings.allow_insecure or settings.allow_insecure_metrics
                stack.callback(publish(self._registry, settings.metrics, exposed))
            self._settings = replace(settings, address=address, http=http, metrics=None, shared_port=True)
            try:
                for _ in range(settings.processes):
                    self._start()
                while self._handle(*self._next()):
                    pass
            finally:
                ended = self._end()
        return 0 if ended else 1

    def _next(self) -> tuple[Process | None, str, Any]:
        while True:
            now = time.monotonic()
            for _ in [due for due in self._due if due <= now]:
                self._start()
            self._due = [due for due in self._due if due > now]
            with suppress(Empty):
                return self._events.get(timeout=min([LOOK_S, *(due - now for due in self._due)]))

    def _handle(self, process: Process | None, kind: str, value: Any) -> bool:
        """What follows from what a process said, or a signal; whether the server goes on."""
        if process is None:
            return False
        if kind == "loaded":
            process.is_loaded = True
            # The first ones answer together: a health check that one answers is true of the others.
            if self._is_ready:
                process.send("go")
            elif self._are_all(lambda one: one.is_loaded):
                for one in self._processes:
                    one.send("go")
        elif kind == "serves":
            process.serves_since = time.monotonic()
            if not self._is_ready and self._are_all(lambda one: one.serves_since is not None):
                self._is_ready = True
                self._say(value)
        elif kind == "failed":
            process.message = value
        elif kind == "division":
            self._divided(*value)
        elif kind == "ended":
            self._ended(process, value)
        return True

    def _divided(self, division: bytes, is_automatic: bool, by_hand: bool) -> None:
        if by_hand:
            self._division, self._is_automatic = division, is_automatic
            # Also to the one that said so: all get all of them in the same order.
            for one in self._processes:
                one.send("division", division)
        elif self._is_automatic:
            # The others find it by themselves; later ones are to know what to roll back to.
            self._division = division

    def _ended(self, process: Process, status: int) -> None:
        """Raises StartError."""
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        self._processes.remove(process)
        self._merged.ended(process, process.metrics)
        if process.serves_since is None and not self._others_serve():
            raise StartError(
                process.message or f"a server process ended with {how} before it answered; its log says why"
            )
        if process.serves_since is not None and time.monotonic() - process.serves_since >= STEADY_S:
            self._pause_s = FIRST_PAUSE_S
        cause = f": {process.message}" if process.message else ""
        logger.error("a server process ended with %s, another starts in %g s%s", how, self._pause_s, cause)
        self._restarts.inc()
        self._start_later()

    def _start_later(self) -> None:
        self._due.append(time.monotonic() + self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _others_serve(self) -> bool:
        """Whether what befalls one process is not the end of the server."""
        return self._is_ready and any(one.serves_since is not None for one in self._processes)

    def _are_all(self, is_so: Callable[[Process], bool]) -> bool:
        return len(self._processes) == self._settings.processes and all(map(is_so, self._processes))

    def _start(self) -> None:
        """Raises StartError."""
        try:
            process = Process(self._settings, self._is_ready, self._division, self._events.put)
        # RuntimeError: no more threads.
        except (OSError, RuntimeError) as error:
            if not self._others_serve():
                raise StartError(f"a server process cannot be started: {error}") from error
            logger.error("a server process cannot be started, it is tried again in %g s: %s", self._pause_s, error)
            self._start_later()
            return
        self._processes.append(process)
        self._merged.started(process)

    def _end(self) -> bool:
        """Ends all processes; whether they ended by themselves."""
        for one in self._processes:
            one.end()
        until = time.monotonic() + self._settings.drain + END_S
        left = [one for one in self._processes if not one.wait(until - time.monotonic())]
        for one in left:
            logger.error("a server process did not end, and is killed")
            one.kill()
        return not left


def held(address: str, is_shared: bool) -> socket.socket:
    """A socket that is bound to HOST:PORT, with port 0 to a free one, and keeps it for those who share it.

    Args:
        address: HOST:PORT.
        is_shared: Whether others may have the port already.

    Raises:
        AddressError: The port is taken, or ports cannot be shared here.
    """
    host, port = host_and_port(address)
    if not hasattr(socket, "SO_REUSEPORT"):
        raise AddressError("expected processes = 1: this system lets no processes share a port")
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if port and not is_shared:
            # Without SO_REUSEPORT it fails where a forgotten server listens that shares its port.
            with socket.socket(family) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(where)
        holder = socket.socket(family)
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # For the time of binding, past connections of an earlier server count for nothing. If it stayed, others
            # who set it could listen here while no process does.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(where)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError:
            holder.close()
            raise
        return holder
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror}") from error
