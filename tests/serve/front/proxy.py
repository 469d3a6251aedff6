"""Debian's nginx with the configuration of deploy/nginx, before a server with a fast front."""

import importlib.util
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

CONFIGURATION = Path(__file__).parents[3] / "deploy/nginx/nginx.conf"
PATIENCE_S = 30.0
MISSING = [
    what
    for what, is_there in (
        ("nginx", shutil.which("nginx") is not None),
        ("pygrpc-native (the extra fast)", importlib.util.find_spec("pygrpc_native") is not None),
    )
    if not is_there
]
"""What is not installed of what the tests of the fast front need."""
FRONTS = [
    "default",
    pytest.param(
        "fast behind nginx", marks=pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
    ),
]
"""Each in the way in which it is deployed."""


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where nginx and a server behind it meet, and where clients find nginx; as addresses of gRPC and of nginx."""

    folder: Path
    """Of the files of nginx."""
    default: str
    fast: str
    proxy: str
    listen_options: str = ""
    """Of nginx's `listen`, beside those for TLS and HTTP/2."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Unix sockets in a folder."""
        return cls(folder, *(f"unix:{folder}/{name}.sock" for name in ("grpc", "fast", "nginx")))


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running nginx."""

    pid: int

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def configured(
    sockets: Sockets, certificate: tuple[Path, Path] | None, settings: Mapping[str, str] | None = None
) -> str:
    """The configuration for these sockets, with TLS if there is a certificate, and with other values of settings."""
    text = CONFIGURATION.read_text("utf-8")
    folder, listen = (
        sockets.folder,
        f"listen {sockets.proxy} {sockets.listen_options} {'ssl ' if certificate else ''}http2;",
    )
    changes = {
        "user www-data;": "user root;" if os.geteuid() == 0 else "",
        "worker_processes auto;": "worker_processes 1;",
        "/run/nginx.pid": f"{folder}/nginx.pid",
        "error_log /var/log/nginx/error.log;": f"error_log {folder}/error.log;",
        "listen 443 ssl http2 backlog=4096;": listen,
        "listen [::]:443 ssl http2 backlog=4096;": "",
        "127.0.0.1:50051": sockets.default,
        "127.0.0.1:50053": sockets.fast,
        "ssl_certificate /etc/jaxrec/certificate.pem;": f"ssl_certificate {certificate[0]};" if certificate else "",
        "ssl_certificate_key /etc/jaxrec/key.pem;": f"ssl_certificate_key {certificate[1]};" if certificate else "",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    for name, value in (settings or {}).items():
        text, count = re.subn(rf"\b{name} [^;]*;", f"{name} {value};", text)
        assert count, name
    paths = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    return text.replace("http {", "\n    ".join(["http {", *paths]), 1)


@contextmanager
def running_proxy(
    sockets: Sockets, certificate: tuple[Path, Path] | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[Proxy]:
    """Runs nginx, which listens on entry; `settings` as those of `configured`."""
    folder = sockets.folder
    file = folder / "nginx.conf"
    file.write_text(configured(sockets, certificate, settings))
    # It returns once the sockets are open.
    subprocess.run(["nginx", "-c", file, "-p", folder, "-e", folder / "error.log"], check=True, timeout=PATIENCE_S)
    number = int((folder / "nginx.pid").read_text())
    process = os.pidfd_open(number)
    try:
        yield Proxy(number)
    finally:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        ended, _, _ = select.select([process], [], [], PATIENCE_S)
        os.close(process)
        assert ended, "nginx did not end"
