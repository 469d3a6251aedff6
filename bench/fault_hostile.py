"""Sends malformed and hostile requests to a server, with good ones among them, and looks whether anything breaks.

    python -m bench.fault_hostile MODEL --requests 200000

Every RPC of the server gets random bytes, mutilated messages, messages with hostile values in every field (by its
type: NaN, infinities, negative and huge numbers, empty and overlong and strange texts, overlong lists), wire data that
lies about its lengths, messages beyond the size limit, odd and repeated metadata, impossible deadlines and
cancellations, and there are calls of methods that do not exist. One call in twelve has rules that are mostly good, or
asks what is popular now. With `--http` the messages are JSON, and JSON and HTTP
are mutilated too: texts that break off, that are nested too deep, or that have numbers of thousands of digits or a name
twice; values of another type in each field; inference requests; odd headers, paths and verbs; bodies shorter than they
say; connections that break off. Hundreds of connections stay open: some send nothing, some the head of a request, some
8 MiB for a health check. With `--tls`, that is over TLS, with tokens, and with strangers. Each request must
end with an error status that blames the request, or with a valid answer: never INTERNAL, UNKNOWN or UNAVAILABLE. Every
tenth request is a good one, in the same batches as the bad, and its answer must be what it was before. The server's
memory is noted along the way.
"""

import asyncio
import contextlib
import http.client
import json
import math
import os
import random
import re
import secrets
import socket
import ssl
import struct
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from bench.fronts import deployed, fast_option
from bench.load import memory_mb
from serve.api.rules import MAX_BATCH, MAX_BATCH_ITEMS, MAX_BATCH_METADATA, MAX_BATCH_RULED, MAX_ID_LENGTH, MAX_K
from serve.client import Connection, Event, RecommenderClient, UserEvent, recommend_request
from serve.http.limits import MAX_CONNECTIONS
from serve.pb import model_admin_pb2, open_inference_pb2, recommender_pb2
from serve.pb.recommender_pb2 import (
    BatchRecommendRequest,
    BatchRecommendResponse,
    Boost,
    Pin,
    RecommendRequest,
    RecommendResponse,
    Rules,
    TrendingRequest,
    TrendingResponse,
)
from tests.serve.front.test_security import Authority

CALLERS = 64
HTTP_CALLERS = 16
MOST_HELD = 1500
# File descriptors of the server beside the bounded connections: those that are no connections of the door, and what
# three turns of its loop accept, each up to the backlog of 128. A connection is accepted in one turn, gets its
# transport in the next and ends another one in the third. That one is closed in the fourth, before that turn accepts.
MOST_OTHERS = 100 + 3 * 128
GOOD_EVERY = 10
DEADLINE_S = 60.0
GOOD_USER = "hostile-test-good-user"
RECOMMEND = "/jaxrec.v1.Recommender/Recommend"
BATCH_RECOMMEND = "/jaxrec.v1.Recommender/BatchRecommend"
TRENDING = "/jaxrec.v1.Recommender/Trending"
SERVICES = (
    recommender_pb2.DESCRIPTOR.services_by_name["Recommender"],
    recommender_pb2.DESCRIPTOR.services_by_name["Recommender"],  # twice: it is what clients meet
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    model_admin_pb2.DESCRIPTOR.services_by_name["ModelAdmin"],
)
POOL = Default()
PLAUSIBLE = {
    "name": ["jaxrec", "item", "rating", "gap", "length", "request_gap", "exclude", "k"],
    "model_name": ["jaxrec"],
    "model_version": [""],
    "version": [""],
    "datatype": ["INT32", "INT64", "FP32"],
    "type": ["", "view", "dislike", "skip"],
    "page_token": [""],
}
# Of items that are stored: none of the model's, since the good requests are about these.
STORED_ITEM = "jaxrec.v1.Item.item_id"
STORED_ITEM_IDS = ["hostile-1", "hostile-2", "", "\x00", "x" * MAX_ID_LENGTH, "x" * (MAX_ID_LENGTH + 1), " hostile"]
# What a server may say of a bad request. DEADLINE_EXCEEDED and CANCELLED are what the client asked for.
BLAMES_THE_REQUEST = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}
TEXTS = [
    "",
    "1",
    "u",
    "good",
    "\x00",
    "\x1b[2J",
    "ü" * 300,
    "x" * MAX_ID_LENGTH,
    "x" * (MAX_ID_LENGTH + 1),
    "\U0010ffff",
    "../../etc/passwd",
]
FLOATS = [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 5.0, 1e-45, 3.4e38, -3.4e38]
INTEGERS = [0, 1, -1, 10, 1000, 1001, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1]
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (0, 2**31 - 1),
}


