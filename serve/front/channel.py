"""Objects between a supervisor and its server processes.

Both ends belong to the same server and the same user, so objects are sent as pickles. The supervisor reads only what
light modules define: it loads no model.
"""

import pickle
import socket
import threading
from contextlib import suppress
from typing import Any


class Channel:
    """Objects over a socket, each with the word that says what it is."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._file = end.makefile("rb")
        self._sending = threading.Lock()

    def send(self, kind: str, value: Any = None) -> None:
        """To a process that is gone nothing is sent; its end is seen by `receive`."""
        content = pickle.dumps((kind, value))
        with self._sending, suppress(OSError):
            self._socket.sendall(content)

    def receive(self) -> tuple[str, Any] | None:
        """The next word and object; None: the other process is gone."""
        try:
            kind, value = pickle.load(self._file)
        except (EOFError, OSError, pickle.UnpicklingError):
            return None
        return kind, value

    def end(self) -> None:
        """Nothing is sent any more, which the other process sees as the end of this one."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
