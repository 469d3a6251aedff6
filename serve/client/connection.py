"""How a client reaches a server: TLS, token, deadline, and repeating calls that may be repeated."""

import json
from dataclasses import dataclass
from pathlib import Path

import grpc

from serve.addresses import is_loopback

# Each call can be repeated: what RecordEvents and RecordImpressions store counts once, UpsertItems stores the same
# again, DeleteUser, DeleteEvents, DeleteItems and MergeUsers do what is left to do, and the others change nothing.
# gRPC waits between tries, longer each time and by a random share, or as long as an overloaded server says. Each
# failure takes a token, and ten successes give one back; with half of the tokens no call is tried again: else clients
# would keep a server overloaded.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "jaxrec.v1.Recommender"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
)
# gRPC repeats no call that needs more: by default 256 KiB. A request may have 8 MiB, and its metadata some more.
RETRY_BUFFER_BYTES = 8 * 2**20 + 64 * 2**10
OPTIONS = (("grpc.service_config", SERVICE_CONFIG), ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES))

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a server is, and what it needs to let a client in.

    Raises:
        ValueError: A token would travel unencrypted to another machine, or one of certificate and key is missing.
    """

    address: str
    """HOST:PORT."""
    timeout_s: float = 5.0
    """Deadline of a call with its repetitions, in seconds."""
    tls: bool = False
    """Whether to encrypt, and accept only a server whose certificate is valid for the host. Implied by any of the files
    below."""
    ca: Path | None = None
    """Certificates of the trusted authorities in PEM; None: those of the system."""
    certificate: Path | None = None
    """The client's own certificate in PEM, for servers that ask for one (mTLS)."""
    key: Path | None = None
    """The certificate's private key in PEM."""
    token: str | None = None
    """Sent with every call. Not shown by `repr`."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("expected a certificate and its key, came one of them")
        if self.token is not None and not self.encrypted and not is_loopback(self.address):
            raise ValueError(f"a token for {self.address} needs TLS, else others can read it")

    def __repr__(self) -> str:
        return f"Connection({self.address!r}, tls={self.encrypted})"

    @property
    def encrypted(self) -> bool:
        """Whether the connection is TLS."""
        return self.tls or self.ca is not None or self.certificate is not None

    @property
    def metadata(self) -> Metadata:
        """Sent with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def channel(self) -> grpc.Channel:
        """A channel that connects when first used; raises OSError when a file cannot be read."""
        if not self.encrypted:
            return grpc.insecure_channel(self.address, options=OPTIONS)
        return grpc.secure_channel(self.address, self._credentials(), options=OPTIONS)

    def async_channel(self) -> grpc.aio.Channel:
        """As `channel`, for asyncio."""
        if not self.encrypted:
            return grpc.aio.insecure_channel(self.address, options=OPTIONS)
        return grpc.aio.secure_channel(self.address, self._credentials(), options=OPTIONS)

    def _credentials(self) -> grpc.ChannelCredentials:
        ca, key, certificate = (
            None if file is None else file.read_bytes() for file in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)
