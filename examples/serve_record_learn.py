"""Serve a model, record what users do with its recommendations, and learn from that log.

    python examples/serve_record_learn.py work/run work/model work/events.sqlite

The server explores: it draws items by their scores, and logs each probability. Only such a log can show how another
policy would have done.
"""

import subprocess
import sys
import time
import uuid

import jaxrec
from serve.client import RecommenderClient, UserEvent

SERVE = [sys.executable, "-m", "serve", "run", "--address", "127.0.0.1:0", "--explore", "0.5"]


def main(run_folder: str, model: str, store: str, users: int = 20, requests: int = 3) -> None:
    """Asks for `users` new users, each of whom interacts with the first item of each answer."""
    with subprocess.Popen([*SERVE, model, "--store", store], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split(" on ")[1].split()[0]  # port 0 became a free one
        with RecommenderClient(address) as client:
            popular = client.recommend(history=[], k=users).recommendations
            for number in range(users):
                visit(client, f"user {number}", popular[number % len(popular)].item_id, requests)
        server.terminate()

    # The policy in use is replaced only if the log shows that the new one earns more from other users.
    try:
        outcome = jaxrec.fine_tune(run_folder, log=store)
        print(f"{'used' if outcome.used else 'not used'}: {outcome.reason}")
    except jaxrec.DataError as error:
        print(f"cannot learn from this log: {error}")


def visit(client: RecommenderClient, user: str, first_item: str, requests: int) -> None:
    """One user's events; an event names the recommendation that it responds to."""
    client.record_events([event(user, first_item)])
    for _ in range(requests):
        answer = client.recommend(user_id=user, k=5)
        client.record_events([event(user, answer.recommendations[0].item_id, answer.recommendation_id)])


def event(user: str, item: str, recommendation: str = "") -> UserEvent:
    """What a client sends; the id makes a repeated call harmless."""
    name, now = uuid.uuid4().hex, int(time.time())
    return UserEvent(event_id=name, user_id=user, item_id=item, timestamp=now, recommendation_id=recommendation)


if __name__ == "__main__":
    main(*sys.argv[1:])
