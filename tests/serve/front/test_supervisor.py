"""What a supervisor of several processes is made of: ports that are held, messages, and metrics as of one server."""

import socket
from collections.abc import Callable, Sequence

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from serve.addresses import AddressError
from serve.front.channel import Channel
from serve.front.supervisor import held
from serve.http.connections import open_socket
from serve.observability.merged import Merged, publish

PATIENCE_S = 60.0


class Asked:
    """Metrics of a process that is asked for them, and what happens meanwhile."""

    def __init__(self, metrics: Sequence[Metric], meanwhile: Callable[[], None] = lambda: None) -> None:
        self.metrics = metrics
        self._meanwhile = meanwhile

    def ask_for_metrics(self) -> None:
        self._meanwhile()

    def wait_for_metrics(self, until: float) -> Sequence[Metric]:
        return self.metrics


def counted(calls: int, under_way: int, age: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("answers", "", ["policy"], namespace="jaxrec", registry=registry).labels("a").inc(calls)
    Gauge("rpcs_under_way", "", namespace="jaxrec", registry=registry).set(under_way)
    Gauge("model_age_seconds", "", namespace="jaxrec", registry=registry).set(age)
    Histogram("rpc_seconds", "", namespace="jaxrec", buckets=(1.0, 2.0), registry=registry).observe(calls)
    return registry


def test_metrics_of_processes_are_summed_or_the_largest_and_counters_never_fall() -> None:
    processes = [Asked(list(counted(*one).collect())) for one in ((1, 2, 30.0), (2, 3, 20.0))]
    registry = CollectorRegistry()
    registry.register(together := Merged())
    for one in processes:
        together.started(one)

    def values() -> list[float | None]:
        return [
            registry.get_sample_value("jaxrec_answers_total", {"policy": "a"}),
            registry.get_sample_value("jaxrec_rpc_seconds_bucket", {"le": "1.0"}),
            registry.get_sample_value("jaxrec_rpc_seconds_bucket", {"le": "+Inf"}),
            registry.get_sample_value("jaxrec_rpcs_under_way"),
            registry.get_sample_value("jaxrec_model_age_seconds"),
        ]

    assert values() == [3, 1, 2, 5, 30]
    together.ended(processes[0], processes[0].metrics)
    assert values() == [3, 1, 2, 3, 20]
    together.started(Asked(list(counted(5, 0, 0.0).collect())))
    assert values() == [8, 1, 3, 3, 20]


def test_a_process_that_ends_while_it_is_asked_counts_once() -> None:
    metrics = list(counted(3, 0, 0.0).collect())
    registry = CollectorRegistry()
    registry.register(together := Merged())
    one = Asked(metrics, lambda: together.ended(one, metrics))
    together.started(one)
    assert registry.get_sample_value("jaxrec_answers_total", {"policy": "a"}) == 3
    assert registry.get_sample_value("jaxrec_answers_total", {"policy": "a"}) == 3


def test_a_port_is_held_although_a_server_has_just_closed_connections_on_it() -> None:
    """They stay in TIME_WAIT for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
        with socket.create_connection(server.getsockname(), timeout=PATIENCE_S) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""
    with held(address, is_shared=False):
        pass


def test_a_port_that_is_held_is_nobody_elses() -> None:
    """Nor of those who set SO_REUSEADDR, as this does."""
    with held("127.0.0.1:0", is_shared=False) as holder, pytest.raises(OSError, match="in use"):
        socket.create_server(holder.getsockname())


@pytest.mark.parametrize("host", ["a..b", ".", "x" * 64])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    expected = "expected a name or an IP address as HOST"
    with pytest.raises(AddressError, match=expected):
        held(f"{host}:0", is_shared=False)
    with pytest.raises(AddressError, match=expected):
        open_socket(f"{host}:0")
    with pytest.raises(AddressError, match=expected):
        publish(CollectorRegistry(), f"{host}:0", allow_insecure=True)


def test_a_process_that_does_not_read_holds_up_nobody_for_long() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, send_timeout_s=0.05)
        content = bytes(64 * 1024)
        assert any(not channel.send("much", content) for _ in range(1_000))
        received = Channel(theirs).receive()
        assert received == ("much", content)
