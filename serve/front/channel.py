"""Objects between a supervisor and its server processes.

Both ends belong to the same server and the same user, so objects are sent as pickles. The supervisor reads only what
light modules define: it loads no model.
"""

import pickle
import socket
import struct
import threading
from contextlib import suppress
from typing import Any


class Channel:
    """Objects over a socket, each with the word that says what it is."""

    def __init__(self, end: socket.socket, send_timeout_s: float = 0.0) -> None:
        """`send_timeout_s`: how long the other process may take to read what is sent; 0: for ever."""
        self._socket = end
        whole, part = divmod(send_timeout_s, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(1e6 * part)))
        self._file = end.makefile("rb")
        self._sending = threading.Lock()

    def send(self, kind: str, value: Any = None) -> bool:
        """To a process that is gone nothing is sent; its end is seen by `receive`. False: it did not read in time. Part
        of this may have been sent then, so that nothing more can be."""
        content = pickle.dumps((kind, value))
        try:
            with self._sending:
                self._socket.sendall(content)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

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
