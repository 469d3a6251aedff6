"""Real database servers for the tests: on a free port, with their data in a temporary folder."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis

from tests.ports import reserved_port

DEADLINE_S = 30.0


class NotInstalled(Exception):
    """A database server is not on this machine."""


class DatabaseServer:
    """A server process that can be stopped and started again on the same port and data."""

    def __init__(self, command: Sequence[str], location: str, user: str | None, is_up: Callable[[], None]) -> None:
        self._command = command
        self._user = user
        self._is_up = is_up
        self._process: subprocess.Popen[bytes] | None = None
        self.location = location

    def start(self) -> None:
        """Returns when the server answers. It is started again where it ends: PostgreSQL does so while processes of one
        that was killed are left."""

        def is_up() -> None:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=self._user
                )
            self._is_up()

        wait_until(is_up)

    def stop(self, *, kill: bool = False) -> None:
        """Ends the server, at once or with its own clean shutdown."""
        if self._process is not None:
            if kill:
                self._process.kill()
            else:
                # PostgreSQL's fast shutdown: SIGTERM would wait for the clients to leave.
                self._process.send_signal(signal.SIGINT)
            self._process.wait(DEADLINE_S)
            self._process = None


def wait_until(attempt: Callable[[], None], alive: Callable[[], bool] = lambda: True) -> None:
    """Repeats `attempt` until it raises nothing; after the deadline, raises what it raised."""
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            attempt()
            return
        except Exception:
            if time.monotonic() > end or not alive():
                raise
            time.sleep(0.02)


@contextmanager
def postgres_server() -> Iterator[DatabaseServer]:
    """A PostgreSQL server with an empty database; raises NotInstalled."""
    initdb, postgres = _program("initdb"), _program("postgres")
    # PostgreSQL refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="jaxrec-postgres-") as folder, reserved_port() as port:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        data = str(Path(folder) / "data")
        subprocess.run(
            [initdb, "-D", data, "-U", "jaxrec", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"],
            check=True,
            capture_output=True,
            user=user,
            cwd=folder,
        )
        # Local sockets only in the folder, so that two servers don't meet in /tmp.
        command = [postgres, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        location = f"postgresql://jaxrec@127.0.0.1:{port}/postgres"
        server = DatabaseServer(command, location, user, lambda: psycopg.connect(location).close())
        try:
            server.start()
            yield server
        finally:
            server.stop(kill=True)


@contextmanager
def redis_server(*options: str, durable: bool = True) -> Iterator[DatabaseServer]:
    """A Redis server, by default one that logs each command before it answers; raises NotInstalled."""
    program = _program("redis-server")
    with tempfile.TemporaryDirectory(prefix="jaxrec-redis-") as folder, reserved_port() as port:
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always"] if durable else []
        location = f"redis://127.0.0.1:{port}/0"

        def is_up() -> None:
            with redis.Redis.from_url(location) as client:
                client.ping()

        server = DatabaseServer([*command, *options], location, None, is_up)
        try:
            server.start()
            yield server
        finally:
            server.stop(kill=True)


def _program(name: str) -> str:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(debian[-1]) if debian else None)
    if found is None:
        raise NotInstalled(f"{name} is not installed (Debian packages postgresql and redis-server)")
    return found
