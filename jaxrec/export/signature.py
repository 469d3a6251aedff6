"""Names, types and shapes of the two graphs' inputs and outputs: the contract with `serve`."""

import dataclasses
from typing import Any

OPSET = 17


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
    "exclude": Tensor("int32", ("batch", "excluded")),
    "k": Tensor("int64", (1,)),
}
_RANKING = {"items": Tensor("int32", ("batch", "k")), "scores": Tensor("float32", ("batch", "k"))}


def sequence_signature(state_width: int) -> Signature:
    """A batch of right-padded histories -> their states and answers."""
    return Signature(
        inputs={
            "item": Tensor("int32", ("batch", "length")),
            "rating": Tensor("float32", ("batch", "length")),
            "gap": Tensor("float32", ("batch", "length")),
            "length": Tensor("int32", ("batch",)),
            **_REQUEST,
        },
        outputs={"state": Tensor("float32", ("batch", state_width)), **_RANKING},
    )


def step_signature(state_width: int) -> Signature:
    """A batch of states and one event for each -> their next states and answers."""
    state = Tensor("float32", ("batch", state_width))
    return Signature(
        inputs={
            "state": state,
            "item": Tensor("int32", ("batch",)),
            "rating": Tensor("float32", ("batch",)),
            "gap": Tensor("float32", ("batch",)),
            **_REQUEST,
        },
        # ONNX wants different names for an input and an output.
        outputs={"next_state": state, **_RANKING},
    )
