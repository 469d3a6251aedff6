"""Types of events: what a view, a purchase or a dislike means, as one number.

A weight above 0 is a positive event: it is part of the history, and the weight is what it counts as a reward. A weight
below 0 is a negative event: it is not part of the history, and its item is not recommended to the user again. A weight
of 0 is a neutral event: it is kept and changes nothing.
"""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from serve.model.events import INTERACTION

EventTypes = Mapping[str, float]
"""Weights by name."""
BUILT_IN: EventTypes = MappingProxyType(
    {name: 1.0 for name in (INTERACTION, "view", "click", "play", "like", "purchase")} | {"skip": 0.0, "dislike": -1.0}
)
"""How much more a purchase is worth than a click, only a product knows."""
LONGEST_NAME = 64
MOST_TYPES = 100
LARGEST_WEIGHT = 1_000.0


class EventTypesError(ValueError):
    """A file of event types cannot be used; the message names the file and what was expected."""


def read_event_types(path: Path) -> EventTypes:
    """The built-in event types, and those of a file over them.

    Args:
        path: TOML in UTF-8 with a line `name = weight` for each type.

    Returns:
        Weights by name.

    Raises:
        EventTypesError: The file cannot be read, or a name or weight breaks a rule.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EventTypesError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EventTypesError(f"{path}: expected TOML in UTF-8: {error}") from error
    for name, weight in table.items():
        if not 1 <= len(name) <= LONGEST_NAME or "\0" in name or name != name.strip():
            expected = f"names of 1 to {LONGEST_NAME} characters without U+0000 and without spaces around them"
            raise EventTypesError(f"{path}: expected {expected}, came {name[:LONGEST_NAME]!r}")
        # TOML has nan and inf.
        if type(weight) not in (int, float) or not math.isfinite(weight) or abs(weight) > LARGEST_WEIGHT:
            expected = f"a weight in -{LARGEST_WEIGHT:g}..{LARGEST_WEIGHT:g}"
            raise EventTypesError(f"{path}: {name}: expected {expected}, came {str(weight)[:80]}")
    if table.get(INTERACTION, 1) <= 0:
        raise EventTypesError(f"{path}: {INTERACTION}: expected a weight above 0, came {table[INTERACTION]:g}")
    types = {**BUILT_IN, **{name: float(weight) for name, weight in table.items()}}
    if len(types) > MOST_TYPES:
        raise EventTypesError(f"{path}: expected at most {MOST_TYPES} types with the built-in ones, came {len(types)}")
    return types
