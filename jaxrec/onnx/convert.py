"""From weights to ONNX: traces the forward pass in TensorFlow, converts it with tf2onnx, and finishes the graph."""

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from jaxrec.errors import ExportError
from jaxrec.onnx.signature import (
    OPSET,
    Signature,
    parts_signature,
    sequence_query_signature,
    sequence_signature,
    step_query_signature,
    step_signature,
    trend_signature,
)
from jaxrec.onnx.weights import Weights

_LOOPS = {"Loop", "Scan", "If"}
_SEQUENCE_LENS = 4  # the place of the lengths among the inputs of ONNX' LSTM


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """An ONNX model, and the items' arrays that it reads, which many graphs share.

    Attributes:
        content: The model. The arrays are initializers of it whose data lies elsewhere (ONNX' external data); the files
            that it names, NAME.npy, stand for them until `whole` or `jaxrec.onnx.search.externalized` is written.
        arrays: By name.
    """

    content: bytes = dataclasses.field(repr=False)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def whole(self) -> bytes:
        """The model with the arrays in it."""
        from onnx import load_from_string, numpy_helper

        model = load_from_string(self.content)
        for tensor in model.graph.initializer:
            if tensor.name in self.arrays:
                tensor.CopyFrom(numpy_helper.from_array(self.arrays[tensor.name], tensor.name))
        return bytes(model.SerializeToString())


def sequence_graph(weights: Weights) -> Graph:
    """`sequence.onnx`, as `sequence_signature` has it. Raises ExportError."""
    signature = sequence_signature(weights.state_width, weights.width, weights.allow_seen)
    return _graph("sequence", weights, signature, _item_arrays(weights))


def step_graph(weights: Weights) -> Graph:
    """`step.onnx`, as `step_signature` has it. Raises ExportError."""
    signature = step_signature(weights.state_width, weights.width, weights.allow_seen)
    return _graph("step", weights, signature, _item_arrays(weights))


def sequence_query_graph(weights: Weights) -> Graph:
    """`sequence_query.onnx`, as `sequence_query_signature` has it. Raises ExportError."""
    return _graph("sequence_query", weights, sequence_query_signature(weights.state_width, weights.width), {})


def step_query_graph(weights: Weights) -> Graph:
    """`step_query.onnx`, as `step_query_signature` has it. Raises ExportError."""
    return _graph("step_query", weights, step_query_signature(weights.state_width, weights.width), {})


def trend_graph(weights: Weights) -> Graph:
    """`trend.onnx`, as `trend_signature` has it. Raises ExportError."""
    return _graph("trend", weights, trend_signature(len(weights.trend.typical)), {})


def parts_graph(weights: Weights) -> Graph:
    """`parts.onnx`, as `parts_signature` has it. Raises ExportError."""
    names = ("neighbour_item", "neighbour_weight", "part_bias")
    arrays = {name: getattr(weights, name) for name in names}
    return _graph("parts", weights, parts_signature(weights.state_width, weights.width), arrays)


def _item_arrays(weights: Weights) -> dict[str, np.ndarray]:
    return {
        "item_vectors": weights.item_vectors,
        "item_bias": weights.item_bias,
        "neighbour_item": weights.neighbour_item,
        "neighbour_weight": weights.neighbour_weight,
        **({} if weights.new_items is None else {"new_items": weights.new_items}),
        **({} if weights.reranker is None else weights.reranker.items._asdict()),
    }


