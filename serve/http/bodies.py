"""Bodies of requests: limited before they are read, in bytes, in seconds, and all of them together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from starlette.requests import Request

from serve.api.errors import Status, status_of
from serve.http.calls import Refused
from serve.http.limits import MAX_BODIES_BYTES
from serve.serving.batching import RETRY_AFTER_S
from serve.serving.errors import QueueFull


class BodiesFull(QueueFull):
    """The bodies of all requests together are too long; the client may try again."""

    def __init__(self) -> None:
        Exception.__init__(self, f"the requests that are being read have {MAX_BODIES_BYTES} bytes, try again")
        self.retry_after_s = RETRY_AFTER_S


class Bodies:
    """Reads bodies, and knows how many bytes of them are held."""

    def __init__(self) -> None:
        self.held = 0

    @asynccontextmanager
    async def read(self, request: Request, most: int, within_s: float) -> AsyncIterator[bytes]:
        """The body of a request, which is held until the block ends.

        Args:
            request: Nothing of its body is read yet.
            most: Its longest body, in bytes.
            within_s: Seconds in which the whole body has to come.

        Raises:
            Refused: It is too long, comes too slowly, or there is no room for it.
            starlette.requests.ClientDisconnect: The client went away.
        """
        # The HTTP library lets only a number through.
        if int(request.headers.get("content-length", "0")) > most:
            raise _too_long(most)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(within_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    self.held += len(chunk)
                    if size > most:
                        raise _too_long(most)
                    if self.held > MAX_BODIES_BYTES:
                        raise Refused(status_of(BodiesFull()))
                    chunks.append(chunk)
        except TimeoutError as error:
            self.held -= size
            text = f"expected the whole body within {within_s:g} s"
            raise Refused(Status(grpc.StatusCode.DEADLINE_EXCEEDED, text), 408) from error
        except BaseException:
            self.held -= size
            raise
        try:
            yield b"".join(chunks)
        finally:
            self.held -= size


def _too_long(most: int) -> Refused:
    text = f"expected a body of at most {most} bytes, came a longer one"
    return Refused(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text), 413)
