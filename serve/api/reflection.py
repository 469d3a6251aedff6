"""Server reflection whose threads no client can keep: a stream that is left open holds one."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from grpc_reflection.v1alpha import reflection, reflection_pb2

MOST_OPEN = 3
"""Fewer than the threads for streams, so that the next one finds a free one."""


class ReflectionServicer(reflection.ReflectionServicer):
    """grpc's; with `MOST_OPEN` streams open, the next one ends the oldest."""

    def __init__(self, services: tuple[str, ...]) -> None:
        super().__init__(services)
        self._open: deque[Any] = deque()
        self._lock = threading.Lock()

    def ServerReflectionInfo(
        self, request_iterator: Iterable[reflection_pb2.ServerReflectionRequest], context: Any
    ) -> Iterator[reflection_pb2.ServerReflectionResponse]:
        with self._lock:
            oldest = self._open.popleft() if len(self._open) >= MOST_OPEN else None
            self._open.append(context)
        if oldest is not None:
            oldest.cancel()
        try:
            yield from super().ServerReflectionInfo(request_iterator, context)
        finally:
            with self._lock:
                if context in self._open:
                    self._open.remove(context)
