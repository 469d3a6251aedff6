"""What happened in the loop, for the textfile collector of Prometheus' node exporter."""

import time
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from jaxrec.files import write_text
from jaxrec.runs.learn.state import State


def write_metrics(state: State | None, path: Path) -> None:
    """Replaces the metrics file, wholly or not at all.

    Args:
        state: After a command; None: it failed, and there is no state that can be read.
        path: A file that ends in .prom, in the folder of the collector.
    """
    write_text(path, metrics_text(state))


def metrics_text(state: State | None) -> str:
    """The metrics of a state in Prometheus' text format. Those of the last round are left out before the first one.
    Without a state there are but the failure and its time."""
    registry = CollectorRegistry()

    def labelled(name: str, what: str, *labels: str) -> Gauge:
        return Gauge(name, what, labels, namespace="jaxrec_learn", registry=registry)

    def gauge(name: str, what: str, value: float) -> None:
        labelled(name, what).set(value)

    gauge("ended_timestamp_seconds", "When the last command ended.", time.time() if state is None else state.ended)
    gauge("failed", "1: the last command ended with an error.", state is None or bool(state.error))
    if state is None:
        return generate_latest(registry).decode("utf-8")
    gauge("succeeded_timestamp_seconds", "When the last command without an error ended.", state.succeeded)
    gauge("revision", "Revision of the store up to which events are learned from.", state.revision)
    labelled("model_info", "1 for the newest version that was published.", "model_version").labels(
        state.model_version
    ).set(1)
    if state.history:
        last = state.history[-1]
        gauge("round", "Number of the last finished round.", last.number)
        gauge("published", "1: the last round published a new version; 0: it did not.", last.published)
        seconds = labelled("stage_seconds", "Duration of a stage of the last round.", "stage")
        for name, stage in last.stages.items():
            seconds.labels(name).set(stage.get("seconds", 0.0))
        gauge("events", "New events of the last round.", (last.result("export-events") or {}).get("events", 0))
        counts = (last.result("append") or {}).get("input", {})
        gauge("bad_events", "Events of the last round that could not be used.", counts.get("bad_rows", 0))
        gate = last.result("gate") or {}
        if gate.get("difference"):
            what = "NDCG@10 of the new model less that of the serving one: mean and 95 % interval."
            difference = labelled("gate_ndcg_difference", what, "estimate")
            for name, value in gate["difference"].items():
                difference.labels(name).set(value)
            gauge("gate_users", "Users of the new held-out events.", gate["users"])
    return generate_latest(registry).decode("utf-8")
