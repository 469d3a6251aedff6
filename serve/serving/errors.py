"""Why a request is not answered by a loaded model, and how a message names what a client sent."""

LONGEST_SHOWN = 200
"""Characters of a name or of a list of names in a message."""


def shown(name: str) -> str:
    """A name in a message, cut where it is long."""
    return repr(name) if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]!r}..."


class QueueFull(Exception):
    """The queue of requests is full; the client may try again after `retry_after_s` seconds."""

    def __init__(self, capacity: int, retry_after_s: float) -> None:
        super().__init__(f"{capacity} requests wait already, try again in {retry_after_s:.2g} s")
        self.retry_after_s = retry_after_s


class Expired(Exception):
    """The deadline of a request passed before there was an answer."""


class Cancelled(Exception):
    """The client does not wait for the answer any more."""


class UnknownModel(LookupError):
    """A version, or a name, of a model that is not loaded."""


class RefusedModel(Exception):
    """A version that cannot be served, or a change of traffic that is not possible; what served before still does."""
