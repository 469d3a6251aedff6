"""An OpenAPI 3.1 document of the JSON methods, made from the descriptors and the comments of the contract."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from serve.front.auth import needed_right
from serve.http.connect import path_of
from serve.http.errors import HTTP_STATUS, JSON, code_name
from serve.http.messages import WELL_KNOWN

COMMENTS = "contract.binpb"
"""In serve/pb: the contract with its comments, which the generated code leaves out (`make stubs`)."""
_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "format": "int64", "minimum": 0},
    # Texts in answers; numbers are read as well.
    FieldDescriptor.CPPTYPE_INT64: {"type": ["string", "integer"], "format": "int64"},
    FieldDescriptor.CPPTYPE_UINT64: {"type": ["string", "integer"], "format": "uint64"},
    # "NaN" and "Infinity" are texts.
    FieldDescriptor.CPPTYPE_FLOAT: {"type": ["number", "string"], "format": "float"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": ["number", "string"], "format": "double"},
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
}
_ERROR = {
    "description": "How a call failed, in the form of the Connect protocol.",
    "type": "object",
    "required": ["code", "message"],
    "properties": {
        "code": {"type": "string", "enum": sorted(map(code_name, HTTP_STATUS))},
        "message": {"type": "string"},
        "details": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "value"],
                "properties": {
                    "type": {"description": "Name of the message of the detail.", "type": "string"},
                    "value": {"description": "The message, encoded, in base64.", "type": "string"},
                    "debug": {"description": "The message as JSON."},
                },
            },
        },
    },
}
# (path, method, what it answers)
_OTHERS = (
    ("/healthz", "get", "Whether the server answers: 200, or 503 while it loads a model or ends."),
    ("/v2", "get", "Open Inference Protocol: name and version of the server."),
    ("/v2/health/live", "get", "Open Inference Protocol: whether the process answers."),
    ("/v2/health/ready", "get", "Open Inference Protocol: whether a model is loaded."),
    ("/v2/models/{name}", "get", "Open Inference Protocol: inputs and outputs of a model."),
    ("/v2/models/{name}/ready", "get", "Open Inference Protocol: whether a model is loaded."),
    ("/v2/models/{name}/infer", "post", "Open Inference Protocol: one run of the graph."),
    ("/v2/models/{name}/versions/{version}", "get", "Open Inference Protocol: inputs and outputs of a version."),
    ("/v2/models/{name}/versions/{version}/ready", "get", "Open Inference Protocol: whether a version is loaded."),
    ("/v2/models/{name}/versions/{version}/infer", "post", "Open Inference Protocol: one run of a version's graph."),
)


def openapi(services: Iterable[ServiceDescriptor], version: str, needs_token: bool) -> dict[str, Any]:
    """The document.

    Args:
        services: Whose unary methods are offered.
        version: Of the package.
        needs_token: Whether callers need a token.

    Returns:
        A value that can be written as JSON.
    """
    comments = read_comments()
    methods = [
        method
        for service in services
        for method in service.methods
        if not method.client_streaming and not method.server_streaming
    ]
    types = _reached([kind for method in methods for kind in (method.input_type, method.output_type)])
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "jaxrec", "version": version, "description": "Recommends the next items."},
        "paths": {
            **{path_of(method): {"post": _operation(method, comments)} for method in methods},
            **dict(_others()),
        },
        "components": {
            "schemas": {"Error": _ERROR} | {kind.full_name: _schema(kind, comments) for kind in types},
        },
    }
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def read_comments() -> dict[str, str]:
    """The comments of the contract, by the full names of what they describe."""
    content = files("serve.pb").joinpath(COMMENTS).read_bytes()
    return {name: text for file in FileDescriptorSet.FromString(content).file for name, text in _comments(file)}


def _comments(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    for location in file.source_code_info.location:
        name = _name(file, list(location.path)) if location.leading_comments else ""
        if name:
            yield name, " ".join(location.leading_comments.split())


def _name(file: FileDescriptorProto, path: Sequence[int]) -> str:
    """The full name of what is at a path of numbers of fields and places in descriptor.proto."""
    inner: Any = file
    names = [file.package]
    for number, place in zip(path[::2], path[1::2], strict=False):
        field = inner.DESCRIPTOR.fields_by_number[number]
        if field.message_type is None or not field.is_repeated:
            return ""
        inner = getattr(inner, field.name)[place]
        names.append(getattr(inner, "name", ""))
    return ".".join(names) if len(path) % 2 == 0 and all(names) else ""


def _reached(kinds: Iterable[Descriptor]) -> list[Descriptor | EnumDescriptor]:
    """The types of some messages and all that their fields use, each once."""
    found: dict[str, Descriptor | EnumDescriptor] = {}
    waiting: list[Descriptor | EnumDescriptor] = list(kinds)
    while waiting:
        kind = waiting.pop()
        if kind.full_name in found:
            continue
        if isinstance(kind, EnumDescriptor):
            found[kind.full_name] = kind
            continue
        if not kind.GetOptions().map_entry:
            found[kind.full_name] = kind
        for one in kind.fields:
            inner = one.message_type or one.enum_type
            if inner is not None and not inner.full_name.startswith(WELL_KNOWN):
                waiting.append(inner)
    return [found[name] for name in sorted(found)]


def _operation(method: MethodDescriptor, comments: dict[str, str]) -> dict[str, Any]:
    return {
        "operationId": f"{method.containing_service.name}_{method.name}",
        "tags": [method.containing_service.full_name],
        **_described(comments, method.full_name),
        **_free(path_of(method)),
        "requestBody": {"required": True, "content": {JSON: {"schema": _reference(method.input_type.full_name)}}},
        "responses": {
            "200": {
                "description": comments.get(method.output_type.full_name, "The answer."),
                "content": {JSON: {"schema": _reference(method.output_type.full_name)}},
            },
            "default": {"description": "The call failed.", "content": {JSON: {"schema": _reference("Error")}}},
        },
    }


def _free(path: str) -> dict[str, Any]:
    """That a method asks for no token, if that is so."""
    return {"security": []} if needed_right(path) is None else {}


def _others() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, verb, what in _OTHERS:
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        operation: dict[str, Any] = {"description": what, "responses": {"default": {"description": "JSON."}}}
        operation |= {"security": []} if path == "/healthz" else {}
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        yield path, {verb: operation}


def _schema(kind: Descriptor | EnumDescriptor, comments: dict[str, str]) -> dict[str, Any]:
    described = _described(comments, kind.full_name)
    if isinstance(kind, EnumDescriptor):
        values = [value.name for value in kind.values]
        lines = [
            f"{name}: {comments[f'{kind.full_name}.{name}']}"
            for name in values
            if f"{kind.full_name}.{name}" in comments
        ]
        text = "\n".join([*described.values(), *lines])
        return ({"description": text} if text else {}) | {"type": "string", "enum": values}
    properties = {
        one.json_name: _field(one) | _described(comments, f"{kind.full_name}.{one.name}") for one in kind.fields
    }
    return described | {"type": "object", "properties": properties}


def _field(one: FieldDescriptor) -> dict[str, Any]:
    if one.message_type is not None and one.message_type.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _value(one.message_type.fields_by_name["value"])}
    return {"type": "array", "items": _value(one)} if one.is_repeated else _value(one)


def _value(one: FieldDescriptor) -> dict[str, Any]:
    kind = one.message_type or one.enum_type
    if kind is not None and kind.full_name.startswith(WELL_KNOWN):
        return {"description": f"{kind.full_name}, as protobuf's JSON has it."}
    if kind is not None:
        return _reference(kind.full_name)
    if one.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "contentEncoding": "base64"}
    return dict(_SCALARS[one.cpp_type])


def _described(comments: dict[str, str], name: str) -> dict[str, str]:
    return {"description": comments[name]} if name in comments else {}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
