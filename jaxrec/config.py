"""Configuration: a few frozen dataclasses. Each function is handed the smallest piece it needs. Those of reinforcement
learning are in `jaxrec.rl.config`.

The command line reads its defaults here for `--help`, so nothing heavy is imported: NumPy only where it computes.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from jaxrec.errors import DataError

if TYPE_CHECKING:
    import numpy as np

Config = TypeVar("Config")

MISSING_RATING = -1.0  # how "no rating" is written once ratings are scaled to 0..1
MEMORY_GB = 1.5  # for DuckDB while a log is read; the process needs about as much again for blocks, ids and Python


class SplitKind(enum.StrEnum):
    """How the log is cut into training, validation and test (see `jaxrec.data.split`)."""

    LEAVE_ONE_OUT = "leave-one-out"
    TEMPORAL = "temporal"
    USER_HELD_OUT = "user-held-out"


class FilterOn(enum.StrEnum):
    """What the filter for rare users and movies, and with it the catalogue, is fitted on under leave-one-out.

    LOG is what the literature does; TRAINING is the strict way, and the only one of the other splits.
    """

    LOG = "log"
    TRAINING = "training"


class Ties(enum.StrEnum):
    """What orders one user's events with equal timestamps."""

    FILE = "file"
    RANDOM = "random"


class Repeats(enum.StrEnum):
    """What happens to a row with the user, the item and the time of an earlier one.

    KEEP: it is an event, as a second purchase in the same second is. FIRST: it is left out, and counted. FAIL: it is a
    bad row. AUTO: KEEP in a log without ratings, FIRST in one with them.
    """

    AUTO = "auto"
    KEEP = "keep"
    FIRST = "first"
    FAIL = "fail"

    def resolved(self, rated: bool) -> Repeats:
        """KEEP, FIRST or FAIL; `rated`: the log has ratings."""
        if self is not Repeats.AUTO:
            return self
        return Repeats.FIRST if rated else Repeats.KEEP


class SeenItems(enum.StrEnum):
    """Whether items of a user's history may be recommended again.

    EXCLUDE: never, as for films. ALLOW: they are candidates like all others, and how their earlier events change their
    scores is learned, as for music and groceries. AUTO: ALLOW where validation has enough repeats
    (`jaxrec.training.seen.FoundRepeats.choice`); the run holds the choice.
    """

    AUTO = "auto"
    EXCLUDE = "exclude"
    ALLOW = "allow"


@dataclasses.dataclass(frozen=True)
class RatingScale:
    """The range of possible ratings, not of those that occur."""

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minimum) and math.isfinite(self.maximum) and self.minimum < self.maximum):
            raise DataError(f"rating scale {self}: expected two finite numbers, the minimum below the maximum")

    def __str__(self) -> str:
        return f"{self.minimum:g}..{self.maximum:g}"

    def to_unit(self, ratings: np.ndarray) -> np.ndarray:
        """Scales raw ratings to 0..1 (float32); NaN becomes MISSING_RATING.

        Examples:
            >>> import numpy as np
            >>> RatingScale(1, 5).to_unit(np.array([1.0, 4.0, np.nan])).tolist()
            [0.0, 0.75, -1.0]
        """
        import numpy as np

        unit = (ratings - self.minimum) / (self.maximum - self.minimum)
        return np.where(np.isnan(ratings), MISSING_RATING, unit).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """How a log is filtered and split. `rating_scale` None: recognized (`jaxrec.data.reading.scale`)."""

    min_user_ratings: int = 10
    min_movie_ratings: int = 5
    split: SplitKind = SplitKind.LEAVE_ONE_OUT
    ties: Ties = Ties.FILE
    rating_scale: RatingScale | None = None
    seed: int = 0
    filter_on: FilterOn = FilterOn.LOG
    repeats: Repeats = Repeats.AUTO


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Widths of one sequence model. `max_length`: events of a history that the model reads, the most recent ones."""

    embedding: int = 64
    hidden: int = 128
    rating_width: int = 8
    time_width: int = 8
    max_length: int = 200
    input_dropout: float = 0.2
    output_dropout: float = 0.3


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training of one sequence model. `patience`: epochs without a better validation NDCG@10 before it stops.
    `batch_tokens`: events of a step.
    `sampled_items`: how many items estimate the softmax's normalizer in a step; 0: all of them are computed; None: by
    the catalogue's size (`jaxrec.training.step.softmax_sample`). `seen`: whether items of the history may
    be recommended again. `jaxrec.runs.train` replaces AUTO by ALLOW or EXCLUDE before it trains; the training itself
    treats AUTO as EXCLUDE."""

    seed: int = 0
    max_epochs: int = 16
    patience: int = 6
    batch_tokens: int = 1600
    learning_rate: float = 3e-3
    warmup_fraction: float = 0.05
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    request_gap_dropout: float = 0.5
    sampled_items: int | None = None
    seen: SeenItems = SeenItems.AUTO

    @property
    def excludes_seen(self) -> bool:
        """Whether items of the history are no candidates."""
        return self.seen is not SeenItems.ALLOW


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Training is saved after each epoch, and when `seconds` have passed since it was saved. `keep`: how many of the
    latest checkpoints stay, beside the best epoch's."""

    seconds: float = 60.0
    keep: int = 2


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration that `to_json` wrote. Raises ValueError on a key that `kind` does not have."""
    hints = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    return kind(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if isinstance(value, Mapping):
        kinds: tuple[Any, ...] = (hint, *getattr(hint, "__args__", ()))
        return from_json(next(k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), value)
    return value
