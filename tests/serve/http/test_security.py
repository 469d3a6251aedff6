"""Who gets in at the HTTP door: exactly those who get in at gRPC's, with the same rights."""

import http.client
import socket
import ssl
import stat
from pathlib import Path

import grpc
import pytest

from serve.addresses import SecurityError
from serve.client import Connection, RecommenderClient
from serve.front.auth import parse_tokens
from serve.front.server import Listener
from serve.front.tls import Tls
from serve.http.connect import path_of
from serve.http.errors import HTTP_STATUS, code_name
from serve.http.limits import MAX_BODY_BYTES
from serve.http.server import HttpServer
from tests.serve.cli.test_run import BEYOND, said_by
from tests.serve.front.test_security import TOKENS, Authority
from tests.serve.http.asking import TIMEOUT_S, Opening, ask
from tests.serve.http.test_mapping import UNARY, asked_by_grpc

INFO = "/jaxrec.v1.Recommender/GetModelInfo"
READER = "reader-token-0123"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer unknown-token-0123", "Basic reader-token-0123", "Bearer \xff"]
    + [f"Bearer {line.split()[1]}" for line in TOKENS.splitlines() if line and not line.startswith("#")],
)
def test_a_token_has_the_same_rights_at_both_doors(opening: Opening, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    with opening(tokens=parse_tokens(TOKENS, "tokens")) as doors, grpc.insecure_channel(doors.address) as channel:
        for method in UNARY:
            path = path_of(method)
            sendable = authorization is not None and authorization.isascii()
            metadata = (("authorization", authorization or ""),) if sendable else ()
            try:
                channel.unary_unary(path)(b"", timeout=TIMEOUT_S, metadata=metadata)
                code, text = grpc.StatusCode.OK, ""
            except grpc.RpcError as error:
                code, text = error.code(), error.details()
            said = ask(doors.port, path, {}, headers)
            if code is grpc.StatusCode.OK:
                assert said.status == 200
            else:
                assert (said.status, said.json["code"]) == (HTTP_STATUS[code], code_name(code))
                assert said.json["message"] == text
        assert ask(doors.port, "/healthz").status == 200
        assert ask(doors.port, "/openapi.json").json["security"] == [{"token": []}]
        known = authorization is not None and READER in authorization and authorization.startswith("Bearer")
        assert (ask(doors.port, "/v2/models/jaxrec", headers=headers).status == 200) >= known
        assert ask(doors.port, "/v2/models/jaxrec").status == 401


def test_the_body_of_a_caller_without_the_right_is_not_read(opening: Opening) -> None:
    with opening(tokens=parse_tokens(TOKENS, "tokens")) as doors:
        connection = http.client.HTTPConnection("localhost", doors.port, timeout=TIMEOUT_S)
        connection.putrequest("POST", "/jaxrec.v1.Recommender/UpsertItems")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(MAX_BODY_BYTES))
        connection.putheader("authorization", f"Bearer {READER}")
        connection.endheaders()
        assert connection.getresponse().status == 403
        connection.close()


@pytest.mark.parametrize("second", [f"Bearer {READER}", "Bearer \xff", ""])
@pytest.mark.parametrize(("verb", "path"), [("POST", INFO), ("GET", "/v2/models/jaxrec")])
def test_two_authorizations_are_none(opening: Opening, second: str, verb: str, path: str) -> None:
    with opening(tokens=parse_tokens(TOKENS, "tokens")) as doors:
        connection = http.client.HTTPConnection("localhost", doors.port, timeout=TIMEOUT_S)
        connection.putrequest(verb, path)
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "2")
        connection.putheader("authorization", f"Bearer {READER}")
        connection.putheader("authorization", second.encode("latin-1"))
        connection.endheaders(b"{}")
        assert connection.getresponse().status == 401
        connection.close()
        counted = doors.metrics.registry.get_sample_value
        assert (
            sum(
                counted("jaxrec_rejected_calls_total", {"reason": "unauthenticated", "method": method}) or 0
                for method in (INFO, "/inference.GRPCInferenceService/ModelMetadata")
            )
            == 1
        )


def test_nobody_else_can_enter_the_folder_of_the_socket_between_the_doors(opening: Opening) -> None:
    with opening() as doors:
        between = Path(doors.http.grpc_address.removeprefix("unix:"))
        assert stat.S_ISSOCK(between.stat().st_mode)
        assert stat.S_IMODE(between.parent.stat().st_mode) == 0o700
    assert not between.parent.exists()


def test_the_socket_between_the_doors_asks_for_tokens_too(opening: Opening) -> None:
    with opening(tokens=parse_tokens(TOKENS, "tokens")) as doors:
        assert asked_by_grpc(doors.http.grpc_address, INFO, b"")[0] is grpc.StatusCode.UNAUTHENTICATED


def trusting(authority: Authority, name: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca))
    if name is not None:
        context.load_cert_chain(*authority.issue(name))
    return context


def test_tls(opening: Opening, authority: Authority, tmp_path: Path) -> None:
    with opening(tls=Tls(*authority.issue("localhost"))) as doors:
        assert doors.http.url.startswith("https://")
        assert ask(doors.port, INFO, {}, tls=trusting(authority)).status == 200
        with RecommenderClient(Connection(doors.address, TIMEOUT_S, ca=authority.ca)) as client:
            assert client.is_serving()
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(doors.port, INFO, {}, tls=trusting(Authority(tmp_path / "stranger")))
        with pytest.raises(OSError):  # noqa: PT011
            ask(doors.port, INFO, {})


