"""Where the loop stands: one JSON file that is replaced as a whole, and a lock that ends with its process.

WORK/state.json   what serves, up to which revision events are in the data, and the rounds
WORK/lock         held by the process that works
WORK/rounds/N/    what round N made: events.csv, data/ and run/, or policy/ and log.sqlite
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrec.errors import DataError
from jaxrec.files import read_json, write_text

STATE_FILE, LOCK_FILE, ROUNDS_FOLDER = "state.json", "lock", "rounds"
STATE_SCHEMA_VERSION = 1
MOST_ROUNDS = 100  # finished ones that the state remembers
MODELS, POLICY = "models", "policy"  # what a round changed


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of the loop.

    Attributes:
        number: From 1 on.
        stages: By name, in the order in which they began: `began` (seconds since 1970-01-01T00:00Z), `attempts`, and
            once it ended `seconds` (of the last attempt) and `result`.
        published: Whether a new version was put out.
        reason: Why, or why not; empty while it is under way.
    """

    number: int
    stages: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published: bool = False
    reason: str = ""

    def result(self, stage: str) -> Mapping[str, Any] | None:
        """What a stage came to; None: it did not end."""
        result: Mapping[str, Any] | None = self.stages.get(stage, {}).get("result")
        return result


@dataclasses.dataclass(frozen=True)
class State:
    """Where the loop stands between two commands, or where it was interrupted.

    Attributes:
        store: The location of the event store, without a password.
        first_run: The run that the loop began with, and `first_run_sha256` of its mix.
        run: The run whose export serves.
        data: The prepared data with all events until `revision`; it may be newer than that of `run`.
        revision: Of the store, see `serve.event_log.export`.
        changed: What the last published round changed: MODELS or POLICY.
        folder: The newest version in the folder of models; `model_version`: what its manifest says.
        published: The folders that the loop wrote, oldest first, as far as they are kept.
        round: The round that is under way; None: there is none.
        history: The last finished rounds, oldest first.
        ended: When the last command ended, in seconds since 1970-01-01T00:00Z; 0: never.
        succeeded: The same of the last one without an error, whether or not it published anything.
        error: Why the last command failed; empty: it did not.
        said: What the last command came to, in a sentence.
    """

    store: str
    first_run: str
    first_run_sha256: str
    run: str
    data: str
    revision: int
    changed: str
    folder: str
    model_version: str
    published: tuple[str, ...] = ()
    round: Round | None = None
    history: tuple[Round, ...] = ()
    ended: float = 0.0
    succeeded: float = 0.0
    error: str = ""
    said: str = ""


def read_state(work: Path) -> State | None:
    """The state in the folder of the loop; None: it has not begun.

    Raises:
        DataError: The file is damaged, or of another version.
    """
    path = work / STATE_FILE
    if not path.exists():
        return None
    hint = f"to begin the loop anew, remove {work}"
    content = read_json(path, hint)
    try:
        version = content.pop("schema_version")
        if version != STATE_SCHEMA_VERSION:
            raise ValueError(f"schema version {version}, expected {STATE_SCHEMA_VERSION}")
        under_way = content.pop("round")
        history = tuple(Round(**one) for one in content.pop("history"))
        published = tuple(content.pop("published"))
        now = None if under_way is None else Round(**under_way)
        return State(**content, round=now, history=history, published=published)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a state of the loop that this version can read ({error}); {hint}") from error


def write_state(work: Path, state: State) -> None:
    """Replaces the state file, wholly or not at all."""
    content = {"schema_version": STATE_SCHEMA_VERSION, **dataclasses.asdict(state)}
    content["history"] = content["history"][-MOST_ROUNDS:]
    write_text(work / STATE_FILE, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Holds the lock of the folder, which it makes. The system releases it when the process ends, however it ends.

    Raises:
        DataError: Another process holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{work}: another `jaxrec learn` is at work there; one works at a time") from error
        yield
    finally:
        os.close(descriptor)
