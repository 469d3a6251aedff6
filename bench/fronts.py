"""A server as it is deployed: by itself, or with its fast front behind nginx."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import click

from tests.ports import reserved_port
from tests.serve.front.proxy import MISSING, Sockets, running_proxy
from tests.serve.process import ServerProcess, running_server

fast_option = click.option("--fast", is_flag=True, help="With the fast front, behind nginx.")
"""For `deployed`."""


def require_proxy() -> None:
    """Raises click.ClickException where what the fast front needs is not installed."""
    if MISSING:
        raise click.ClickException(f"not installed: {', '.join(MISSING)}")


@contextmanager
def deployed(
    model: Path,
    store: Path | str,
    folder: Path,
    *,
    fast: bool,
    options: Sequence[str] = (),
    stderr: TextIO | None = None,
) -> Iterator[tuple[ServerProcess, str]]:
    """Runs a server on the CPU.

    Args:
        model: The model directory, or a directory of them.
        store: Where the server keeps events.
        folder: For the files of nginx.
        fast: Whether it has the fast front, behind nginx.
        options: Further options of the server.
        stderr: Takes the server's log.

    Yields:
        The server, and where it is to be asked for all methods.

    Raises:
        click.ClickException: What the fast front needs is not installed.
    """
    if fast:
        require_proxy()
    fronts = ("--fast", "127.0.0.1:0") if fast else ()
    with running_server(model, store, provider="cpu", options=[*options, *fronts], stderr=stderr) as server:
        if not fast:
            yield server, server.address
            return
        with reserved_port() as port:
            address = f"127.0.0.1:{port}"
            sockets = Sockets(folder, server.address, fast_address(server), address, "reuseport")
            with running_proxy(sockets):
                yield server, address


def fast_address(server: ServerProcess) -> str:
    """Where the fast front of a server listens that has one."""
    return server.line.split(" and fast ", 1)[1].split(" ", 1)[0]
