"""`python -m serve check`: whether a server is ready, for the health checks of containers and supervisors."""

from pathlib import Path

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.addresses import AddressError, host_and_port, is_loopback
from serve.cli.options import FILE
from serve.client.requests import is_serving

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a server that listens on every address is asked."""


@click.command("check")
@click.option(
    "--address",
    envvar="JAXREC_ADDRESS",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="HOST:PORT",
    help="The server. If it listens on every address (0.0.0.0), it is asked on loopback.  [variable: JAXREC_ADDRESS]",
)
@click.option(
    "--ca",
    envvar="JAXREC_TLS_CERT",
    type=FILE,
    help="Encrypt, trusting these certificates in PEM; the server's own is enough.  [variable: JAXREC_TLS_CERT]",
)
@click.option(
    "--name",
    help="A host name that is in the server's certificate.  [default: the host of --address; localhost on loopback]",
)
@click.option("--cert", type=FILE, help="A client certificate in PEM, for servers that ask for one.")
@click.option("--key", type=FILE, help="Private key of that certificate in PEM.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.001),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer.",
)
def command(
    address: str, ca: Path | None, name: str | None, cert: Path | None, key: Path | None, timeout: float
) -> None:
    """Ask the health service of a server. The exit status is 0 if it is ready to answer, else 1: also while it loads
    its model, and while it ends. It is 2 if the options are wrong. It needs no token, and reads no settings file."""
    if (cert is None) != (key is None) or (cert is not None and ca is None):
        raise click.UsageError("expected --cert and --key together, and only with --ca")
    try:
        target = _target(address)
        credentials = None if ca is None else _credentials(ca, cert, key)
    except AddressError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if name is None and is_loopback(target):
        name = "localhost"  # certificates seldom name 127.0.0.1
    if name is not None and credentials is not None:
        options.append(("grpc.ssl_target_name_override", name))
    if credentials is None:
        channel = grpc.insecure_channel(target, options)
    else:
        channel = grpc.secure_channel(target, credentials, options)
    try:
        with channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.RpcError as error:
        raise click.ClickException(f"{target}: {error.code().name}: {error.details()}") from error
    if not is_serving(answer):
        raise click.ClickException(f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
    click.echo(f"{target}: SERVING")


def _target(address: str) -> str:
    host, port = host_and_port(address)
    host = LOOPBACK.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _credentials(ca: Path, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        ca.read_bytes(), None if key is None else key.read_bytes(), None if cert is None else cert.read_bytes()
    )
