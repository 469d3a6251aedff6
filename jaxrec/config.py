"""Configuration: a few frozen dataclasses, each function gets the smallest one that it needs. Those of reinforcement
learning are in `jaxrec.rl.config`."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from jaxrec.data.schema import RatingScale

Config = TypeVar("Config")


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


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """`rating_scale` None means: recognize it (`jaxrec.data.schema.infer_rating_scale`)."""

    min_user_ratings: int = 10
    min_movie_ratings: int = 5
    split: SplitKind = SplitKind.LEAVE_ONE_OUT
    ties: Ties = Ties.FILE
    rating_scale: RatingScale | None = None
    seed: int = 0
    filter_on: FilterOn = FilterOn.LOG


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
    `sampled_items`: how many items estimate the softmax's normalizer in a step; 0: all of them are computed; None: by
    the catalogue's size (`jaxrec.training.step.softmax_sample`)."""

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
