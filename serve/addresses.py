"""HOST:PORT addresses, and whether other machines reach them."""

import ipaddress


class SecurityError(ValueError):
    """The set-up of the security cannot be used; the message never holds a secret."""


class AddressError(Exception):
    """The server cannot listen on an address."""


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT, an IPv6 host without its brackets; raises AddressError."""
    host, _, port = address.rpartition(":")
    # gRPC takes 99999 as the port 34463.
    if not (host and port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise AddressError(f"expected HOST:PORT with a port in 0..65535, came {address}")
    host = host.strip("[]")
    try:
        # As those who look it up do.
        host.encode("idna")
    except UnicodeError as error:
        raise AddressError(f"expected a name or an IP address as HOST, came {host}: {error}") from error
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT, or a Unix socket, can be reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(address: str, encrypted: bool, authenticated: bool, allow_insecure: bool) -> None:
    """Raises SecurityError for an address beyond this machine without encryption or without authentication.

    Not when `allow_insecure` says that this is meant, for example behind a proxy that sees to both.
    """
    if is_loopback(address) or allow_insecure or (encrypted and authenticated):
        return
    missing = " and ".join(
        what for what, there in (("TLS", encrypted), ("tokens or client certificates", authenticated)) if not there
    )
    raise SecurityError(
        f"{address} can be reached from other machines, and there is no {missing}; allow it if that is meant"
    )
