"""SIGTERM lets the calls of both doors finish; a door that fails ends the server."""

import signal
import threading
from pathlib import Path

import pytest

from serve.http.connections import Door, open_socket
from serve.stores.base import EventStore
from tests.serve.http.asking import TIMEOUT_S, Doors, ask
from tests.serve.process import running_server

RECORD = "/jaxrec.v1.Recommender/RecordEvents"


def test_a_server_process_says_where_it_listens_and_ends_with_both_doors(model_directory: Path, tmp_path: Path) -> None:
    options = ("--http", "127.0.0.1:0")
    with running_server(model_directory, tmp_path / "events.sqlite", provider="cpu", options=options) as server:
        url = server.line.split(" and ")[1].split(" ")[0]
        assert url.startswith("http://127.0.0.1:")
        port = int(url.rpartition(":")[2])
        assert ask(port, "/healthz").status == 200
        assert ask(port, "/jaxrec.v1.ModelAdmin/ListModels", {}).json["models"][0]["state"] == "MODEL_STATE_READY"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(TIMEOUT_S) == 0
        with pytest.raises(ConnectionRefusedError):
            ask(port, "/healthz")


def test_calls_under_way_finish_and_new_ones_are_turned_away(doors: Doors, store: EventStore) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    record = store.record

    def slow_record(events: object) -> object:
        begun.set()
        assert goes_on.wait(TIMEOUT_S)
        return record(events)  # type: ignore[arg-type]

    store.record = slow_record  # type: ignore[method-assign, assignment]
    said: list[object] = []
    event = {"eventId": "e", "userId": "u", "itemId": "1007", "timestamp": "1"}
    under_way = threading.Thread(target=lambda: said.append(ask(doors.port, RECORD, {"events": [event]}).json))
    under_way.start()
    assert begun.wait(TIMEOUT_S)

    def end() -> None:
        doors.server.finish_calls()
        doors.http.close()

    ending = threading.Thread(target=end)
    ending.start()
    while ask(doors.port, "/healthz").status == 200:
        assert ending.is_alive()
    refused = ask(doors.port, "/jaxrec.v1.Recommender/GetModelInfo", {})
    assert (refused.status, refused.json["code"]) == (503, "unavailable")
    goes_on.set()
    under_way.join(TIMEOUT_S)
    ending.join(TIMEOUT_S)
    assert said == [{"recordedCount": 1}]
    assert not ending.is_alive()
    with pytest.raises(ConnectionError):
        ask(doors.port, "/healthz")


def test_a_door_that_ends_by_itself_says_so() -> None:
    failed = threading.Event()
    opened = open_socket("127.0.0.1:0")
    door = Door(lambda: None, opened, None, failed.set)
    # Nobody can listen at a socket that is closed.
    opened.close()
    door.start()
    assert failed.wait(TIMEOUT_S)
