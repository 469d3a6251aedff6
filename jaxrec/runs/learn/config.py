"""The settings of the loop. The command line reads its defaults here, so nothing heavy is imported."""

import dataclasses
from pathlib import Path

from jaxrec.data.reading.bad_rows import OnBadRows


@dataclasses.dataclass(frozen=True)
class Places:
    """What the loop reads and writes.

    Attributes:
        store: The event store, as `python -m serve run --store` has it. Servers may use it meanwhile.
        run: The run that the loop begins with, finished. It stays as it is.
        data: The prepared data of that run. It stays as it is.
        models: The folder of model directories that a server watches; new versions are added.
        work: The folder of the loop (`jaxrec.runs.learn.state`).
    """

    store: str
    run: Path
    data: Path
    models: Path
    work: Path


@dataclasses.dataclass(frozen=True)
class LearnConfig:
    """How a round of the loop learns, and what it publishes.

    Attributes:
        after: The revision of the store that the loop begins after; events until then are in the data already.
        least_events: With fewer new events there is no round.
        margin: Share of the NDCG@10 of the serving model that the lower end of the interval may lie below it.
        least_users: Of how many users a new held-out event is needed to compare a retrained model.
        keep: How many of the versions that the loop published stay; at least 2, so that a server can roll back.
        served: Whether policies are learned from the slates that the server showed.
        attribution_window: Seconds within which an event counts as a response; None: found in the log.
        max_epochs, patience: Of the training; None: as the run has them.
        on_bad_rows: Whether events that cannot be used are an error, or are set aside.
        movies, features: Titles, genres and features of new items, for `jaxrec.data.append.append`.
        licence: Text about the data's licence, kept with each model; None: there is none.
        int8, index: As of `jaxrec.runs.export.export`.
        mlflow: URI of MLflow's tracking server or store, for trainings and published models; None: neither is tracked.
    """

    after: int = 0
    least_events: int = 1
    margin: float = 0.05
    least_users: int = 100
    keep: int = 5
    served: bool = True
    attribution_window: int | None = None
    max_epochs: int | None = None
    patience: int | None = None
    on_bad_rows: OnBadRows = OnBadRows.QUARANTINE
    movies: Path | None = None
    features: Path | None = None
    licence: str | None = None
    int8: bool = False
    index: bool | None = None
    mlflow: str | None = None