JSON_TEXTS = [
    b"",
    b"null",
    b"[]",
    b'"x"',
    b"1",
    b"[" * 5_000,
    b'{"history":' * 5_000,
    b'{"k": ' + b"9" * 5_000 + b"}",
    b'{"k": 1e400}',
    b'{"k": NaN}',
    b'{"k": -Infinity}',
    b'{"k": 1, "k": 2}',
    b'{"userId": "\\ud800"}',
    b'{"userId": "\xff"}',
    b'\xef\xbb\xbf{"userId": "u"}',
    b'{"userId": null}',
    b'{"userId": {"a": 1}}',
    b'{"no such field": 1}',
    b'{"history": {"events": [null]}}',
    b'{"filter": {"anyTags": "Comedy"}}',
    b"{" + b" " * 100_000 + b"}",
    b'{"@type": "x"}',
]
# Texts of JSON values that no field has, or few.
ODD_VALUES = [
    *("null", "true", "1", "-1", "1.5", "1e400", "-1e400", "1" + "0" * 30, "1" + "0" * 400, "1" + "0" * 4000),
    *('""', '"x"', '"NaN"', '"1e400"', '"\\ud800"', '" 1"', '"1_0"', '"\u0661"', '"="', "[]", "[null]", "[[]]", "[1]"),
    *('["x"]', "[{}]", "{}", '{"x": 1}', '{"": null}', '{"a": [1, null, 1e400]}', '{"\\ud800": "x"}'),
    *('{"a": "\\ud800"}', '{"a": 1' + "0" * 400 + "}", "[[[[[[[[[[1]]]]]]]]]]", '{"a": ' * 200 + "1" + "}" * 200),
]
INFER = "/v2/models/jaxrec/infer"
# Of one row; a tensor is one of each.
INFER_FIELDS = {"name": '"k"', "datatype": '"INT64"', "shape": "[1]", "data": "[3]"}
INFER_TOP = {"inputs": "[]", "outputs": "[]", "id": '"1"', "parameters": "{}", "modelName": '"x"', "contents": "{}"}
# What a stranger may call.
HEALTH = (
    b"POST /grpc.health.v1.Health/Check HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: "
)
# Eight of these would fill what the bodies of all requests may have together; the last byte does not come.
LONG = HEALTH + b"8388608\r\n\r\n" + b" " * (2**23 - 1)
VERBS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"]
PATHS = [
    *("/", "/healthz", "/openapi.json", "/v2", "/v2/health/ready", "/v2/models/jaxrec", "/v2/models/%00/ready"),
    *("/../../etc/passwd", "//", "/%ff", "/v2/models/" + "x" * 5_000, "/jaxrec.v1.Recommender/", "/a?b=c&d", "/;"),
]
HTTP_HEADERS = [
    *(("content-type", "text/plain"), ("content-type", ""), ("content-type", "application/proto")),
    *(("content-encoding", "gzip"), ("connect-timeout-ms", "-1"), ("connect-timeout-ms", "1")),
    *(("connect-protocol-version", "9"), ("authorization", "Bearer nobody-asked-for-it"), ("x-request-id", "x" * 1000)),
    *(("traceparent", "00-zz-1"), ("expect", "100-continue"), ("upgrade", "h2c"), ("te", "trailers")),
    *(("host", "example.org"), ("x-many", "y" * 3000), ("accept", "\x01"), ("range", "bytes=0-1")),
]
# By what an HTTP client may be told of a bad request, 503 and other fives aside.
BLAMES_THE_HTTP_REQUEST = {400, 401, 404, 405, 408, 413, 415, 421, 429, 431, 499, 501, 504}


class Attack(NamedTuple):
    """One hostile call."""

    method: str
    message: bytes
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_s: float = DEADLINE_S
    cancelled: bool = False


@dataclass(frozen=True)
class HttpAttack:
    """One hostile request."""

    verb: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    raw: bytes = b""
    """Sent as it is in place of all of it, and the connection ended."""
    held: int = 0
    """So many connections that send `raw`, or nothing, and stay open."""


