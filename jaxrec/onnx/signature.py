"""Names, types and shapes of the graphs' inputs and outputs: the contract with `serve`."""

import dataclasses
from typing import Any

OPSET = 17
PARTS = ("lstm", "content", "policy", "cooccurrence")
"""The columns of what `parts.onnx` answers; the manifest has them, too."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """`dtype` as NumPy names it; a dimension that may vary is named, and equal names mean equal sizes."""

    dtype: str
    shape: tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Signature:
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def to_json(self) -> dict[str, Any]:
        """As the manifest shows it."""
        return dataclasses.asdict(self)


_REQUEST = {
    "request_gap": Tensor("float32", ("batch",)),
    "trend": Tensor("float32", ("items",)),
    "exclude": Tensor("int32", ("batch", "excluded")),
    # One row for all, or one for each.
    "blocked": Tensor("bool", ("blocked_rows", "items")),
    "k": Tensor("int64", (1,)),
}
_SEEN = {"seen": Tensor("int32", ("batch", "seen")), "seen_score": Tensor("float32", ("batch", "seen"))}
_NO_QUERY = ("trend", "exclude", "blocked", "k", *_SEEN)
_RANKING = {"items": Tensor("int32", ("batch", "k")), "scores": Tensor("float32", ("batch", "k"))}


def sequence_signature(state_width: int, vector_width: int, allow_seen: bool = False) -> Signature:
    """A batch of right-padded histories -> their states, answers, and queries: what an item's vector is multiplied
    with. With `allow_seen` items of the histories, 0 for none, come with what is added to their logits."""
    return Signature(
        inputs={
            "item": Tensor("int32", ("batch", "length")),
            "rating": Tensor("float32", ("batch", "length")),
            "gap": Tensor("float32", ("batch", "length")),
            "length": Tensor("int32", ("batch",)),
            **_REQUEST,
            **(_SEEN if allow_seen else {}),
        },
        outputs={
            "state": Tensor("float32", ("batch", state_width)),
            **_RANKING,
            "query": Tensor("float32", ("batch", vector_width)),
        },
    )


def step_signature(state_width: int, vector_width: int, allow_seen: bool = False) -> Signature:
    """A batch of states and one event for each -> their next states, answers and queries; `allow_seen` as above."""
    state = Tensor("float32", ("batch", state_width))
    return Signature(
        inputs={
            "state": state,
            "item": Tensor("int32", ("batch",)),
            "rating": Tensor("float32", ("batch",)),
            "gap": Tensor("float32", ("batch",)),
            **_REQUEST,
            **(_SEEN if allow_seen else {}),
        },
        # ONNX wants different names for an input and an output.
        outputs={"next_state": state, **_RANKING, "query": Tensor("float32", ("batch", vector_width))},
    )


def trend_signature(half_lives: int) -> Signature:
    """The decayed counts of all items, padding included -> what is added to their logits."""
    return Signature(
        inputs={"counts": Tensor("float32", (half_lives, "items"))}, outputs={"trend": Tensor("float32", ("items",))}
    )


def parts_signature(state_width: int, vector_width: int) -> Signature:
    """States and some items, 0 for one that the model does not know, with their vectors -> what PARTS add to their
    logits."""
    return Signature(
        inputs={
            "state": Tensor("float32", ("batch", state_width)),
            "request_gap": Tensor("float32", ("batch",)),
            "item": Tensor("int32", ("batch", "count")),
            "vector": Tensor("float32", ("batch", "count", vector_width)),
        },
        outputs={"parts": Tensor("float32", ("batch", "count", len(PARTS)))},
    )


def sequence_query_signature(state_width: int, vector_width: int) -> Signature:
    """As `sequence_signature`, with the vectors of the items, and the query instead of an answer."""
    whole = sequence_signature(state_width, vector_width)
    inputs = {name: tensor for name, tensor in whole.inputs.items() if name not in _NO_QUERY}
    return Signature(
        inputs={"vector": Tensor("float32", ("batch", "length", vector_width)), **inputs},
        outputs={name: whole.outputs[name] for name in ("state", "query")},
    )


def step_query_signature(state_width: int, vector_width: int) -> Signature:
    """As `step_signature`, with the vector of the item, and the query instead of an answer."""
    whole = step_signature(state_width, vector_width)
    inputs = {name: tensor for name, tensor in whole.inputs.items() if name not in _NO_QUERY}
    vector = Tensor("float32", ("batch", vector_width))
    return Signature(
        inputs={"vector": vector, **inputs},
        outputs={name: whole.outputs[name] for name in ("next_state", "query")},
    )
