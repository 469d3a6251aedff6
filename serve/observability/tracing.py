"""Spans of OpenTelemetry, if its library is installed and was set up; without, nothing is loaded and nothing costs.

The usual way to set it up: `opentelemetry-instrument python -m serve run ...`, with the exporter in the environment.
"""

import sys
from collections.abc import Callable
from typing import Any

Handle = Callable[[bytes, Any], Any]


class Tracer:
    """Makes a span for every call, as a child of the client's where the call brings one."""

    def __init__(self, provider: Any = None) -> None:
        """With the provider of the process, or the one given; raises ImportError without the library."""
        from opentelemetry import propagate, trace

        self._propagate = propagate
        self._kind = trace.SpanKind.SERVER
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._tracer = trace.get_tracer("jaxrec.serve", tracer_provider=provider)

    def around(self, method: str, handle: Handle) -> Handle:
        """The handler of a method, with a span for each call; how the call ended is read from gRPC's context."""
        service, _, name = method[1:].partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}

        def traced(message: bytes, context: Any) -> Any:
            metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
            with self._tracer.start_as_current_span(
                method[1:],
                context=self._propagate.extract(metadata),
                kind=self._kind,
                attributes=attributes,
                # The exception is the answer's status.
                record_exception=False,
                set_status_on_exception=False,
            ) as span:
                try:
                    return handle(message, context)
                finally:
                    if context.code() is not None:
                        span.set_attribute("rpc.grpc.status", context.code().name)
                        span.set_status(self._error)

        return traced


def tracer_of_the_process() -> Tracer | None:
    """A tracer if this process set up OpenTelemetry before, else None."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    # Without a set-up the provider is a stand-in that records nothing.
    real = "opentelemetry.sdk.trace" in sys.modules and hasattr(trace.get_tracer_provider(), "add_span_processor")
    return Tracer() if real else None
