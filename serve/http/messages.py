"""Messages of the contract as JSON, by protobuf's own mapping, and errors that say which field is at fault."""

import json
import math
import re
from collections import Counter
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToJson, ParseDict, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from serve.api.errors import InvalidRequest
from serve.http.limits import MAX_JSON_OBJECTS

_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_WHOLE = "a whole number, within the bounds of its type"
_EXPECTED = {
    FieldDescriptor.CPPTYPE_INT32: _WHOLE,
    FieldDescriptor.CPPTYPE_INT64: _WHOLE,
    FieldDescriptor.CPPTYPE_UINT32: _WHOLE,
    FieldDescriptor.CPPTYPE_UINT64: _WHOLE,
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_ENUM: "a name of the enum",
    FieldDescriptor.CPPTYPE_STRING: "a text",
}
LONGEST_NAME = 80
# What protobuf raises for values that it cannot read: numbers that no double holds, among others.
UNREADABLE = (ParseError, OverflowError, SystemError, TypeError, ValueError)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
WELL_KNOWN = "google.protobuf."
"""The package of types with a JSON form of their own."""


def load_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8; raises InvalidRequest that says where it breaks.

    A name that comes twice in an object is an error, and so are NaN and Infinity outside of quotes, numbers that no
    double holds, half a character, and too many objects.
    """

    objects = 0

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_JSON_OBJECTS:
            raise InvalidRequest("message", f"JSON of at most {MAX_JSON_OBJECTS} objects", "more")
        names = dict(pairs)
        if len(names) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise InvalidRequest("message", "each name once in an object", repr(twice[:LONGEST_NAME]))
        return names

    def refuse(constant: str) -> float:
        raise InvalidRequest("message", "JSON, in which such a number is in quotes", constant)

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise InvalidRequest("message", "JSON of a message", "a number that is too large")
        return value

    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except InvalidRequest:
        raise
    except UnicodeEncodeError as error:
        raise InvalidRequest("message", "JSON in UTF-8", "half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest("message", "JSON", f"at {where}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("message", "JSON in UTF-8", f"another byte at {error.start}") from error
    except RecursionError as error:
        raise InvalidRequest("message", "JSON of a message", "values that are nested too deep") from error
    except ValueError as error:  # numbers of thousands of digits
        raise InvalidRequest("message", "JSON of a message", "a number that is too long") from error


def from_json(body: bytes, kind: Descriptor) -> Message:
    """The message of a JSON text; raises InvalidRequest that names the field."""
    return from_value(load_json(body), kind)


def from_value(value: Any, kind: Descriptor) -> Message:
    """The message of a JSON value; raises InvalidRequest that names the field."""
    if not isinstance(value, dict):
        raise InvalidRequest("message", "a JSON object", kind_of(value))
    try:
        return ParseDict(value, GetMessageClass(kind)())
    except (*UNREADABLE, RecursionError) as error:
        try:
            _blame(value, kind, "")
        except RecursionError:
            raise InvalidRequest("message", f"a {kind.name}", "values that are nested too deep") from error
        raise InvalidRequest("message", f"a {kind.name}", "something else") from error


def to_json(encoded: bytes, kind: Descriptor) -> bytes:
    """The JSON text of an encoded message: lowerCamelCase names, 64-bit integers as texts, defaults left out."""
    message = GetMessageClass(kind).FromString(encoded)
    return MessageToJson(message, indent=None, ensure_ascii=False).encode("utf-8")


def _blame(value: Any, kind: Descriptor, where: str) -> None:
    """Raises InvalidRequest for the first field of a message that cannot be read, with the path that gRPC has too."""
    if not isinstance(value, dict):
        raise InvalidRequest(where or "message", f"the object of a {kind.name}", kind_of(value))
    fields = {name: one for one in kind.fields for name in (one.name, one.json_name)}
    groups: dict[str, str] = {}
    for name, inner in value.items():
        one = fields.get(name)
        if one is None:
            path = _joined(where, name[:LONGEST_NAME])
            raise InvalidRequest(path, f"a field of {kind.name}: {', '.join(f.json_name for f in kind.fields)}", "none")
        path = _joined(where, one.name)
        if inner is None:
            continue
        if one.containing_oneof is not None and len(one.containing_oneof.fields) > 1:
            group = one.containing_oneof.name
            if group in groups:
                raise InvalidRequest(path, f"one field of {group}", f"{groups[group]} too")
            groups[group] = one.name
        if _fails(one, inner):
            _blame_value(inner, one, path)


def _blame_value(value: Any, one: FieldDescriptor, path: str) -> None:
    """Raises InvalidRequest for a value that cannot be read as a field's, or for what is wrong within it."""
    is_map = one.message_type is not None and one.message_type.GetOptions().map_entry
    if one.is_repeated and not is_map:
        if not isinstance(value, list):
            raise InvalidRequest(path, "a list", kind_of(value))
        # By halves, so that a long list is not read as often as it has elements.
        first, end = 0, len(value)
        while end - first > 1:
            middle = (first + end) // 2
            first, end = (first, middle) if _fails(one, value[first:middle]) else (middle, end)
        value, path = value[first], f"{path}[{first}]"
    if one.message_type is not None and not is_map and not one.message_type.full_name.startswith(WELL_KNOWN):
        _blame(value, one.message_type, path)
        return
    expected = "an object" if is_map or one.message_type is not None else _EXPECTED[one.cpp_type]
    if one.type == FieldDescriptor.TYPE_BYTES:
        expected = "bytes in base64"
    raise InvalidRequest(path, expected, kind_of(value))


def _fails(one: FieldDescriptor, value: Any) -> bool:
    """Whether a value cannot be read as a field's."""
    assert one.containing_type is not None
    try:
        ParseDict({one.name: value}, GetMessageClass(one.containing_type)())
    except UNREADABLE:
        return True
    return False


def kind_of(value: Any) -> str:
    """What a JSON value is, in a few words, for an error."""
    if isinstance(value, str):
        return _text(value)
    return _KINDS.get(type(value)) or str(value)[:LONGEST_NAME]


def _text(value: str) -> str:
    return f"the text {value[:LONGEST_NAME].encode('utf-8', 'replace').decode()!r}"


def _joined(where: str, name: str) -> str:
    name = name.encode("utf-8", "replace").decode()
    return f"{where}.{name}" if where else name
