"""Metrics for Prometheus: calls, models, and whether the traffic still resembles the training data.

Shares and rates are computed by queries over counters: the share of fallback answers is
`rate(jaxrec_answers_total{policy=~"popularity|recent_popularity"}[5m]) / rate(jaxrec_answers_total[5m])`, that of
unknown items `rate(jaxrec_events_total{known="false"}[5m]) / rate(jaxrec_events_total[5m])`, and the feedback rate
`rate(jaxrec_feedback_events_total[5m]) / rate(jaxrec_answers_total[5m])`.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COVERAGE_WINDOW_S = 600.0
MARKED_AT_ONCE = 100
UNKNOWN = "unknown"


class Observe(Protocol):
    """Takes one observation."""

    def __call__(self, amount: float) -> None: ...


class Coverage:
    """Which items were recommended in the last 10 to 20 minutes: a bit per item for this window and for the one before.

    Answers are noted, and marked many at a time. Writers don't lock: a mark that is lost while the window turns is one
    item of thousands.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: tuple[NDArray[np.bool_], NDArray[np.bool_]] = (np.zeros(1, bool), np.zeros(1, bool))
        self._ends = 0.0
        self._noted: list[NDArray[np.int32]] = []

    def reset(self, item_count: int) -> None:
        """Forgets all, for a model with so many items."""
        with self._lock:
            self._windows = (np.zeros(item_count + 1, bool), np.zeros(item_count + 1, bool))
            self._ends = self._clock() + COVERAGE_WINDOW_S
            self._noted = []

    def mark(self, items: NDArray[np.int32]) -> None:
        """Notes item indices that were recommended; those beyond the catalogue, of another model, don't count."""
        self._noted.append(items)
        if len(self._noted) >= MARKED_AT_ONCE:
            self._mark_noted()

    def _mark_noted(self) -> None:
        noted, self._noted = self._noted, []
        window = self._windows[0] if self._clock() < self._ends else self._turned()
        items = np.concatenate([np.zeros(0, np.int32), *noted])
        window[items[items < len(window)]] = True

    def ratio(self) -> float:
        """Share of the catalogue that was recommended, 0..1."""
        self._mark_noted()
        if self._clock() >= self._ends:
            self._turned()
        current, last = self._windows
        return float((current | last)[1:].mean()) if len(current) > 1 else 0.0

    def _turned(self) -> NDArray[np.bool_]:
        with self._lock:
            now = self._clock()
            if now >= self._ends:
                fresh = np.zeros_like(self._windows[0])
                # After a long silence the last window is old too.
                last = self._windows[0] if now < self._ends + COVERAGE_WINDOW_S else np.zeros_like(fresh)
                self._windows = (fresh, last)
                self._ends = now + COVERAGE_WINDOW_S
            return self._windows[0]