def _graph(name: str, weights: Weights, signature: Signature, item_arrays: dict[str, np.ndarray]) -> Graph:
    """The function of this name in `tf_forward` as ONNX with the inputs and outputs of the signature.

    `item_arrays` are its `tf_forward.ItemArrays`, or empty for a function without.
    """
    tf, tf2onnx = _load_tensorflow()
    from jaxrec.onnx import tf_forward

    forward = getattr(tf_forward, name)
    specs = {key: tf.TensorSpec(array.shape, array.dtype, key) for key, array in item_arrays.items()}
    for key, tensor in signature.inputs.items():
        shape = [None if isinstance(size, str) else size for size in tensor.shape]
        specs[key] = tf.TensorSpec(shape, tensor.dtype, key)

    def program(*arguments: Any) -> dict[str, Any]:
        count = len(item_arrays)
        inputs = dict(zip(list(specs)[count:], arguments[count:], strict=True))
        items = [tf_forward.item_arrays(dict(zip(item_arrays, arguments[:count], strict=True)))] if count else []
        outputs: dict[str, Any] = forward(weights, *items, **inputs)
        return outputs

    with _fatal_errors(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = tf2onnx.convert.from_function(
            tf.function(program, autograph=False),
            input_signature=list(specs.values()),
            opset=OPSET,
            custom_op_handlers={
                "SelectV2": (_where, []),
                "TensorScatterAdd": (_of_elements, ["ScatterElements", ("reduction", "add")]),
                "TensorScatterUpdate": (_of_elements, ["ScatterElements"]),
                "GatherNd": (_of_elements, ["GatherElements"]),
            },
        )
    _finish(name, model, signature)
    if "length" in signature.inputs:
        for node in model.graph.node:
            if node.op_type == "LSTM":
                # So its last h and c are those of each row's last event.
                node.input[_SEQUENCE_LENS] = "length"
    _place_outside(model, item_arrays)
    return Graph(bytes(model.SerializeToString()), item_arrays)


def _where(context: Any, node: Any, name: str, arguments: list[Any]) -> Any:
    """tf.where as ONNX' Where, which does the same. tf2onnx would make six nodes of it, with products by 0 and 1."""
    node.type = "Where"
    return node


def _of_elements(context: Any, node: Any, name: str, arguments: list[Any]) -> Any:
    """The operator of ONNX that takes the items themselves, in place of `tf_forward.places` (row, item). tf2onnx would
    compute each row's number from the shape."""
    of_places = node.inputs[1]
    while of_places.type not in ("Pack", "Concat"):
        of_places = of_places.inputs[0]
    items = of_places.input[1] if of_places.type == "Pack" else of_places.inputs[1].input[0]
    context.replace_input(node, node.input[1], items, 1)
    for key, value in {"axis": 1, **dict(arguments)}.items():
        node.set_attr(key, value)
    return node


def _place_outside(model: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Makes the items' arrays initializers of a model, without their data. Raises ExportError where it is broken."""
    from onnx import TensorProto, external_data_helper, helper

    graph = model.graph
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    # The check wants the data of an initializer, hence it is made while the arrays are inputs.
    graph.input.extend(helper.make_tensor_value_info(name, kinds[name], arrays[name].shape) for name in arrays)
    _check(model)
    del graph.input[len(graph.input) - len(arrays) :]
    for name, array in arrays.items():
        tensor = TensorProto(name=name, data_type=kinds[name], dims=array.shape, raw_data=b"")
        external_data_helper.set_external_data(tensor, f"{name}.npy", offset=0, length=array.nbytes)
        tensor.ClearField("raw_data")
        graph.initializer.append(tensor)


def _finish(name: str, model: Any, signature: Signature) -> None:
    """Names the inputs, the outputs and their dimensions, and refuses a graph whose LSTMs are not fused."""
    from onnx import helper

    graph = model.graph
    operators = [node.op_type for node in graph.node]
    lstms = 2 if "rating" in signature.inputs else 0
    if operators.count("LSTM") != lstms or not _LOOPS.isdisjoint(operators):
        raise ExportError(f"{name}.onnx: expected {lstms} LSTM operators and no loop, found {sorted(set(operators))}")
    graph.name = name
    del graph.value_info[:]
    _without_scalar_k(graph)
    for place, tensors in ((graph.input, signature.inputs), (graph.output, signature.outputs)):
        del place[:]
        for key, tensor in tensors.items():
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
            place.append(helper.make_tensor_value_info(key, kind, tensor.shape))


def _without_scalar_k(graph: Any) -> None:
    """Hands the input k to the operator as it is; TensorFlow wants a scalar, of which tf2onnx makes a vector again."""
    made = {output: node for node in graph.node for output in node.output}
    chain, name = [], next((node.input[1] for node in graph.node[::-1] if node.op_type == "TopK"), "k")
    while name in made and made[name].op_type in ("Squeeze", "Cast", "Unsqueeze"):
        chain.append(made[name])
        name = chain[-1].input[0]
    if name == "k" and chain:
        for node in graph.node:
            node.input[:] = ["k" if each == chain[0].output[0] else each for each in node.input]
        for node in chain:
            graph.node.remove(node)


def _check(model: Any) -> None:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{model.graph.name}.onnx: the conversion gave a broken graph: {error}") from error


def _load_tensorflow() -> tuple[ModuleType, ModuleType]:
    """TensorFlow, quiet and on the CPU, and tf2onnx."""
    # Read once, when TensorFlow is first imported: errors only, and not the notice about oneDNN.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tensorflow as tf
            import tf2onnx
    except ImportError as error:
        raise ExportError(f'the export needs TensorFlow and tf2onnx: pip install "jaxrec[export]" ({error})') from error
    # A TensorFlow that runs on a GPU takes all of its memory, and JAX' with it.
    if tf.config.get_visible_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")
    return tf, tf2onnx


@contextlib.contextmanager
def _fatal_errors(name: str) -> Iterator[None]:
    """Raises ExportError for what tf2onnx logs as an error: it writes the file all the same."""
    errors: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    logger = logging.getLogger("tf2onnx")
    handler = Collect(logging.ERROR)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    if errors:
        raise ExportError(f"{name}.onnx: tf2onnx: {'; '.join(errors)}")
