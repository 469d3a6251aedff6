"""The server's certificate and those that it asks for."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from serve.addresses import SecurityError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM. With `client_ca` only clients with a certificate of that authority get in (mTLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Reads the files, and again for each new connection once they changed; raises SecurityError."""
        read = self.contents()
        last = [read]

        def changed() -> Any:
            try:
                contents = self.contents()
            except SecurityError as error:
                logger.error("the certificate stays as it was: %s", error)
                return None
            if contents == last[0]:
                return None
            last[0] = contents
            logger.info("the certificate was read again")
            return _configuration(contents)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(read), changed, require_client_authentication=self.client_ca is not None
        )

    def contents(self) -> tuple[bytes, bytes, bytes | None]:
        """Certificate, key and authorities of clients as they are now; raises SecurityError."""
        client_ca = None if self.client_ca is None else _pem(self.client_ca, b"CERTIFICATE")
        return _pem(self.certificate, b"CERTIFICATE"), _pem(self.key, b"PRIVATE KEY"), client_ca


def _pem(path: Path, kind: bytes) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SecurityError(f"{path}: cannot be read: {error.strerror}") from error
    if kind + b"-----" not in content:
        raise SecurityError(f"{path}: expected a {kind.decode().lower()} in PEM")
    return content


def _configuration(contents: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
    certificate, key, client_ca = contents
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)