class Metrics:
    """The metrics of one server, in a registry of their own. Safe to share between threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._calls = self._histogram("rpc_seconds", "Calls by method and status.", SECONDS, ("method", "code"))
        self._observers: dict[tuple[str, str], Observe] = {}
        self.queue_seconds: Observe = self._histogram(
            "queue_seconds", "Wait for the model to be free.", SECONDS
        ).observe
        self.inference_seconds: Observe = self._histogram(
            "inference_seconds", "One run of the model for a batch.", SECONDS
        ).observe
        self.batch_size: Observe = self._histogram("batch_size", "Requests in one run of the model.", BATCHES).observe
        self._under_way = self._gauge("rpcs_under_way", "Calls that are being answered.")
        self._dropped = self._gauge("dropped_log_entries", "Slates and states that the store gave up since the start.")
        self._rejected = self._counter("rejected_calls_total", "Calls that were turned away.", ("reason", "method"))
        self._batch_failures = self._counter(
            "batch_failures_total", "Requests of batches that failed by themselves, in calls that are OK.", ("code",)
        )
        self.restarted: Callable[[], None] = self._counter(
            "front_restarts_total", "gRPC servers that failed and were replaced."
        ).inc
        """One gRPC server that failed, such as by a path that is not UTF-8, and was replaced."""
        self._methods: frozenset[str] = frozenset()
        self._reloads = self._counter("model_reloads_total", "Attempts to load a model.", ("result",))
        self._model_info = self._gauge("model_info", "1 for each loaded version.", ("model_version", "policy"))
        self._model_created = self._gauge(
            "model_created_timestamp_seconds", "When the newest loaded model was exported."
        )
        age = self._gauge("model_age_seconds", "Time since the newest loaded model was exported.")
        self._created: float | None = None
        age.set_function(lambda: 0.0 if self._created is None else time.time() - self._created)
        self._trend_age: Gauge | None = None
        self._catalogue_items = self._gauge("catalogue_items", "Items of the store, also those that no model knows.")
        self._withheld = self._gauge("catalogue_withheld_items", "Items of the model that may not be answered now.")
        self._catalogue_age = self._gauge("catalogue_age_seconds", "Time since items were last read from the store.")
        self.catalogue_failed: Callable[[], None] = self._counter(
            "catalogue_refresh_failures_total", "Attempts to read items from the store that failed."
        ).inc
        """One failed attempt to read items from the store."""
        self._answers = self._counter("answers_total", "Recommendations by what ranked them.", ("policy",))
        self._by_policy: dict[str, Counter] = {}
        events = self._counter("events_total", "Events that came in, by whether the item is known.", ("known",))
        self._known, self._unknown = events.labels("true"), events.labels("false")
        recorded = self._counter("recorded_events_total", "Events sent to be recorded.", ("result",))
        self._recorded, self._duplicate = recorded.labels("recorded"), recorded.labels("duplicate")
        self._feedback = self._counter("feedback_events_total", "Recorded events that refer to a recommendation.")
        self._reranked = self._counter("reranker_calls_total", "Calls of the own re-ranker.", ("result",))
        self._coverage = Coverage()
        coverage = self._gauge("catalogue_coverage_ratio", "Share of items recommended in the last 10 to 20 minutes.")
        coverage.set_function(self._coverage.ratio)

    def call(self, method: str, code: str, seconds: float) -> None:
        """One finished call: `/package.Service/Method`, the status' name, and how long it took."""
        method = self.known(method)
        observe = self._observers.get((method, code))
        if observe is None:
            observe = self._observers[method, code] = self._calls.labels(method, code).observe
        observe(seconds)

    def count_under_way(self, count: Callable[[], int]) -> None:
        """Where to look for how many calls are being answered."""
        self._under_way.set_function(count)

    def count_dropped(self, count: Callable[[], int]) -> None:
        """Where to look for how many slates and states are lost."""
        self._dropped.set_function(count)

    def age_of_trend(self, age_s: Callable[[], float]) -> None:
        """Where to look for the seconds since the trend was last read; without a call there is no such metric."""
        if self._trend_age is None:
            self._trend_age = self._gauge("trend_age_seconds", "Time since the trend was last read from the store.")
        self._trend_age.set_function(age_s)

    def watch_catalogue(
        self, items: Callable[[], int], withheld: Callable[[], int], age_s: Callable[[], float]
    ) -> None:
        """Where to look for the items of the store, those that may not be answered now, and the seconds since they were
        last read."""
        self._catalogue_items.set_function(items)
        self._withheld.set_function(withheld)
        self._catalogue_age.set_function(age_s)

    def know_methods(self, methods: Iterable[str]) -> None:
        """The methods of the server; all others are counted as one, since clients can invent names."""
        self._methods = frozenset(methods)

    def known(self, method: str) -> str:
        """The name by which a method is counted."""
        return method if method in self._methods else UNKNOWN

    def rejected(self, reason: str, method: str) -> None:
        """One call that was turned away before it was looked at: `unauthenticated`, `permission` or `overload`; or that
        was ended because its message did not come: `no_message`; or that came over HTTP and is no call: `http`."""
        self._rejected.labels(reason, self.known(method)).inc()

    def failed_in_batch(self, code: str) -> None:
        """One request of a batch that has an error in place of an answer, by its status."""
        self._batch_failures.labels(code).inc()

    def answered(self, policy: str, items: NDArray[np.int32]) -> None:
        """One recommendation, and the indices of its items."""
        counter = self._by_policy.get(policy)
        if counter is None:
            counter = self._by_policy[policy] = self._answers.labels(policy)
        counter.inc()
        self._coverage.mark(items)

    def events(self, known: int, unknown: int) -> None:
        """Events that came in, by whether the model knows their items."""
        if known:
            self._known.inc(known)
        if unknown:
            self._unknown.inc(unknown)

    def recorded(self, recorded: int, duplicates: int, feedback: int) -> None:
        """Events of one RecordEvents call; `feedback` are those that refer to a recommendation."""
        self._recorded.inc(recorded)
        self._duplicate.inc(duplicates)
        self._feedback.inc(feedback)

    def reranked(self, result: str) -> None:
        """One answer that the own re-ranker was to order: `ok`, `failed`, `late` or `busy`."""
        self._reranked.labels(result).inc()

    def reloaded(self, result: str) -> None:
        """One attempt to load a model: `loaded` or `refused`."""
        self._reloads.labels(result).inc()

    def serving(self, models: Sequence[tuple[str, str, float, int]]) -> None:
        """The loaded models, most traffic first: version, policy, time of export in seconds, number of items."""
        self._model_info.clear()
        for version, policy, _, _ in models:
            self._model_info.labels(version, policy).set(1)
        self._created = max((created for _, _, created, _ in models), default=None)
        self._model_created.set(self._created or 0)
        if models:
            self._coverage.reset(models[0][3])

    def _histogram(self, name: str, what: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, what, labels, namespace="jaxrec", buckets=buckets, registry=self.registry)

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, what, labels, namespace="jaxrec", registry=self.registry)

    def _gauge(self, name: str, what: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, what, labels, namespace="jaxrec", registry=self.registry)
