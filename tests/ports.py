"""Ports for servers that have to be told their port before they start."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A loopback port that the system gives to nobody else until the block ends.

    A socket that is bound and does not listen keeps it. A server that sets SO_REUSEADDR or SO_REUSEPORT, as nearly all
    do, can still bind it by its number.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
