"""The metrics of several server processes as those of one, and how metrics are published."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Protocol

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.registry import Collector

from serve.addresses import AddressError, check_exposure, host_and_port

logger = logging.getLogger(__name__)

SUMMED = frozenset(
    {
        "jaxrec_rpcs_under_way",
        "jaxrec_dropped_log_entries",
        "process_virtual_memory_bytes",
        "process_resident_memory_bytes",
        "process_open_fds",
    }
)
"""Gauges of which the processes have parts. Of the others the largest counts: all say the same, or one lags behind."""
COUNTED = ("counter", "histogram")
# For all processes to send their metrics; of one that does not, the last ones count.
SCRAPE_S = 2.0


class Source(Protocol):
    """A process that has metrics."""

    def ask_for_metrics(self) -> None:
        """They are awaited by `wait_for_metrics`."""

    def wait_for_metrics(self, until: float) -> Sequence[Metric]:
        """Those that it sent until a time by `time.monotonic()`, or earlier ones."""


class Merged(Collector):
    """Counters and histograms are summed over the processes that are and that were, as Prometheus expects of numbers
    that fall only when a server starts anew."""

    def __init__(self) -> None:
        # Each process is either there or ended: never both in a sum, nor neither.
        self._lock = threading.Lock()
        self._sources: list[Source] = []
        self._ended: Sequence[Metric] = ()

    def started(self, source: Source) -> None:
        """Notes a process."""
        with self._lock:
            self._sources.append(source)

    def ended(self, source: Source, last: Sequence[Metric]) -> None:
        """Notes what a process counted that is no more, as far as that is known."""
        counts = [one for one in last if one.type in COUNTED]
        with self._lock:
            self._sources.remove(source)
            self._ended = merged([self._ended, counts])

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            sources, ended = list(self._sources), self._ended
        for one in sources:
            one.ask_for_metrics()
        until = time.monotonic() + SCRAPE_S
        return merged([ended, *(one.wait_for_metrics(until) for one in sources)])

    def describe(self) -> Iterable[Metric]:
        """None: to be registered, the processes need not be asked."""
        return ()


def merged(groups: Iterable[Sequence[Metric]]) -> list[Metric]:
    """The metrics of each group as those of one; a counter starts when the first one of them did."""
    metrics: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for metric in chain.from_iterable(groups):
        metrics.setdefault(metric.name, metric)
        of_metric = values.setdefault(metric.name, {})
        for sample in metric.samples:
            key = (sample.name, tuple(sample.labels.items()))
            before = of_metric.get(key)
            if before is None:
                of_metric[key] = sample.value
            elif sample.name.endswith("_created"):
                of_metric[key] = min(before, sample.value)
            elif metric.type in COUNTED or metric.name in SUMMED:
                of_metric[key] = before + sample.value
            else:
                of_metric[key] = max(before, sample.value)
    result = []
    for name, metric in metrics.items():
        one = Metric(name, metric.documentation, metric.type)
        for (sample_name, labels), value in values[name].items():
            one.add_sample(sample_name, dict(labels), value)
        result.append(one)
    return result


def publish(registry: CollectorRegistry, address: str, allow_insecure: bool = False) -> Callable[[], None]:
    """Answers Prometheus on HOST:PORT over HTTP; returns what ends it.

    Raises AddressError, and SecurityError for an address beyond this machine that is not explicitly allowed.
    """
    host, port = host_and_port(address)
    check_exposure(address, encrypted=False, authenticated=False, allow_insecure=allow_insecure)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror}") from error

    logger.info("metrics are served", extra={"address": f"{host}:{server.server_port}"})

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
