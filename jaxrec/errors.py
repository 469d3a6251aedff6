"""All errors that a caller of jaxrec may want to catch."""


class ExportError(Exception):
    """The model was not exported, and nothing was written; the message says what was expected and what came."""


class DataError(ValueError):
    """Input that breaks the rules; the message says where, what came and what was expected."""


class NoUsableRow(DataError):
    """A log without a row that keeps the rules, or none that is new; the message says which, and `bad_rows` how many
    break the rules."""

    def __init__(self, message: str, bad_rows: int) -> None:
        super().__init__(message)
        self.bad_rows = bad_rows


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is kept."""


class TrackingError(TrainingError):
    """A run cannot be tracked with MLflow; the message says where and why."""


class ProcessLost(RuntimeError):
    """Another process of the run is gone. Nothing that involves all of them can end well: leave without it."""


class TrainingStopped(Exception):
    """Training was asked to stop, and did; the message says where it stands. Everything is saved."""


class FetchError(DataError):
    """A download that cannot be finished; the message says what to do."""
