"""Keeps a port open: gRPC's asyncio server fails for good at a path that is not UTF-8, and another takes its place."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import grpc

from serve.addresses import AddressError

logger = logging.getLogger(__name__)

# For so long the calls of the failed server may still be answered, unless the next one fails too.
GRACE_S = 10.0
# For so long its addresses are waited for.
LONGEST_REOPENING_S = 10.0
LOOK_S = 0.05

Open = Callable[[int | None], tuple[grpc.aio.Server, int]]


class KeptServer:
    """A gRPC server that is replaced by a new one on the same addresses when it fails. All in the event loop."""

    def __init__(
        self,
        open_server: Open,
        sockets: Sequence[str] = (),
        on_restart: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Binds the addresses.

        Args:
            open_server: Binds a new server, to a port that it had before or to None; returns the server and its port.
            sockets: The paths of the Unix sockets among its addresses.
            on_restart: Called when a server failed and the next one takes its place.
            on_failure: Called when none can take its place.
        """
        self._open = open_server
        self._sockets = sockets
        self._on_restart = on_restart
        self._on_failure = on_failure
        self._server, self.port = open_server(None)
        self._keeper: asyncio.Task[None] | None = None
        self._failed: list[tuple[asyncio.Event, asyncio.Task[None]]] = []

    async def start(self) -> None:
        """Begins to take calls."""
        await self._server.start()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Ends it, with the calls that are under way."""
        # More than once: `asyncio.wait_for` within gRPC can lose a cancellation.
        while self._keeper is not None and not self._keeper.done():
            self._keeper.cancel()
            await asyncio.wait([self._keeper], timeout=LOOK_S)
        await self._end_failed()
        await self._server.stop(None)

    async def _keep(self) -> None:
        try:
            while True:
                try:
                    # Without a timeout gRPC tells of the failure only once the calls under way have ended.
                    if not await self._server.wait_for_termination(LOOK_S):
                        return
                    continue
                except Exception:
                    logger.exception("gRPC's server failed, another takes its place")
                self._on_restart()
                await self._replace()
        except Exception:
            logger.critical("the server failed, and no other could take its place", exc_info=True)
            self._on_failure()

    async def _replace(self) -> None:
        """Raises AddressError."""
        failed = self._server
        await self._end_failed()
        # gRPC has begun to close what it listens on.
        cut = asyncio.Event()
        self._failed.append((cut, asyncio.create_task(_end(failed, cut))))
        until = time.monotonic() + LONGEST_REOPENING_S
        # It deletes the files of its sockets, which must not be those of the new server.
        while any(Path(path).exists() for path in self._sockets) and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)
        while True:
            try:
                self._server, _ = self._open(self.port)
                break
            except AddressError:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(LOOK_S)
        await self._server.start()

    async def _end_failed(self) -> None:
        for cut, ending in self._failed:
            cut.set()
            # `stop` cancels the keeper while that waits here, and waits here itself.
            await asyncio.shield(ending)
        self._failed.clear()


async def _end(failed: grpc.aio.Server, cut: asyncio.Event) -> None:
    """Ends a failed server after its grace, or when that is cut short.

    Only here: gRPC 1.85 crashes if a server is stopped while an earlier `stop` waits.
    """
    with suppress(TimeoutError):
        await asyncio.wait_for(cut.wait(), GRACE_S)
    await failed.stop(None)
