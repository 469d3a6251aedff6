"""HOST:PORT addresses."""

import ipaddress


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
