"""Why a request is not answered by a loaded model."""


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
