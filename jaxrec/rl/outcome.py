"""What comes of training a policy, whatever it was trained on."""

import dataclasses
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class PolicyOutcome:
    """Whether a new policy is used, and why.

    Attributes:
        used: Whether it replaces what was in use before.
        reason: Why, with the figures.
        figures: What was measured, by policy or control (supervised, policy, ...) and by name.
        differences: Paired gains of the policy, by name, as `mean`, `low` and `high`.
        summary: What was read, how much of it could not be used and why.
    """

    used: bool
    reason: str
    figures: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    differences: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    summary: str = ""


class TrainedPolicy(NamedTuple):
    """`head`: the variables of PolicyHead after the last update; `updates`: one record per update, or per some."""

    outcome: PolicyOutcome
    head: Any
    updates: list[dict[str, float]]
