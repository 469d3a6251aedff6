"""A real server in this process, on a free port and with a store of its own for each test."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from serve.client import RecommenderClient
from serve.front.server import create_server
from serve.model.directory import Artifact, read_artifact
from serve.model.recommender import Recommender
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.stores import open_store
from serve.stores.base import EventStore
from tests.serve.one_model import one_model


@pytest.fixture(scope="session")
def artifact(model_directory: Path) -> Artifact:
    return read_artifact(model_directory)


@pytest.fixture(scope="session")
def model(artifact: Artifact) -> Recommender:
    return Recommender(artifact, "cpu")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with open_store(tmp_path / "events.sqlite") as opened:
        yield opened


@pytest.fixture
def address(model: Recommender, store: EventStore) -> Iterator[str]:
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{server.port}"
    server.drain()


@pytest.fixture
def client(address: str) -> Iterator[RecommenderClient]:
    with RecommenderClient(address) as connected:
        yield connected


@pytest.fixture
def stub(address: str) -> Iterator[RecommenderStub]:
    """For requests that the client would not build."""
    with grpc.insecure_channel(address) as channel:
        yield RecommenderStub(channel)
