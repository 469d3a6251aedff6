"""What a call tells the code that answers it, whichever front it came through."""

from typing import Protocol


class Context(Protocol):
    """One call under way. Safe to ask from any thread."""

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline, 0 once it passed; None: there is no deadline."""

    def is_active(self) -> bool:
        """Whether the client still waits for the answer."""
