"""Servers that share a port and a store answer as one: what one of them records, the others know."""

from pathlib import Path

import numpy as np
import pytest

from serve.addresses import AddressError
from serve.client import RecommenderClient, UserEvent
from serve.front.server import Listener, create_server
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from serve.stores import open_store
from tests.serve.one_model import one_model


def test_states_follow_events_that_another_server_recorded(model: Recommender, tmp_path: Path) -> None:
    ids = model.catalog.item_ids
    with open_store(tmp_path / "events.sqlite") as here, open_store(tmp_path / "events.sqlite") as there:
        first = create_server(one_model(model, here), here, Listener("127.0.0.1:0", shared_port=True))
        address = f"127.0.0.1:{first.port}"
        with pytest.raises(AddressError):
            create_server(one_model(model, here), here, address)
        # The second answers alone on another port too, so that each is asked for certain.
        second = create_server(one_model(model, there), there, Listener(address, shared_port=True))
        alone = create_server(one_model(model, there), there, "127.0.0.1:0")
        for server in (first, second, alone):
            server.start()
        with RecommenderClient(address) as shared, RecommenderClient(f"127.0.0.1:{alone.port}") as other:
            for at in range(1, 21):
                writer, reader = (shared, other) if at % 2 else (other, shared)
                event = UserEvent(event_id=str(at), user_id="ada", item_id=ids[at], rating=4.0, timestamp=86_400 * at)
                writer.record_events([event])
                answer = reader.recommend(user_id="ada", k=10)
                events = [Event(ids[one], 4.0, 86_400 * one) for one in range(1, at + 1)]
                (expected,) = model.recommend([Query(events, 10)])
                assert [one.item_id for one in answer.recommendations] == [ids[item] for item in expected.items]
                scores = [one.score for one in answer.recommendations]
                np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
        for server in (first, second, alone):
            server.drain()
