"""The contract, over each front in the way in which it is deployed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.front.server import create_server
from serve.model.recommender import Recommender
from serve.stores.base import EventStore
from tests.serve.front.proxy import FRONTS, Sockets, running_proxy
from tests.serve.one_model import one_model


@pytest.fixture(params=FRONTS)
def address(request: pytest.FixtureRequest, model: Recommender, store: EventStore, tmp_path: Path) -> Iterator[str]:
    if request.param == "default":
        server = create_server(one_model(model, store), store, "127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{server.port}"
    else:
        sockets = Sockets.of(tmp_path)
        server = create_server(one_model(model, store), store, sockets.default, fast=sockets.fast)
        server.start()
        with running_proxy(sockets):
            yield sockets.proxy
    server.drain()
