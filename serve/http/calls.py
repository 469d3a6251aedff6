"""Calls of the gRPC server of this process, over a Unix socket that nobody else can reach.

A caller of the HTTP door is one of the gRPC server: tokens, rights, limits, metrics, traces and errors are those of its
interceptors. What identifies the caller and the call is passed on as it came.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from serve.api.errors import Status, status_of
from serve.http.limits import MAX_CALLS, MAX_CHECKS
from serve.serving.batching import RETRY_AFTER_S
from serve.serving.errors import QueueFull

Metadata = tuple[tuple[str, str | bytes], ...]

# A proxy in the environment is for other machines. The length of answers is limited where they are made.
OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1))


class Failed(Exception):
    """A call ended with a status other than OK. `http` replaces the HTTP status that belongs to it."""

    def __init__(self, status: Status, http: int | None = None) -> None:
        super().__init__(status.message)
        self.status = status
        self.http = http


class Refused(Failed):
    """A request that was not handed on to the gRPC server."""


class PrivateSocket:
    """The address of a Unix socket in a folder that only this user can enter; the folder goes with it."""

    def __init__(self) -> None:
        # mkdtemp makes it with mode 0700.
        self._folder = tempfile.TemporaryDirectory(prefix="jaxrec-")
        self.address = f"unix:{Path(self._folder.name) / 'grpc'}"

    def close(self) -> None:
        """Removes the folder; what is connected stays connected."""
        self._folder.cleanup()


class Calls:
    """Unary calls of a gRPC server, for an event loop.

    It uses the channel with callbacks and not that of `grpc.aio`, whose events all loops of a process share.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._methods: dict[str, grpc.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        # Checks queue among themselves, so that a flood of them takes no room from calls.
        self._checks = asyncio.Semaphore(MAX_CHECKS)
        self.under_way = 0
        """Calls other than checks."""

    def close(self) -> None:
        """Cancels what is under way."""
        self._channel.close()

    async def call(
        self,
        method: str,
        message: bytes,
        metadata: Metadata = (),
        timeout_s: float | None = None,
        is_check: bool = False,
    ) -> tuple[bytes, Metadata]:
        """One call; cancelling it cancels the call.

        Args:
            method: `/package.Service/Method`.
            message: The request, encoded.
            metadata: Sent along.
            timeout_s: The deadline, from now on; None: none.
            is_check: Whether it is a health check, which is never refused for want of room.

        Returns:
            The response, encoded, and the trailing metadata.

        Raises:
            Failed: The call ended with another status than OK, or too many are under way.
        """
        if is_check:
            async with self._checks:
                return await self._sent(method, message, metadata, timeout_s)
        if self.under_way >= MAX_CALLS:
            raise Refused(full(MAX_CALLS))
        self.under_way += 1
        try:
            return await self._sent(method, message, metadata, timeout_s)
        finally:
            self.under_way -= 1

    async def _sent(
        self, method: str, message: bytes, metadata: Metadata, timeout_s: float | None
    ) -> tuple[bytes, Metadata]:
        if method not in self._methods:
            self._methods[method] = self._channel.unary_unary(method)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def wake(_: Any) -> None:
            # The loop may have ended before the call that it cancelled.
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        call: Any = self._methods[method].future(message, timeout=timeout_s, metadata=metadata)
        try:
            call.add_done_callback(wake)
            await ended.wait()
        finally:
            call.cancel()
        trailing = tuple(call.trailing_metadata() or ())
        if call.code() is not grpc.StatusCode.OK:
            raise Failed(Status(call.code(), call.details() or "", trailing))
        return call.result(), trailing


def full(most: int) -> Status:
    """How a call ends that there is no room for."""
    return status_of(QueueFull(most, RETRY_AFTER_S))


def passed_on(headers: Sequence[tuple[bytes, bytes]], names: frozenset[bytes]) -> Metadata:
    """The metadata for some headers of a request, by their lower-case names; what gRPC cannot send is left out."""
    return tuple(
        (name.decode("ascii"), value.decode("ascii"))
        for name, value in headers
        if name in names and value.isascii() and value.decode("ascii").isprintable()
    )
