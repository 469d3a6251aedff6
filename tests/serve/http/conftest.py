"""A real server with both doors, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serve.front.server import Listener, create_server
from serve.http.server import HttpServer
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.stores.base import EventStore
from tests.serve.http.asking import Doors, Opening
from tests.serve.one_model import one_model


@pytest.fixture
def opening(model: Recommender, store: EventStore) -> Opening:
    """Opens both doors for a block, with parts of a `Listener`, `origins` and `hosts`."""

    @contextmanager
    def opened(origins: tuple[str, ...] = (), hosts: tuple[str, ...] = (), **parts: Any) -> Iterator[Doors]:
        listener = Listener("localhost:0", **parts)
        metrics = Metrics()
        http = HttpServer(listener, metrics, origins, hosts)
        server = create_server(
            one_model(model, store), store, listener, metrics=metrics, also_listen=(http.grpc_address,)
        )
        server.start()
        http.start()
        try:
            yield Doors(server, http, metrics)
        finally:
            http.close()
            server.drain()

    return opened


@pytest.fixture
def doors(opening: Opening) -> Iterator[Doors]:
    with opening() as both:
        yield both
