"""TLS of the HTTP door, from the files that the gRPC server has, read again when they change."""

import logging
import ssl

from serve.addresses import SecurityError
from serve.front.tls import Tls

logger = logging.getLogger(__name__)


def server_context(tls: Tls) -> ssl.SSLContext:
    """What a socket is opened with; raises SecurityError.

    The files are looked at for each new connection. If they changed, it gets the new certificate and the new
    authorities; if they are broken, what there was.
    """
    read = tls.contents()
    newest = _context(tls)

    def look(connection: ssl.SSLObject, name: str | None, opened_with: ssl.SSLContext) -> None:
        nonlocal newest, read
        try:
            found = tls.contents()
            if found != read:
                newest, read = _context(tls), found
                logger.info("the certificate of the HTTP door was read again")
        except SecurityError as error:
            logger.error("the certificate of the HTTP door stays as it was: %s", error)
        connection.context = newest

    opened = _context(tls)
    opened.sni_callback = look
    return opened


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A resumed session would let in a client whose authority was removed meanwhile. TLS 1.2 needs no tickets for that.
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if tls.client_ca is None else ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise SecurityError(f"{tls.certificate}: cannot be used with its key: {type(error).__name__}") from error
    return context