@dataclass
class Outcome:
    """What came of the requests."""

    hostile: int = 0
    good: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Of the first failures, what they were."""
    memory_mb: list[float] = field(default_factory=list)
    """Resident, before the first request and after each tenth of them."""
    descriptors: int = 0
    """Most file descriptors of the server."""


class Attacker:
    """Makes hostile calls; the same seed makes the same."""

    def __init__(self, item_ids: Sequence[str], tags: Sequence[str], seed: int, *, behind_nginx: bool = False) -> None:
        self._behind_nginx = behind_nginx
        self._random = random.Random(seed)
        self._tags = tags
        # Few, since they are users' names too, and the server may remember ten thousand users.
        self._item_ids = self._random.sample(list(item_ids), min(200, len(item_ids)))

    def attack(self) -> Attack:
        chance = self._random
        service = chance.choice(SERVICES)
        method = chance.choice(service.methods)
        name = f"/{service.full_name}/{method.name}"
        kind = chance.random()
        if chance.random() < 1 / 12:
            return self._with_rules()
        message = self._message(_class_of(method.input_type.full_name)).SerializeToString()
        if kind < 0.15:
            return Attack(name, chance.randbytes(chance.choice([0, 1, 5, 50, 500])))
        if kind < 0.4:
            return Attack(name, self._mutilated(message) if kind < 0.3 else self._lying())
        if kind < 0.44:
            return Attack(f"/{chance.choice(['no.Service', service.full_name])}/{chance.randbytes(4).hex()}", message)
        if kind > 0.98:
            return Attack(BATCH_RECOMMEND, self._too_large_batch())
        return Attack(
            name,
            message,
            self._metadata() if kind < 0.55 else (),
            chance.choice([1e-6, 1e-3]) if 0.55 < kind < 0.57 else DEADLINE_S,
            cancelled=0.57 < kind < 0.59,
        )

    def _with_rules(self) -> Attack:
        """Rules that are mostly good, of a request or of a batch, and what is popular now."""
        chance = self._random

        def subject() -> dict[str, Any]:
            return chance.choice([{"tag": chance.choice(self._tags)}, {"item_id": chance.choice(self._item_ids)}])

        def single() -> RecommendRequest:
            k = chance.choice([1, 3, 10, 200])
            factors = chance.choices([0.01, 2, 100], k=chance.choice([0, 2, 12]))
            rules = Rules(
                boosts=[Boost(**subject(), factor=factor) for factor in factors],
                diversity=chance.choice([0, 0.3, 1, *FLOATS]),
                max_per_tag=chance.choice([0, 1, 3]),
                pins=[Pin(**subject(), position=chance.randint(1, k)) for _ in range(chance.choice([0, 1, 3]))],
            )
            history = [Event(item_id=chance.choice(self._item_ids), timestamp=at) for at in range(1, 6)]
            return recommend_request(history=history, k=k, rules=rules)

        kind = chance.random()
        if kind < 0.2:
            asked = TrendingRequest(
                k=chance.choice([0, 5, 1000, 1001]),
                window=chance.choice([0, 1, 5, 6]),  # type: ignore[arg-type]
                exclude_item_ids=chance.sample(self._item_ids, 5),
            )
            return Attack(TRENDING, asked.SerializeToString())
        if kind < 0.4:
            batch = BatchRecommendRequest(requests=[single() for _ in range(chance.choice([1, 5, 60]))])
            return Attack(BATCH_RECOMMEND, batch.SerializeToString())
        return Attack(RECOMMEND, single().SerializeToString())

    def http_attack(self) -> HttpAttack:
        chance = self._random
        service = chance.choice(SERVICES)
        method = chance.choice(service.methods)
        path = f"/{service.full_name}/{method.name}"
        message = self._message(_class_of(method.input_type.full_name))
        text = MessageToJson(message, indent=None, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        whole = head + f"Content-Length: {len(text) + chance.choice([0, 5])}\r\n\r\n".encode() + text
        headers = tuple(chance.choices(HTTP_HEADERS, k=chance.choice([1, 2, 5])))
        attacks = {
            HttpAttack("POST", path, text): 35,
            HttpAttack("POST", path, self._mutilated(text)): 20,
            HttpAttack("POST", path, chance.randbytes(chance.choice([0, 1, 5, 50, 500]))): 10,
            HttpAttack("POST", path, chance.choice(JSON_TEXTS)): 10,
            HttpAttack("POST", path, text, headers): 10,
            HttpAttack("POST", path, self._odd(method.input_type).encode()): 20,
            HttpAttack("POST", INFER, self._odd_inference().encode()): 10,
            HttpAttack("POST", INFER, text): 2,
            HttpAttack("", path, b"", raw=LONG, held=8): 0.05,
            HttpAttack("", path, b"", raw=HEALTH + b"9\r\n\r\n", held=chance.choices([1, 600], [30, 1])[0]): 1,
            HttpAttack("", path, b"", held=chance.choices([1, 600], [30, 1])[0]): 1,
            HttpAttack(chance.choice(VERBS), chance.choice([path, *PATHS]), text): 5,
            HttpAttack("", path, b"", raw=self._mutilated(whole)): 3,
            HttpAttack("", path, b"", raw=whole[: chance.randrange(len(whole))]): 2,
        }
        return chance.choices(list(attacks), list(attacks.values()))[0]

    def _odd(self, kind: Descriptor, depth: int = 0) -> str:
        """JSON of a message with an odd value somewhere in it."""
        chance = self._random
        if not kind.fields:
            return chance.choice(ODD_VALUES)
        one = chance.choice(kind.fields)
        if one.message_type is None or depth > 3 or chance.random() < 0.3:
            value = chance.choice(ODD_VALUES)
        else:
            value = self._odd(one.message_type, depth + 1)
            value = f"[{value}]" if one.is_repeated and not one.message_type.GetOptions().map_entry else value
        return f'{{"{one.json_name}": {value}}}'

    def _odd_inference(self) -> str:
        chance = self._random
        tensor = INFER_FIELDS | {chance.choice([*INFER_FIELDS, *INFER_TOP]): chance.choice(ODD_VALUES)}
        whole = {"inputs": f"[{_object(tensor)}]"}
        if chance.random() < 0.5:
            whole[chance.choice(list(INFER_TOP))] = chance.choice([*INFER_TOP.values(), *ODD_VALUES])
        return _object(whole)

    def _message(self, kind: type[Message], depth: int = 0) -> Message:
        """Every field is left out, or filled with what its type can hold at worst, or with something plausible."""
        message = kind()
        for one in kind.DESCRIPTOR.fields:
            if self._random.random() < 0.25 or depth > 4:
                continue
            if one.message_type is not None and one.message_type.GetOptions().map_entry:
                if one.message_type.fields_by_name["value"].cpp_type == FieldDescriptor.CPPTYPE_STRING:
                    entries = [self._random.choices(TEXTS, k=2) for _ in range(self._count(one, depth))]
                    getattr(message, one.name).update(entries)
                continue
            if one.is_repeated:
                values = [self._value(one, depth) for _ in range(self._count(one, depth))]
                getattr(message, one.name).extend(values)
            elif one.message_type is not None:
                getattr(message, one.name).CopyFrom(self._value(one, depth))
            else:
                setattr(message, one.name, self._value(one, depth))
        return message

    def _too_large_batch(self) -> bytes:
        """Too many items in all, by whichever limit, with counts among them that would lower the sum."""
        chance = self._random
        kind = chance.choice([{}, {"view": recommender_pb2.VIEW_FULL}, {"rules": recommender_pb2.Rules(diversity=0.5)}])
        counts = [*[MAX_K] * chance.randrange(MAX_BATCH_ITEMS // MAX_K + 1, MAX_BATCH - 5), *[-(2**31)] * 5]
        chance.shuffle(counts)
        requests = [RecommendRequest(user_id=chance.choice(self._item_ids), k=k, **kind) for k in counts]
        return BatchRecommendRequest(requests=requests).SerializeToString()

    def _count(self, one: FieldDescriptor, depth: int) -> int:
        if depth == 0 and one.message_type is None and self._random.random() < 0.02:
            return 10_001
        return self._random.choice([0, 1, 1, 2, 5, 30 if depth < 2 else 3])

    def _value(self, one: FieldDescriptor, depth: int) -> Any:
        chance, kind = self._random, one.cpp_type
        value: Any
        if one.full_name == STORED_ITEM:
            value = chance.choice(STORED_ITEM_IDS)
        elif one.message_type is not None:
            value = self._message(_class_of(one.message_type.full_name), depth + 1)
        elif one.type == FieldDescriptor.TYPE_BYTES:
            value = chance.randbytes(chance.choice([0, 4, 7, 4096]))
        elif kind == FieldDescriptor.CPPTYPE_STRING:
            plausible = PLAUSIBLE.get(one.name, chance.choices(self._item_ids, k=len(TEXTS)))
            value = chance.choice(plausible if chance.random() < 0.5 else TEXTS)
        elif kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            value = chance.choice(FLOATS)
        elif kind == FieldDescriptor.CPPTYPE_BOOL:
            value = chance.random() < 0.5
        else:
            low, high = RANGES[kind]
            value = min(max(chance.choice(INTEGERS), low), high)
        return value

    def _mutilated(self, message: bytes) -> bytes:
        chance, mutilated = self._random, bytearray(message)
        for _ in range(chance.choice([1, 1, 3, 10])):
            if not mutilated:
                break
            at = chance.randrange(len(mutilated))
            what = chance.random()
            if what < 0.4:
                mutilated[at] ^= 1 << chance.randrange(8)
            elif what < 0.7:
                del mutilated[at:]
            else:
                mutilated[at:at] = chance.randbytes(3)
        return bytes(mutilated)

    def _lying(self) -> bytes:
        """A field that says that it is longer than all there is, nested groups, or far too many of one field."""
        chance = self._random
        tag = bytes([chance.randrange(1, 8) << 3 | chance.choice([0, 1, 2, 3, 5])])
        return chance.choice(
            [
                tag + b"\xff\xff\xff\xff\x07" + b"x" * 10,
                tag + b"\xff" * 10,
                bytes([chance.randrange(1, 8) << 3 | 3]) * 200,
                (b"\x12\x02\x0a\x00" * 10_001),
                tag + struct.pack("<d", math.nan),
                b"\x0a\x80\x80\x80\x80\x08",
                # k = 2**31, which int32 reads as the lowest number.
                b"\x0a\x01u\x20\x80\x80\x80\x80\x08",
                bytes(5_000_000 if chance.random() < 0.02 else 5),
            ]
        )

    def _metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        chance = self._random
        entries: list[tuple[str, str | bytes]] = [
            ("x-request-id", "a"),
            ("x-request-id", "x" * 1000),
            ("x-request-id", ""),
            ("authorization", "Bearer nobody-asked-for-it"),
            ("authorization", ""),
            ("traceparent", "00-zz-1"),
            ("trace-bin", chance.randbytes(20)),
            ("grpc-previous-rpc-attempts", "-1"),
            ("x-many", "y" * 3000),
        ]
        if self._behind_nginx:
            # nginx 1.22 ends the connection of a client that sends this twice in a call, and good calls share it.
            entries.remove(("authorization", ""))
        return tuple(chance.choices(entries, k=chance.choice([1, 2, 5])))


def _object(fields: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


def _class_of(full_name: str) -> type[Message]:
    return GetMessageClass(POOL.FindMessageTypeByName(full_name))


def good_requests(item_ids: Sequence[str]) -> list[RecommendRequest]:
    """Histories of several lengths, and one stored user."""
    histories = [
        [Event(item_id=item_ids[(7 * at + length) % len(item_ids)], timestamp=1000 * (at + 1)) for at in range(length)]
        for length in (1, 2, 5, 20, 45)
    ]
    requests = [recommend_request(history=history, k=5, request_time=10**6) for history in histories]
    # No diversity: items that hostile calls store may be more unlike the others than those of the model.
    rules = Rules(pins=[Pin(item_id=item_ids[-1], position=2)])
    return [
        *requests,
        recommend_request(user_id=GOOD_USER, k=5),
        recommend_request(history=histories[2], k=5, request_time=10**6, rules=rules),
    ]


def is_answer(request: bytes, answer: bytes, item_ids: frozenset[str]) -> bool:
    """Whether an answer of Recommend is one that a client can use."""
    asked, got = RecommendRequest.FromString(request), RecommendResponse.FromString(answer)
    ids = [one.item_id for one in got.recommendations]
    return (
        len(ids) <= (asked.k or 10)
        and len(set(ids)) == len(ids)
        and item_ids.issuperset(ids)
        and not {event.item_id for event in asked.history.events} & set(ids)
        and all(math.isfinite(one.score) for one in got.recommendations)
        and bool(got.recommendation_id and got.model_version and got.policy)
        and _keeps_rules(asked.rules, got)
    )


def _keeps_rules(rules: Rules, got: RecommendResponse) -> bool:
    """Whether no tag comes more often than it may, as far as the answer has tags."""
    counts = Counter(tag for one in got.recommendations for tag in one.genres)
    return not rules.max_per_tag or max(counts.values(), default=0) <= rules.max_per_tag


def is_trending(request: bytes, answer: bytes) -> bool:
    """Whether an answer of Trending is one that a client can use."""
    asked, got = TrendingRequest.FromString(request), TrendingResponse.FromString(answer)
    ids, counts = [one.item_id for one in got.items], [one.count for one in got.items]
    return (
        len(ids) <= (asked.k or 10)
        and len(set(ids)) == len(ids)
        and not set(asked.exclude_item_ids) & set(ids)
        and all(math.isfinite(count) and count >= 0 for count in counts)
        and counts == sorted(counts, reverse=True)
    )


def are_answers(request: bytes, answer: bytes, item_ids: frozenset[str]) -> bool:
    """Whether an answer of BatchRecommend has for each request an answer, or an error that blames it, and the batch was
    within the limits."""
    asked, got = BatchRecommendRequest.FromString(request), BatchRecommendResponse.FromString(answer)
    blamed = {code.value[0] for code in BLAMES_THE_REQUEST}
    counts = [(one.k or 10, one) for one in asked.requests if 0 <= one.k <= MAX_K]
    within = (
        sum(k for k, _ in counts) <= MAX_BATCH_ITEMS
        and sum(k for k, one in counts if one.view == recommender_pb2.VIEW_FULL) <= MAX_BATCH_METADATA
        and sum(k for k, one in counts if one.HasField("rules")) <= MAX_BATCH_RULED
    )
    return (
        within
        and len(got.results) == len(asked.requests)
        and all(
            one.error.code in blamed
            if one.HasField("error")
            else is_answer(single.SerializeToString(), one.response.SerializeToString(), item_ids)
            for single, one in zip(asked.requests, got.results, strict=True)
        )
    )


def same_answer(first: RecommendResponse, second: RecommendResponse) -> bool:
    """Whether two answers recommend the same, up to the rounding of batches of other sizes."""
    if [one.item_id for one in first.recommendations] != [one.item_id for one in second.recommendations]:
        return False
    pairs = zip(first.recommendations, second.recommendations, strict=True)
    return all(math.isclose(one.score, other.score, abs_tol=1e-3) for one, other in pairs)


def attack_server(
    address: str,
    process_id: int,
    item_ids: Sequence[str],
    requests: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    *,
    behind_nginx: bool = False,
) -> Outcome:
    """Sends so many requests to a running server, which nobody else uses."""
    good = good_requests(item_ids)
    with RecommenderClient(address, DEADLINE_S) as client:
        client.record_events(
            UserEvent(event_id=f"hostile-test-{at}", user_id=GOOD_USER, item_id=item_ids[at], timestamp=at)
            for at in range(1, 11)
        )
        expected = [one for one in client.batch_recommend(good) if isinstance(one, RecommendResponse)]
        tags = list(client.get_model_info().genres)
    attacker = Attacker(sorted(item_ids), tags, seed, behind_nginx=behind_nginx)
    known = frozenset([*item_ids, *STORED_ITEM_IDS])
    return asyncio.run(_attack(address, process_id, known, requests, attacker, good, expected, progress))


async def _attack(
    address: str,
    process_id: int,
    item_ids: frozenset[str],
    requests: int,
    attacker: Attacker,
    good: Sequence[RecommendRequest],
    expected: Sequence[RecommendResponse],
    progress: Callable[[str], None],
) -> Outcome:
    outcome = Outcome()
    outcome.memory_mb.append(memory_mb([process_id]))
    sent = 0

    async def attacked(channel: grpc.aio.Channel) -> None:
        one = attacker.attack()
        call = channel.unary_unary(one.method)(one.message, timeout=one.timeout_s, metadata=one.metadata)
        if one.cancelled:
            await asyncio.sleep(0)
            call.cancel()
        outcome.hostile += 1
        try:
            answer = await call
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.CANCELLED
            outcome.statuses[code.name] += 1
            if code not in BLAMES_THE_REQUEST:
                outcome.broken.append(f"{code.name} for {one}")
            return
        outcome.statuses["OK"] += 1
        if one.method == RECOMMEND and not is_answer(one.message, answer, item_ids):
            outcome.broken.append(f"no valid answer to {one}")
        if one.method == TRENDING and not is_trending(one.message, answer):
            outcome.broken.append(f"no valid answer to {one}")
        if one.method == BATCH_RECOMMEND and not are_answers(one.message, answer, item_ids):
            outcome.broken.append(f"no valid answers to {one}")

    async def asked(channel: grpc.aio.Channel, at: int) -> None:
        outcome.good += 1
        try:
            answer = await channel.unary_unary(RECOMMEND)(good[at].SerializeToString(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            outcome.broken.append(f"{error.code().name} for a good request: {error.details()}")
            return
        if not same_answer(RecommendResponse.FromString(answer), expected[at]):
            outcome.broken.append(f"another answer to the good request {at}")

    async def caller(channel: grpc.aio.Channel) -> None:
        nonlocal sent
        while sent < requests and len(outcome.broken) < 20:
            sent += 1
            number = sent
            if number % GOOD_EVERY == 0:
                await asked(channel, (number // GOOD_EVERY) % len(good))
            else:
                await attacked(channel)
            if number % max(1, requests // 10) == 0:
                outcome.memory_mb.append(memory_mb([process_id]))
                progress(f"{number} requests, {outcome.memory_mb[-1]:.0f} MB, {len(outcome.broken)} broken")

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(caller(channel) for _ in range(CALLERS)))
    return outcome


class Way(NamedTuple):
    """How the HTTP door is reached."""

    port: int
    tls: ssl.SSLContext | None
    token: str | None

    def connection(self) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection("localhost", self.port, timeout=DEADLINE_S)
        return http.client.HTTPSConnection("localhost", self.port, timeout=DEADLINE_S, context=self.tls)

    def opened(self, handshake: bool = True) -> socket.socket:
        plain = socket.create_connection(("localhost", self.port), DEADLINE_S)
        if self.tls is None or not handshake:
            return plain
        return self.tls.wrap_socket(plain, server_hostname="localhost")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"authorization": f"Bearer {self.token}"}


def attack_http(
    address: str,
    url: str,
    process_id: int,
    item_ids: Sequence[str],
    requests: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    ca: Path | None = None,
    token: str | None = None,
) -> Outcome:
    """As `attack_server`, over HTTP; the good requests too, each on a connection of its own.

    With a token, each fifth hostile request is a stranger's.
    """
    way = Way(int(url.rpartition(":")[2]), None if ca is None else ssl.create_default_context(cafile=str(ca)), token)
    good = good_requests(item_ids)
    held: deque[socket.socket] = deque()
    server = address if ca is None else f"localhost:{address.rpartition(':')[2]}"
    with RecommenderClient(Connection(server, DEADLINE_S, ca=ca, token=token)) as client:
        client.record_events(
            UserEvent(event_id=f"hostile-test-{at}", user_id=GOOD_USER, item_id=item_ids[at], timestamp=at)
            for at in range(1, 11)
        )
        expected = [one for one in client.batch_recommend(good) if isinstance(one, RecommendResponse)]
        tags = list(client.get_model_info().genres)
    attacker, outcome, lock = Attacker(sorted(item_ids), tags, seed), Outcome(), threading.Lock()
    outcome.memory_mb.append(memory_mb([process_id]))
    numbers = iter(range(1, requests + 1))

    def caller() -> None:
        connection = way.connection()
        while len(outcome.broken) < 20:
            with lock:
                number = next(numbers, None)
                attack = attacker.http_attack()
            if number is None:
                break
            if number % GOOD_EVERY == 0:
                at = (number // GOOD_EVERY) % len(good)
                outcome.good += 1
                flaw = _asked_over_http(way, good[at], expected[at])
            else:
                outcome.hostile += 1
                status, flaw = _attacked_over_http(connection, way, attack, number % 5 == 0, held)
                outcome.statuses[status] += 1
                if attack.held:
                    outcome.descriptors = max(outcome.descriptors, len(os.listdir(f"/proc/{process_id}/fd")))
                    if ca is None and outcome.descriptors > MAX_CONNECTIONS + MOST_OTHERS:
                        flaw = f"{outcome.descriptors} file descriptors"
            if flaw:
                outcome.broken.append(flaw)
            if number % max(1, requests // 10) == 0:
                outcome.memory_mb.append(memory_mb([process_id]))
                progress(f"{number} requests, {outcome.memory_mb[-1]:.0f} MB, {len(outcome.broken)} broken")
        connection.close()

    with ThreadPoolExecutor(HTTP_CALLERS) as pool:
        for ended in [pool.submit(caller) for _ in range(HTTP_CALLERS)]:
            ended.result()
    for opened in held:
        opened.close()
    return outcome


def _asked_over_http(way: Way, request: RecommendRequest, expected: RecommendResponse) -> str:
    """What is wrong with the answer to a good request; empty: nothing."""
    try:
        return _asked_once(way, request, expected)
    except (OSError, http.client.HTTPException):
        # One connection too many may have ended it.
        try:
            return _asked_once(way, request, expected)
        except (OSError, http.client.HTTPException) as error:
            return f"{error!r} for a good request"


def _asked_once(way: Way, request: RecommendRequest, expected: RecommendResponse) -> str:
    connection = way.connection()
    try:
        headers = {"content-type": "application/json"} | way.headers
        connection.request("POST", RECOMMEND, MessageToJson(request), headers)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        return f"{answer.status} for a good request: {body[:200]!r}"
    same = same_answer(Parse(body, RecommendResponse()), expected)
    return "" if same else f"another answer to {request}"


def _attacked_over_http(
    connection: http.client.HTTPConnection, way: Way, attack: HttpAttack, stranger: bool, held: deque[socket.socket]
) -> tuple[str, str]:
    """The status, and what is wrong with it."""
    if attack.held:
        for _ in range(attack.held):
            with contextlib.suppress(OSError):
                # Without anything sent, TLS is not begun either.
                held.append(opened := way.opened(handshake=bool(attack.raw)))
                opened.settimeout(1)
                opened.sendall(attack.raw)
        while len(held) > MOST_HELD:
            held.popleft().close()
        return "held", ""
    if attack.raw:
        with contextlib.suppress(OSError), way.opened() as opened:
            opened.sendall(attack.raw)
            opened.shutdown(socket.SHUT_WR)
            while opened.recv(2**16):
                pass
        return "cut off", ""
    try:
        connection.putrequest(attack.verb, attack.path, skip_host=any(name == "host" for name, _ in attack.headers))
        usual = {"content-type": "application/json", "content-length": str(len(attack.body))}
        for name, value in (usual | ({} if stranger else way.headers)).items():
            if name not in dict(attack.headers):
                connection.putheader(name, value)
        for name, value in attack.headers:
            connection.putheader(name, value)
        connection.endheaders(attack.body)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        # The server may end the connection of what is not HTTP; whether it lives, the good requests tell.
        connection.close()
        return "ended", ""
    return str(answer.status), _flaw(attack, answer.status, body, way.token is not None)


def _flaw(attack: HttpAttack, status: int, body: bytes, with_tokens: bool) -> str:
    if attack.path.endswith("/ready") and status == 503:
        return ""  # of a model that there is not
    if status == 200:
        encoded = ("content-type", "application/proto") in attack.headers
        if attack.path == RECOMMEND and attack.verb == "POST" and not encoded:
            try:
                Parse(body, RecommendResponse())
            except ParseError:
                return f"no valid answer to {attack}"
        return ""
    if (status == 401) > with_tokens or status not in BLAMES_THE_HTTP_REQUEST:
        return f"{status} {body[:200]!r} for {attack}"
    if attack.verb == "HEAD" or body == b"Invalid HTTP request received.":
        return ""
    said = json.loads(body).keys()
    return "" if {"code", "message"} <= said or "error" in said else f"{body[:200]!r} is no error, for {attack}"


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--requests", type=click.IntRange(1), default=200_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--http", "over_http", is_flag=True, help="Over HTTP, not over gRPC.")
@click.option("--tls", "over_tls", is_flag=True, help="With --http: over TLS, with tokens.")
@fast_option
def main(model: Path, requests: int, seed: int, over_http: bool, over_tls: bool, fast: bool) -> None:
    """Attack the server on the model directory MODEL."""
    if fast and (over_http or over_tls):
        raise click.UsageError("--fast is for gRPC without TLS: leave out --http and --tls")
    from serve.model.directory import read_artifact

    item_ids = read_artifact(model).catalog.item_ids[1:]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        options: tuple[str, ...] = ("--http", "127.0.0.1:0") if over_http else ()
        ca = token = None
        if over_tls:
            authority, token = Authority(Path(folder) / "authority"), secrets.token_hex(16)
            ca, (certificate, key) = authority.ca, authority.issue("localhost")
            (Path(folder) / "tokens").write_text(f"read,write,users,catalogue,admin {token}\n")
            options += ("--tls-cert", str(certificate), "--tls-key", str(key))
            options += ("--tokens-file", str(Path(folder) / "tokens"))
        with deployed(model, Path(folder) / "events.sqlite", Path(folder), fast=fast, options=options, stderr=log) as (
            server,
            address,
        ):
            rest = (server.process.pid, item_ids, requests, seed, lambda line: click.echo(line, err=True))
            if over_http:
                outcome = attack_http(server.address, server.line.split(" and ")[1].split(" ")[0], *rest, ca, token)
            else:
                outcome = attack_server(address, *rest, behind_nginx=fast)
            alive = server.process.poll() is None
        lines = (Path(folder) / "log").read_text(encoding="utf-8").split("\n")
    errors = [line for line in lines if re.search(r'"level": "(ERROR|CRITICAL)"|^Traceback', line)]
    click.echo(f"{outcome.hostile} hostile and {outcome.good} good requests, seed {seed}; the server lives: {alive}")
    click.echo(f"statuses: {', '.join(f'{name} {count}' for name, count in outcome.statuses.most_common())}")
    memory = " ".join(f"{mb:.0f}" for mb in outcome.memory_mb)
    click.echo(f"memory, MB: {memory}; errors in the server's log: {len(errors)}")
    if over_http:
        click.echo(f"most file descriptors of the server: {outcome.descriptors}")
    click.echo(f"broken: {len(outcome.broken)}")
    for line in outcome.broken[:20] + errors[:20]:
        click.echo(line[:2000])
    if outcome.broken or not alive or errors:
        raise click.ClickException("the server did not withstand")


if __name__ == "__main__":
    main()
