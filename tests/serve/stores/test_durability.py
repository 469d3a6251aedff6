"""A server that is killed while it records: what it acknowledged is there, and nothing is there twice."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from serve.client import RecommenderClient, UserEvent
from tests.serve.process import running_server

USERS = 4
DEADLINE_S = 60.0


class Acknowledged:
    """The events that the server acknowledged, counted by several threads."""

    def __init__(self) -> None:
        self.events: list[UserEvent] = []
        self._changed = threading.Condition()

    def add(self, events: Sequence[UserEvent]) -> None:
        with self._changed:
            self.events.extend(events)
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, DEADLINE_S)


def batch(user: int, number: int) -> list[UserEvent]:
    return [
        UserEvent(event_id=f"{user}-{number}-{at}", user_id=str(user), item_id="1007", timestamp=number + 1)
        for at in range(3)
    ]


def test_killed_server_lost_nothing_that_it_acknowledged(model_directory: Path, tmp_path: Path) -> None:
    store = tmp_path / "events.sqlite"
    acknowledged = Acknowledged()
    # What was under way when the server was killed may be stored or not; each user sends on from there.
    sent = [0] * USERS

    def send(client: RecommenderClient, user: int) -> grpc.StatusCode:
        while True:
            events = batch(user, sent[user])
            sent[user] += 1
            try:
                response = client.record_events(events)
            except grpc.RpcError as error:
                return error.code()
            assert (response.recorded_count, response.duplicate_count) == (3, 0)
            acknowledged.add(events)

    for _ in range(3):
        with (
            running_server(model_directory, store, provider="cpu") as server,
            RecommenderClient(server.address, timeout_s=2) as client,
            ThreadPoolExecutor(USERS) as threads,
        ):
            senders = [threads.submit(send, client, user) for user in range(USERS)]
            acknowledged.wait_for(len(acknowledged.events) + 60)
            server.process.kill()
            codes = {sender.result() for sender in senders}
            assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

    with (
        running_server(model_directory, store, provider="cpu") as server,
        RecommenderClient(server.address) as client,
    ):
        for start in range(0, len(acknowledged.events), 1000):
            again = acknowledged.events[start : start + 1000]
            assert client.record_events(again).duplicate_count == len(again)
        for user in range(USERS):
            for number in range(sent[user]):
                client.record_events(batch(user, number))
            profile = client.get_user_profile(str(user), 1000)
            assert profile.event_count == 3 * sent[user]
