"""The manifest of a model directory: its fields, checked one by one."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from serve.model.events import RatingScale
from serve.model.repeat import Buckets, Repeat

MANIFEST = "manifest.json"
SCHEMA_VERSION = 5
POLICIES = "reinforce", "supervised"
LARGEST_ITEM_COUNT = 2**31 - 2
EXCLUDE = "exclude"
SEEN_ITEMS = EXCLUDE, "allow"


class ArtifactError(Exception):
    """A model directory cannot be served; the message names the file and what was expected of it."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the manifest says about the model."""

    model_version: str
    created: str
    policy: str
    has_reranker: bool
    """Whether a reranker changes the scores of the best items."""
    item_count: int
    max_history: int
    rating_scale: RatingScale | None
    genres: tuple[str, ...]
    repeat: Repeat | None
    """None: items of the history are not answered."""

    @property
    def created_time(self) -> int:
        """When it was exported, in seconds since 1970-01-01T00:00Z; 0: `created` is no time after that. A time without
        a zone is UTC."""
        try:
            time = datetime.fromisoformat(self.created)
            return max(0, int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()))
        except (ValueError, OverflowError):
            return 0


def read_manifest(directory: Path) -> "Fields":
    """The manifest of a model directory, of a version that this server reads; raises ArtifactError."""
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_bytes().decode())
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactError(f"{file}: expected one JSON object in UTF-8: {error}") from error
    fields = Fields(file, "", manifest)
    version = fields.get("schema_version", int)
    if version != SCHEMA_VERSION:
        again = "; export it again" if 1 <= version < SCHEMA_VERSION else ""
        fields.fail("schema_version", f"{SCHEMA_VERSION}, the only one this server reads{again}", version)
    return fields


class Fields:
    """The fields of one JSON object, with its place in the manifest for the errors."""

    def __init__(self, file: Path, path: str, value: Any) -> None:
        self._file = file
        self._path = path
        if not isinstance(value, dict):
            raise ArtifactError(f"{file}: {path or 'the manifest'} is {shortened(value)}, expected an object")
        self._value = value

    def __iter__(self) -> Any:
        return iter(self._value)

    def get(self, name: str, kind: type, *, optional: bool = False) -> Any:
        if name not in self._value:
            raise ArtifactError(f"{self._file}: {self._path}{name} is missing, expected {_KINDS[kind]}")
        value = self._value[name]
        if optional and value is None:
            return None
        # JSON knows one kind of number, and Python counts True as an int.
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.fail(name, _KINDS[kind], value)
        return value

    def count(self, name: str) -> int:
        """A whole number in 1..LARGEST_ITEM_COUNT."""
        count: int = self.get(name, int)
        if not 1 <= count <= LARGEST_ITEM_COUNT:
            self.fail(name, f"a number in 1..{LARGEST_ITEM_COUNT}", count)
        return count

    def section(self, name: str) -> "Fields":
        return Fields(self._file, f"{self._path}{name}.", self.get(name, dict))

    def sections(self, name: str) -> "list[Fields]":
        """Of a list of objects."""
        found = enumerate(self.get(name, list))
        return [Fields(self._file, f"{self._path}{name}[{at}].", value) for at, value in found]

    def rising(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers that increase; it may be empty."""
        numbers = self.get(name, list)
        if not _numbers(numbers) or any(low >= high for low, high in pairwise(numbers)):
            self.fail(name, "finite numbers that increase", numbers)
        return tuple(numbers)

    def fail(self, name: str, expected: str, value: object) -> None:
        raise ArtifactError(f"{self._file}: {self._path}{name} is {shortened(value)}, expected {expected}")


_KINDS = {
    **{str: "a text", int: "a whole number", float: "a number"},
    **{bool: "true or false", list: "a list", dict: "an object"},
}


def shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def model_info(fields: Fields) -> ModelInfo:
    """What a manifest says about the model; raises ArtifactError."""
    for name in ("model_version", "created"):
        if not fields.get(name, str):
            fields.fail(name, "a text that is not empty", "")
    policy = fields.get("policy", str)
    if policy not in POLICIES:
        fields.fail("policy", " or ".join(POLICIES), policy)
    for name in ("item_count", "max_history", "opset"):
        fields.count(name)
    scale = None
    if fields.get("rating_scale", dict, optional=True) is not None:
        section = fields.section("rating_scale")
        scale = RatingScale(section.get("minimum", float), section.get("maximum", float))
        if not -np.inf < scale.minimum < scale.maximum < np.inf:
            section.fail("maximum", f"a finite number above the minimum {scale.minimum}", scale.maximum)
    genres = fields.get("genres", list)
    if not all(isinstance(genre, str) for genre in genres) or genres != sorted(set(genres)):
        fields.fail("genres", "a sorted list of different texts", genres)
    return ModelInfo(
        model_version=fields.get("model_version", str),
        created=fields.get("created", str),
        policy=policy,
        has_reranker=fields.get("reranker", bool),
        item_count=fields.get("item_count", int),
        max_history=fields.get("max_history", int),
        rating_scale=scale,
        genres=tuple(genres),
        repeat=_repeat(fields.section("seen")),
    )


def _repeat(fields: Fields) -> Repeat | None:
    """What is added to items of the history; None where they are not answered."""
    items = fields.get("items", str)
    if items not in SEEN_ITEMS:
        fields.fail("items", " or ".join(SEEN_ITEMS), items)
    if items == EXCLUDE:
        return None
    return Repeat(*(_buckets(fields.section(name)) for name in ("count", "ago", "age", "interval")))


def _buckets(fields: Fields) -> Buckets:
    edges, scores = fields.rising("edges"), fields.get("scores", list)
    if not 1 <= len(scores) <= 2 or not all(_numbers(row) and len(row) == len(edges) + 1 for row in scores):
        fields.fail("scores", f"one or two lists of {len(edges) + 1} finite numbers", scores)
    return Buckets(np.array(edges, np.float64), np.array(scores, np.float32))


def _numbers(values: Any) -> bool:
    largest = float(np.finfo(np.float32).max)
    return isinstance(values, list) and all(
        type(value) in (int, float) and -largest <= value <= largest for value in values
    )
