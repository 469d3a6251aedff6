"""A run that is trained and exported once, and the events that a store records after it."""

import dataclasses
import shutil
from pathlib import Path

import pandas as pd
import pytest

import jaxrec
from jaxrec.runs.learn.config import LearnConfig, Places
from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import UserEvent
from tests.runs.test_train import EVERYTHING, MODEL
from tests.synthetic import markov_log

USERS, ITEMS = 60, 30
# One step an epoch, however much the data grows: each program is compiled once for all rounds.
TRAINING = jaxrec.TrainConfig(max_epochs=2, batch_tokens=1024)
LATER = 10_000_000  # seconds between the first events of two rounds
CONFIG = LearnConfig(
    margin=1.0, least_users=1, served=False
)  # what counts is that it goes round, not whether it gets better


@dataclasses.dataclass(frozen=True)
class Loop:
    """A folder with all that a loop needs; the run and the data are shared."""

    places: Places

    def record(self, events: list[UserEvent]) -> None:
        with open_store(self.places.store) as store:
            store.record(events)


def events_of_round(number: int) -> list[UserEvent]:
    """Two events of each user, later than all of the rounds before: few shapes are compiled."""
    log = markov_log(USERS, ITEMS, events=2, stay=0.9, seed=number)
    return events_of(log.assign(timestamp=log["timestamp"] + number * LATER), f"round {number}")


def events_of(log: pd.DataFrame, name: str) -> list[UserEvent]:
    """A frame with user_id, item_id, rating, timestamp as a client records it."""
    return [
        UserEvent(f"{name}-{at}", str(user), Event(str(item), float(rating), int(time)))
        for at, (user, item, rating, time) in enumerate(log.itertuples(index=False))
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/data, FOLDER/run trained on it, and its export FOLDER/models/1."""
    folder = tmp_path_factory.mktemp("base")
    jaxrec.prepare(markov_log(USERS, ITEMS, events=10, stay=0.9, seed=0), None, EVERYTHING, out=folder / "data")
    jaxrec.train(folder / "data", folder / "run", MODEL, TRAINING)
    jaxrec.export(folder / "run", folder / "models" / "1")
    return folder


def new_loop(base: Path, folder: Path) -> Loop:
    """A loop in a new folder, with an empty store and the export of the run as its only version."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(base / "models", folder / "models")
    open_store(folder / "events.sqlite").close()
    places = Places(str(folder / "events.sqlite"), base / "run", base / "data", folder / "models", folder / "work")
    return Loop(places)
