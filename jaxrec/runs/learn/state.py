"""Where the loop stands: one JSON file that is replaced as a whole, and a lock that ends with its process.

WORK/state.json   what serves, up to which revision events are in the data, and the rounds
WORK/rounds/N/    what round N made: events.parquet, data/ and run/, or policy/ and log.sqlite, and the export model/
WORK/.jaxrec-learn.lock      held by the process that works; the folder of models has one, too
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrec.errors import DataError
from jaxrec.files import read_json, write_text

STATE_FILE, ROUNDS_FOLDER = "state.json", "rounds"
STATE_SCHEMA_VERSION = 1
MOST_ROUNDS = 100  # finished ones that the state remembers
MODELS, POLICY = "models", "policy"  # what a round changed


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of the loop.

    Attributes:
        number: From 1 on.
        stages: By name, in the order in which they began: `began` (seconds since 1970-01-01T00:00Z), `attempts`, and
            once it ended `seconds` (of the last attempt), the `settings` that it used, and `result`.
        published: Whether a new version was published.
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
        run: The run whose export serves; at first `first_run`, or its copy in rounds/0 where the data was moved.
        data: The prepared data with all events until `revision`; it may be newer than that of `run`.
        published_data: The data at the time when `run` was published: what its models and its policy may have learned
            from.
        after: The revision of the store that the loop began after.
        revision: Of the store, see `serve.event_log.export`.
        changed: What the last published round changed: MODELS or POLICY.
        folder: The newest version in the folder of models; `model_version`: what its manifest says.
        published: The folders that the loop wrote, oldest first, as far as they are kept.
        untracked: Why MLflow does not have the newest version, which the next command tries again; empty: it has, or is
            not to have it.
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
    published_data: str
    after: int
    revision: int
    changed: str
    folder: str
    model_version: str
    published: tuple[str, ...] = ()
    untracked: str = ""
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
    hint = f"restore it, or begin another loop with another --work ({work} holds the run that serves, and its data)"
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


class UnderWay:
    """The round that is under way, noted in the state file before and after each stage."""

    def __init__(self, work: Path, state: State, settings: Mapping[str, Mapping[str, str]]) -> None:
        """`settings`: by stage, those that it uses."""
        assert state.round is not None
        self._work, self._state, self._settings, self.round = work, state, settings, state.round

    def stage(
        self,
        name: str,
        run: Callable[[], dict[str, Any]],
        valid: Callable[[Mapping[str, Any]], bool] = lambda result: True,
        /,
        **inputs: Any,
    ) -> Mapping[str, Any]:
        """What a stage came to, now or before the command was interrupted.

        Args:
            name: Of the stage.
            run: Runs it.
            valid: Whether an earlier result still holds; if not, the stage runs again.
            **inputs: Noted with it.

        Raises:
            DataError: It was done with other settings.
        """
        known, settings = self.round.result(name), dict(self._settings.get(name, {}))
        if known is not None and valid(known):
            for option, before in self.round.stages[name]["settings"].items():
                if settings[option] != before:
                    raise DataError(
                        f"--{option.replace('_', '-')} is {settings[option]}: the stage {name} of round "
                        f"{self.round.number}, which is under way, was done with {before}; give that until it has ended"
                    )
            return known
        attempts = self.round.stages.get(name, {}).get("attempts", 0) + 1
        begun = {"inputs": inputs, "settings": settings, "attempts": attempts, "began": time.time()}
        self._note(name, begun)
        clock = time.monotonic()
        result = run()
        self._note(name, {**begun, "seconds": round(time.monotonic() - clock, 3), "result": result})
        return result

    def _note(self, name: str, record: Mapping[str, Any]) -> None:
        self.round = dataclasses.replace(self.round, stages={**self.round.stages, name: record})
        write_state(self._work, dataclasses.replace(self._state, round=self.round))