def test_client_certificates_are_asked_for_at_both_doors(
    opening: Opening, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("localhost")
    stranger = Authority(tmp_path / "stranger")
    with opening(tls=Tls(certificate, key, client_ca=authority.ca)) as doors:
        assert ask(doors.port, INFO, {}, tls=trusting(authority, "client")).status == 200
        foreign = trusting(authority)
        foreign.load_cert_chain(*stranger.issue("client"))
        for context in (trusting(authority), foreign):
            with pytest.raises(OSError):  # noqa: PT011
                ask(doors.port, "/healthz", tls=context)
        # The authority is replaced: its clients are strangers from the next connection on.
        authority.ca.rename(tmp_path / "old.pem")
        stranger.ca.rename(authority.ca)
        still = ssl.create_default_context(cafile=str(tmp_path / "old.pem"))
        still.load_cert_chain(*authority.issue("client"))
        with pytest.raises(OSError):  # noqa: PT011
            ask(doors.port, INFO, {}, tls=still)
        now = ssl.create_default_context(cafile=str(tmp_path / "old.pem"))
        now.load_cert_chain(*stranger.issue("client"))
        assert ask(doors.port, INFO, {}, tls=now).status == 200


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_does_not_outlive_its_authority(
    opening: Opening, authority: Authority, tmp_path: Path, newest: ssl.TLSVersion
) -> None:
    certificate, key = authority.issue("localhost")
    client = trusting(authority, "client")
    client.maximum_version = newest
    with opening(tls=Tls(certificate, key, client_ca=authority.ca)) as doors:

        def answered(session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
            opened = socket.create_connection(("localhost", doors.port), TIMEOUT_S)
            with client.wrap_socket(
                opened, server_hostname="localhost", session=session, do_handshake_on_connect=False
            ) as wrapped:
                try:
                    wrapped.do_handshake()
                    wrapped.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    found = wrapped.recv(2**16)
                except OSError:
                    return None
                return wrapped.session if found.startswith(b"HTTP/1.1 200") else None

        before = answered()
        # TLS 1.2 keeps sessions at the server, too; so it is not spoken here.
        assert (before is not None) is (newest is ssl.TLSVersion.TLSv1_3)
        authority.ca.write_bytes(Authority(tmp_path / "stranger").ca.read_bytes())
        assert answered() is None
        assert answered(before) is None


def test_a_renewed_certificate_is_served_and_a_broken_one_is_not(opening: Opening, authority: Authority) -> None:
    certificate, key = authority.issue("localhost")
    with opening(tls=Tls(certificate, key)) as doors:

        def served() -> str:
            return ssl.get_server_certificate(("localhost", doors.port), timeout=TIMEOUT_S)

        first = served()
        assert served() == first
        authority.issue("localhost")
        second = served()
        assert second != first
        certificate.write_text("half-written")
        assert served() == second


def test_files_that_do_not_belong_together(authority: Authority) -> None:
    certificate, _ = authority.issue("localhost")
    _, key = authority.issue("other")
    with pytest.raises(SecurityError, match=r"localhost\.pem: cannot be used with its key"):
        HttpServer(Listener("localhost:0", tls=Tls(certificate, key)))


def test_an_address_that_others_reach_is_refused(tmp_path: Path) -> None:
    said = said_by(tmp_path, "--address", "127.0.0.1:0", "--http", BEYOND)
    assert said.startswith(f"Error: {BEYOND} can be reached from other machines, and there is no TLS and tokens")


def test_pages_of_other_sites(opening: Opening) -> None:
    origin = {"origin": "https://example.org"}
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}
    with opening() as doors:
        assert ask(doors.port, INFO, headers=origin | asking, verb="OPTIONS").status == 405
        assert "access-control-allow-origin" not in ask(doors.port, INFO, {}, origin).headers
    with opening(origins=("https://example.org",)) as doors:
        before = ask(doors.port, INFO, headers=origin | asking, verb="OPTIONS")
        assert (before.status, before.headers["access-control-allow-origin"]) == (200, "https://example.org")
        assert ask(doors.port, INFO, {}, origin).headers["access-control-allow-origin"] == "https://example.org"
        other = ask(doors.port, INFO, {}, {"origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("192.0.2.1:8080", 200),
        ("Recommender.example:1", 200),
        ("example.org", 421),
        ("127.0.0.1.example.org", 421),
        ("[", 421),
    ],
)
@pytest.mark.parametrize("allow_insecure", [False, True])
def test_names_of_this_machine(opening: Opening, host: str, status: int, allow_insecure: bool) -> None:
    with opening(hosts=("recommender.example",), allow_insecure=allow_insecure) as doors:
        assert ask(doors.port, INFO, {}, {"host": host}).status == status


def test_another_sites_name_for_this_machine_is_refused_where_nothing_else_protects(opening: Opening) -> None:
    with opening() as doors:
        said = ask(doors.port, INFO, {}, {"host": "example.org"})
        assert (said.status, said.json["code"]) == (421, "permission_denied")
    with opening(hosts=("*",)) as doors:
        assert ask(doors.port, INFO, {}, {"host": "example.org"}).status == 200
    with opening(tokens=parse_tokens(TOKENS, "tokens")) as doors:
        headers = {"host": "example.org", "authorization": f"Bearer {READER}"}
        assert ask(doors.port, INFO, {}, headers).status == 200
