"""Spans of OpenTelemetry, if its library is installed and was set up; without, nothing is loaded and nothing costs.

The usual way to set it up: `opentelemetry-instrument python -m serve run ...`, with the exporter in the environment.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from grpc import StatusCode


class Tracer:
    """Makes a span for every call, as a child of the client's where the call brings one."""

    def __init__(self, provider: Any = None) -> None:
        """With the provider of the process, or the one given; raises ImportError without the library."""
        from opentelemetry import propagate, trace

        self._propagate = propagate
        self._kind = trace.SpanKind.SERVER
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._tracer = trace.get_tracer("jaxrec.serve", tracer_provider=provider)

    @contextmanager
    def span(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Iterator[Callable[[StatusCode], None]]:
        """A span around a call of `/package.Service/Method` with such metadata; gives what takes the call's status."""
        with self._tracer.start_as_current_span(**self._options(method, metadata)) as span:
            yield lambda code: self._note(span, code)

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Callable[[StatusCode], None]:
        """As `span`, for a call that several threads answer: what is called ends the span with the call's status."""
        span = self._tracer.start_span(**self._options(method, metadata))

        def end(code: StatusCode) -> None:
            self._note(span, code)
            span.end()

        return end

    def _options(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
        service, _, name = method[1:].partition("/")
        return {
            "name": method[1:],
            "context": self._propagate.extract({key: value for key, value in metadata if isinstance(value, str)}),
            "kind": self._kind,
            "attributes": {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
            # The exception is the answer's status.
            "record_exception": False,
            "set_status_on_exception": False,
        }

    def _note(self, span: Any, code: StatusCode) -> None:
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not StatusCode.OK:
            span.set_status(self._error)


def tracer_of_the_process() -> Tracer | None:
    """A tracer if this process set up OpenTelemetry before, else None."""
    return None if _provider() is None else Tracer()


def export_spans() -> None:
    """Exports the spans that are left, for the end of the process; from then on there are no more."""
    provider = _provider()
    if provider is not None:
        provider.shutdown()


def _provider() -> Any | None:
    """The provider of the process; None: it has none."""
    # First, since to ask for a provider may set one up, as OTEL_PYTHON_TRACER_PROVIDER says.
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    provider = sys.modules["opentelemetry.trace"].get_tracer_provider()
    # Without a set-up the provider is a stand-in that records nothing.
    return provider if hasattr(provider, "add_span_processor") else None
