"""An HTTP/2 client that does not do as it should, on a bare socket."""

import socket
import ssl
import struct
from collections.abc import Iterator
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, INITIAL_WINDOW, LARGEST_FRAME = 3, 4, 65_535, 16_384


class RawClient:
    """Frames as in RFC 9113, headers without compression (RFC 7541, 6.2.2); no flow control but in `upload`."""

    def __init__(
        self, address: str, window: int = INITIAL_WINDOW, timeout_s: float = 30.0, tls: ssl.SSLContext | None = None
    ) -> None:
        """`address`: HOST:PORT or unix:PATH. `window`: so many bytes of each answer the server may send."""
        host, _, port = address.rpartition(":")
        if host == "unix":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(timeout_s)
            self._socket.connect(port)
        else:
            self._socket = socket.create_connection((host, int(port)), timeout_s)
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
            self._socket = tls.wrap_socket(self._socket, server_hostname=host)
        self._next_stream = 1
        self._received = b""
        self._room = INITIAL_WINDOW
        self.settings: list[dict[int, int]] = []
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(
        self,
        method: str | bytes,
        message: bytes | None = None,
        metadata: tuple[tuple[str, bytes], ...] = (),
        announced: int | None = None,
        authority: bytes = b"test",
    ) -> int:
        """Begins a call and returns its stream; with `announced` bytes the message is only begun."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        headers: list[tuple[str, bytes]] = [
            (":method", b"POST"),
            (":scheme", b"http"),
            (":path", method.encode() if isinstance(method, str) else method),
            (":authority", authority),
            ("content-type", b"application/grpc"),
            ("te", b"trailers"),
            *metadata,
        ]
        block = b"".join(b"\0" + _literal(key.encode()) + _literal(value) for key, value in headers)
        self._send(HEADERS, END_HEADERS, stream, block)
        if message is not None:
            flags = END_STREAM if announced is None else 0
            size = len(message) if announced is None else announced
            self._send(DATA, flags, stream, b"\0" + struct.pack(">I", size) + message)
        return stream

    def finish(self, stream: int, content: bytes) -> None:
        """The rest of a message that was begun."""
        self._send(DATA, END_STREAM, stream, content)

    def give_room(self, size: int) -> None:
        """So many more bytes the server may send on the connection."""
        self._send(WINDOW_UPDATE, 0, 0, struct.pack(">I", size))

    def upload(self, method: str, size: int) -> int:
        """A call with a message of `size` bytes, all but the last of which are sent as the server has room,
        until it ends the call."""
        stream = self.call(method, b"", announced=size)
        missing, room = size - 1, {0: self._room, stream: INITIAL_WINDOW - 5}
        room[0] -= 5
        frames = self.frames()
        while missing:
            sent = min(missing, LARGEST_FRAME, *room.values())
            if sent > 0:
                self._send(DATA, 0, stream, bytes(sent))
                missing -= sent
                room = {about: left - sent for about, left in room.items()}
                continue
            kind, _, about, content = next(frames)
            if kind == WINDOW_UPDATE and about in room:
                room[about] += int.from_bytes(content, "big")
            if (kind, about) == (RST_STREAM, stream):
                break
        self._room = room[0]
        return stream

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, flags, stream and content of what comes, until the connection ends; TimeoutError when nothing does."""
        while True:
            header = self._receive(9)
            if len(header) < 9:
                return
            kind, flags, stream = header[3], header[4], int.from_bytes(header[5:9], "big")
            content = self._receive(int.from_bytes(header[:3], "big"))
            if kind == SETTINGS and not flags & ACK:
                self.settings.append(dict(struct.iter_unpack(">HI", content)))
                self._send(SETTINGS, ACK, 0, b"")
            elif kind == PING and not flags & ACK:
                self._send(PING, ACK, 0, content)
            yield kind, flags, stream, content

    def _send(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        self._socket.sendall(
            struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content
        )

    def _receive(self, size: int) -> bytes:
        while len(self._received) < size and (more := self._socket.recv(65_536)):
            self._received += more
        content, self._received = self._received[:size], self._received[size:]
        return content


def _literal(text: bytes) -> bytes:
    """As RFC 7541, 5.1 and 5.2: the length in seven bits and then in groups of them."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    length, rest = b"\x7f", len(text) - 127
    while rest >= 128:
        length, rest = length + bytes([rest % 128 + 128]), rest // 128
    return length + bytes([rest]) + text
