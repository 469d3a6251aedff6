"""How the commands that ask a running server reach it, and how they print its answers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc

from serve.cli.options import FILE
from serve.client import Connection, RecommenderClient


class Connecting(NamedTuple):
    """The options about the server."""

    address: str
    tls: bool
    ca: Path | None
    cert: Path | None
    key: Path | None
    token_file: Path | None
    timeout: float


OPTIONS = (
    click.option("--address", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT", help="The server."),
    click.option(
        "--tls", is_flag=True, help="Encrypt, trusting the authorities of the system. Implied by the next three."
    ),
    click.option("--ca", type=FILE, help="Trust these authorities instead, in PEM."),
    click.option("--cert", type=FILE, help="The client's certificate in PEM, for servers that ask for one."),
    click.option("--key", type=FILE, help="Private key of the certificate in PEM."),
    click.option("--token-file", type=FILE, help="File with the token. Without: JAXREC_TOKEN, or none."),
    click.option(
        "--timeout",
        type=click.FloatRange(0.001),
        default=5.0,
        show_default=True,
        metavar="SECONDS",
        help="Deadline of a call.",
    ),
)


def connection_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options; it is called with `connection`, a `Connecting`."""

    @wraps(command)
    def called(*arguments: Any, **options: Any) -> None:
        connection = Connecting(**{name: options.pop(name) for name in Connecting._fields})
        command(*arguments, connection=connection, **options)

    for option in reversed(OPTIONS):
        called = option(called)
    return called


@contextmanager
def connected(asked: Connecting) -> Iterator[RecommenderClient]:
    """A client; raises click.ClickException for what fails within the block."""
    try:
        file = asked.token_file
        token = os.environ.get("JAXREC_TOKEN") if file is None else file.read_text("utf-8").strip()
        connection = Connection(
            *(asked.address, asked.timeout),
            tls=asked.tls,
            ca=asked.ca,
            certificate=asked.cert,
            key=asked.key,
            token=token,
        )
        with RecommenderClient(connection) as client:
            yield client
    except grpc.RpcError as error:
        raise click.ClickException(f"{error.code().name}: {error.details()}") from error
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, each column as wide as its longest text; numbers to the right."""
    printable = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[at]) for row in printable) for at in range(len(header))]
    lines = []
    for row in printable:
        cells = [
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).removeprefix("-").isdecimal()
