"""Who gets in: TLS, client certificates, tokens and their rights, and no open door by mistake."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from serve.addresses import SecurityError, check_exposure
from serve.client import Connection, Item, RecommenderClient, UserEvent
from serve.front import auth
from serve.front.auth import NEEDED, Tokens, needed_right, parse_tokens, read_tokens
from serve.front.server import Listener, create_server
from serve.front.tls import Tls
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb import model_admin_pb2 as pb
from serve.pb import open_inference_pb2
from serve.pb.model_admin_pb2_grpc import ModelAdminStub
from serve.pb.recommender_pb2 import DESCRIPTOR, GetModelInfoRequest, RecommendRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.loading import ModelLoader, open_models
from serve.stores.base import EventStore
from tests.serve.one_model import one_model

READER, WRITER, ADMIN = "reader-token-0123", "writer-token-0123", "admin-token-01234"
DESK = "desk-token-012345"
SHOP = "shop-token-012345"
TOKENS = f"# who may what\nread {READER}\n\nread,write {WRITER}\nadmin {ADMIN}\nusers {DESK}\ncatalogue {SHOP}\n"
TIMEOUT_S = 30

Serving = Callable[..., Any]


@pytest.fixture
def serving(model: Recommender, store: EventStore) -> Serving:
    @contextmanager
    def serve(**security: Any) -> Iterator[str]:
        server = create_server(one_model(model, store), store, Listener("localhost:0", **security))
        server.start()
        yield f"localhost:{server.port}"
        server.drain()

    return serve


def denied(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    return failure.value.code()


class Authority:
    """An authority whose certificates are files, as servers and clients have them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for a name."""
        issued = self._authority.issue_cert(name)
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return certificate, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def test_admin_calls_need_the_admin_right(model_directory: Path, store: EventStore, tmp_path: Path) -> None:
    metrics = Metrics()
    with open_models(model_directory, ModelLoader(store, metrics, "cpu"), watch_s=0) as models:
        server = create_server(
            models, store, Listener("localhost:0", tokens=parse_tokens(TOKENS, "tokens")), metrics=metrics
        )
        server.start()
        with grpc.insecure_channel(f"localhost:{server.port}") as channel:
            admin = ModelAdminStub(channel)
            calls = [
                (admin.ListModels, pb.ListModelsRequest()),
                (admin.LoadModel, pb.LoadModelRequest()),
                (admin.SetTraffic, pb.SetTrafficRequest()),
                (admin.RollBack, pb.RollBackRequest()),
                (admin.GetOutcomes, pb.GetOutcomesRequest()),
            ]
            assert len(calls) == len(pb.DESCRIPTOR.services_by_name["ModelAdmin"].methods)
            expected = [None, None, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, None]
            for (call, request), code in zip(calls, expected, strict=True):
                for token in (READER, WRITER):
                    metadata = (("authorization", f"Bearer {token}"),)
                    assert (
                        denied(lambda: call(request, timeout=TIMEOUT_S, metadata=metadata))  # noqa: B023
                        is grpc.StatusCode.PERMISSION_DENIED
                    )
                assert denied(lambda: call(request, timeout=TIMEOUT_S)) is grpc.StatusCode.UNAUTHENTICATED  # noqa: B023
                metadata = (("authorization", f"Bearer {ADMIN}"),)
                if code is None:
                    assert call(request, timeout=TIMEOUT_S, metadata=metadata) is not None
                else:
                    assert denied(lambda: call(request, timeout=TIMEOUT_S, metadata=metadata)) is code  # noqa: B023
            method = "/jaxrec.v1.ModelAdmin/RollBack"
            counted = {
                reason: metrics.registry.get_sample_value(
                    "jaxrec_rejected_calls_total", {"reason": reason, "method": method}
                )
                for reason in ("permission", "unauthenticated")
            }
            assert counted == {"permission": 2, "unauthenticated": 1}
        server.drain()


def test_tls(serving: Serving, authority: Authority, tmp_path: Path) -> None:
    with serving(tls=Tls(*authority.issue("localhost"))) as address:
        with RecommenderClient(Connection(address, TIMEOUT_S, ca=authority.ca)) as client:
            assert len(client.recommend(history=[]).recommendations) == 10
            assert client.is_serving()
        stranger = Authority(tmp_path / "stranger")
        for connection in (Connection(address, 0.5), Connection(address, 0.5, ca=stranger.ca)):
            with RecommenderClient(connection) as client:
                assert denied(client.get_model_info) in {
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                }


def test_mutual_tls_asks_for_a_certificate_of_its_authority(
    serving: Serving, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    certificate, key = authority.issue("localhost")
    with serving(tls=Tls(certificate, key, client_ca=authority.ca)) as address:
        own, own_key = authority.issue("client")
        known = Connection(address, TIMEOUT_S, ca=authority.ca, certificate=own, key=own_key)
        with RecommenderClient(known) as client:
            assert client.get_model_info().item_count == 60
        other, other_key = stranger.issue("client")
        for connection in (
            Connection(address, 0.5, ca=authority.ca),
            Connection(address, 0.5, ca=authority.ca, certificate=other, key=other_key),
        ):
            with RecommenderClient(connection) as client:
                assert denied(client.get_model_info) in {
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                }


def served_certificate(address: str) -> str:
    host, _, port = address.partition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=TIMEOUT_S)


def test_a_renewed_certificate_is_served_without_a_restart_and_a_broken_one_is_not(
    serving: Serving, authority: Authority
) -> None:
    certificate, key = authority.issue("localhost")
    with serving(tls=Tls(certificate, key)) as address:
        first = served_certificate(address)
        assert served_certificate(address) == first
        authority.issue("localhost")
        second = served_certificate(address)
        assert second != first
        certificate.write_text("half-written")
        assert served_certificate(address) == second


def test_files_that_are_no_certificates(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("localhost")
    with pytest.raises(SecurityError, match=r"nowhere: cannot be read: No such file"):
        Tls(tmp_path / "nowhere", key).credentials()
    with pytest.raises(SecurityError, match=r"localhost\.pem: expected a private key in PEM"):
        Tls(certificate, certificate).credentials()


@pytest.mark.parametrize(
    ("token", "rights"),
    [
        *((None, set()), ("unknown-token-0123", set()), (READER, {"read"}), (WRITER, {"read", "write"})),
        *((ADMIN, {"admin"}), (DESK, {"users"}), (SHOP, {"catalogue"})),
    ],
)
def test_rights(serving: Serving, token: str | None, rights: set[str]) -> None:
    event = UserEvent(event_id=f"{token}", user_id="u", item_id="1007", timestamp=1)
    with (
        serving(tokens=parse_tokens(TOKENS, "tokens")) as address,
        RecommenderClient(Connection(address, TIMEOUT_S, token=token)) as client,
    ):
        assert client.is_serving()
        calls: list[tuple[str, Callable[[], object]]] = [
            ("read", client.get_model_info),
            ("read", lambda: client.recommend(history=[])),
            ("write", lambda: client.record_events([event])),
            ("write", lambda: client.record_impressions([])),
            ("read", lambda: client.list_events("u")),
            ("users", lambda: client.delete_events("u", ["1"])),
            ("users", lambda: client.merge_users("v", "u")),
            ("users", lambda: client.delete_user("u")),
            ("catalogue", lambda: client.upsert_items([Item(item_id="1007")])),
            ("read", lambda: client.get_item("1007")),
            ("read", client.list_items),
            ("catalogue", lambda: client.delete_items(["1007"])),
        ]
        for right, call in calls:
            if right in rights:
                assert call() is not None
            else:
                expected = grpc.StatusCode.PERMISSION_DENIED if rights else grpc.StatusCode.UNAUTHENTICATED
                assert denied(call) is expected


def test_reflection_needs_a_token_too(serving: Serving) -> None:
    with (
        serving(tokens=parse_tokens(TOKENS, "tokens")) as address,
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError) as failure,
    ):
        ProtoReflectionDescriptorDatabase(channel).get_services()
    assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_reflection_that_clients_ask_first_is_unimplemented_for_readers(serving: Serving) -> None:
    """Upon any other status they do not fall back to the one that is there."""
    with serving(tokens=parse_tokens(TOKENS, "tokens")) as address, grpc.insecure_channel(address) as channel:

        def asked(version: str, *tokens: str) -> list[Any]:
            call = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            metadata = [("authorization", f"Bearer {token}") for token in tokens]
            return list(call(iter([request]), timeout=TIMEOUT_S, metadata=metadata))

        assert denied(lambda: asked("v1", READER)) is grpc.StatusCode.UNIMPLEMENTED
        assert len(asked("v1alpha", READER)) == 1
        assert denied(lambda: asked("v1", SHOP)) is grpc.StatusCode.PERMISSION_DENIED
        assert denied(lambda: asked("v1")) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", READER)],
        [("authorization", f"Basic {READER}")],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {READER[:-1]}")],
        [("authorization", f"Bearer {READER}"), ("authorization", f"Bearer {READER}")],
        [("x-authorization", f"Bearer {READER}")],
    ],
)
def test_what_is_no_bearer_token(serving: Serving, metadata: list[tuple[str, str]]) -> None:
    with serving(tokens=parse_tokens(TOKENS, "tokens")) as address, grpc.insecure_channel(address) as channel:
        stub = RecommenderStub(channel)
        good = [("authorization", f"bearer {READER}")]
        assert stub.GetModelInfo(GetModelInfoRequest(), metadata=good, timeout=TIMEOUT_S).item_count == 60
        call = lambda: stub.Recommend(RecommendRequest(user_id="u"), metadata=metadata, timeout=TIMEOUT_S)  # noqa: E731
        assert denied(call) is grpc.StatusCode.UNAUTHENTICATED


def test_an_unknown_method_needs_the_right_admin() -> None:
    services = (DESCRIPTOR, "Recommender"), (open_inference_pb2.DESCRIPTOR, "GRPCInferenceService")
    methods = [method for file, name in services for method in file.services_by_name[name].methods]
    named = {f"/{method.containing_service.full_name}/{method.name}" for method in methods}
    assert named == {method for method in NEEDED if not method.startswith("/grpc.reflection.")}
    assert needed_right("/inference.GRPCInferenceService/ModelInfer") == "read"
    assert needed_right("/inference.GRPCInferenceService/Later") == "admin"
    assert needed_right("/grpc.reflection.v1alpha.ServerReflection/Later") == "admin"
    assert needed_right("/jaxrec.v1.Recommender/RecordEvents") == "write"
    assert needed_right("/jaxrec.v1.Recommender/Later") == "admin"
    assert needed_right("/jaxrec.v1.Recommender/RecordEventsLater") == "admin"
    assert needed_right("/jaxrec.v1.ModelAdmin/LoadModel") == "admin"
    assert needed_right("/other.Service/Method") == "admin"
    assert needed_right("/grpc.health.v1.Health/Check") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tokens: expected at least one token"),
        (f"read,delete {READER}", "tokens:1: expected RIGHTS TOKEN"),
        (f"\nread {READER} {WRITER}", "tokens:2: expected RIGHTS TOKEN"),
        (f"read {READER}\nadmin {READER}", "tokens:2: expected different tokens"),
        ("read short", "tokens: expected tokens of at least 16"),
    ],
)
def test_bad_tokens_are_refused_and_never_printed(text: str, message: str) -> None:
    with pytest.raises(SecurityError) as failure:
        parse_tokens(text, "tokens")
    assert str(failure.value).startswith(message)
    assert READER not in str(failure.value)
    assert "short" not in str(failure.value)


def test_tokens_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(TOKENS)
    tokens = read_tokens(file)
    assert tokens.rights(f"Bearer {WRITER}") == {"read", "write"}
    assert READER not in repr(vars(tokens))
    with pytest.raises(SecurityError, match="nowhere: expected lines of text"):
        read_tokens(tmp_path / "nowhere")


def test_a_changed_tokens_file_counts_without_a_restart_and_a_broken_one_does_not(
    serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(auth, "READ_EVERY_S", 0.01)
    file = tmp_path / "tokens"
    file.write_text(f"read {READER}")
    with (
        serving(tokens=read_tokens(file)) as address,
        RecommenderClient(Connection(address, TIMEOUT_S, token=READER)) as reader,
        RecommenderClient(Connection(address, TIMEOUT_S, token=WRITER)) as writer,
    ):
        assert reader.get_model_info().item_count == 60
        assert denied(writer.get_model_info) is grpc.StatusCode.UNAUTHENTICATED
        for content, message in ((f"read {WRITER}", "were read again"), ("half a li", "stay as they were")):
            (tmp_path / "new").write_text(content)
            (tmp_path / "new").rename(file)
            end = time.monotonic() + TIMEOUT_S
            while not any(message in record.getMessage() for record in caplog.records):
                assert time.monotonic() < end
                time.sleep(0.01)
            assert denied(reader.get_model_info) is grpc.StatusCode.UNAUTHENTICATED
            assert writer.get_model_info().item_count == 60
    assert WRITER not in caplog.text


@pytest.mark.parametrize(
    ("address", "encrypted", "authenticated", "allowed"),
    [
        ("127.0.0.1:1", False, False, True),
        ("127.9.9.9:1", False, False, True),
        ("[::1]:1", False, False, True),
        ("localhost:1", False, False, True),
        ("0.0.0.0:1", False, False, False),
        ("[::]:1", False, False, False),
        ("recommender.example:1", False, False, False),
        ("0.0.0.0:1", True, False, False),
        ("0.0.0.0:1", False, True, False),
        ("0.0.0.0:1", True, True, True),
    ],
)
def test_others_reach_only_what_is_protected(address: str, encrypted: bool, authenticated: bool, allowed: bool) -> None:
    check_exposure(address, encrypted, authenticated, allow_insecure=True)
    if allowed:
        check_exposure(address, encrypted, authenticated, allow_insecure=False)
    else:
        with pytest.raises(SecurityError, match="can be reached from other machines"):
            check_exposure(address, encrypted, authenticated, allow_insecure=False)


def test_a_server_for_all_without_protection_is_not_created(model: Recommender, store: EventStore) -> None:
    with pytest.raises(SecurityError, match=r"0\.0\.0\.0:0 can be reached .* no TLS and tokens or client certificates"):
        create_server(one_model(model, store), store, "0.0.0.0:0")
    with pytest.raises(SecurityError, match="there is no TLS;"):
        Listener("0.0.0.0:0", tokens=Tokens({READER: ["read"]}))


def test_a_client_keeps_its_token() -> None:
    with pytest.raises(ValueError, match="needs TLS"):
        Connection("recommender.example:443", token=READER)
    assert READER not in repr(Connection("recommender.example:443", tls=True, token=READER))
