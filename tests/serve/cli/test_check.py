"""`python -m serve check`: the exit status says whether a server is ready."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner

from serve.cli.main import main
from serve.front.auth import parse_tokens
from serve.front.lifecycle import RecommenderServer
from serve.front.server import Listener, create_server
from serve.front.tls import Tls
from serve.model.recommender import Recommender
from serve.stores.base import EventStore
from tests.ports import reserved_port
from tests.serve.one_model import one_model


def check(*arguments: str, **variables: str) -> tuple[int, str]:
    ended = CliRunner().invoke(main, ["check", "--timeout", "20", *arguments], env=variables)
    return ended.exit_code, ended.output.strip()


@pytest.fixture
def server(model: Recommender, store: EventStore) -> Iterator[RecommenderServer]:
    """It listens, and does not serve yet."""
    created = create_server(one_model(model, store), store, "127.0.0.1:0")
    created.listen()
    yield created
    created.drain()


def test_a_server_is_ready_from_its_start_until_it_ends(server: RecommenderServer) -> None:
    address = f"127.0.0.1:{server.port}"
    assert check("--address", address) == (1, f"Error: {address}: NOT_SERVING")
    server.start()
    assert check("--address", address) == (0, f"{address}: SERVING")
    server.finish_calls()
    assert check("--address", address) == (1, f"Error: {address}: NOT_SERVING")


def test_the_address_is_that_of_the_servers_settings_on_loopback(server: RecommenderServer) -> None:
    server.start()
    expected = (0, f"127.0.0.1:{server.port}: SERVING")
    assert check(JAXREC_ADDRESS=f"0.0.0.0:{server.port}") == expected
    assert check(JAXREC_ADDRESS=f"0.0.0.0:{server.port}", http_proxy="http://127.0.0.1:9") == expected


def test_without_a_server() -> None:
    with reserved_port() as port:
        address = f"127.0.0.1:{port}"
        status, output = check("--address", address)
    assert status == 1
    assert output.startswith(f"Error: {address}: UNAVAILABLE: ")
    assert "Traceback" not in output


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "expected HOST:PORT with a port in 0..65535, came here" in check("--address", "here")[1]
    assert "expected --cert and --key together, and only with --ca" in check("--ca", "c", "--key", "k")[1]
    assert check("--ca", str(tmp_path / "no.pem")) == (1, f"Error: {tmp_path / 'no.pem'}: No such file or directory")


@contextmanager
def encrypted(model: Recommender, store: EventStore, tls: Tls) -> Iterator[str]:
    listener = Listener("localhost:0", tls, parse_tokens("read a-secret-of-20-letters", "here"))
    created = create_server(one_model(model, store), store, listener)
    created.start()
    yield f"localhost:{created.port}"
    created.drain()


def test_the_servers_own_certificate_is_trusted(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    """No token is needed, and no file besides those that the server has."""
    authority, files = trustme.CA(), [tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem", "other.pem")]
    cert, key, ca, other = files
    issued = authority.issue_cert("recommender.example")
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    trustme.CA().cert_pem.write_to_path(other)
    with encrypted(model, store, Tls(cert, key, None)) as address:
        named = ("--address", address, "--name", "recommender.example")
        assert check(*named, JAXREC_TLS_CERT=str(cert)) == (0, f"{address}: SERVING")
        assert check("--address", address, "--ca", str(cert))[0] == 1  # it is no certificate of localhost
        for mistaken in ("127.0.0.1", "localhost"):
            assert check("--address", address, "--ca", str(cert), "--name", mistaken)[0] == 1
        assert check(*named, "--ca", str(other))[0] == 1
    with encrypted(model, store, Tls(cert, key, ca)) as address:
        named = ("--address", address, "--name", "recommender.example", "--ca", str(ca))
        assert check(*named)[0] == 1
        assert check(*named, "--cert", str(cert), "--key", str(key)) == (0, f"{address}: SERVING")


@pytest.mark.parametrize(
    ("loopback", "named", "status"), [(True, "localhost", 0), (False, "127.0.0.1", 0), (False, "localhost", 1)]
)
def test_the_certificate_has_to_name_the_host_that_is_asked_or_localhost_on_loopback(
    loopback: bool,
    named: str,
    status: int,
    model: Recommender,
    store: EventStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued = trustme.CA().issue_cert(named)
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    monkeypatch.setattr("serve.cli.check.is_loopback", lambda address: loopback)  # False: as if it were elsewhere
    with encrypted(model, store, Tls(cert, key, None)) as address:
        at = f"127.0.0.1:{address.rpartition(':')[2]}"
        assert check("--address", at, "--ca", str(cert))[0] == status
