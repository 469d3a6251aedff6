"""One server process of several: what its supervisor tells it, and what it tells its supervisor."""

import logging
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serve.front.channel import Channel
from serve.observability.metrics import Metrics
from serve.serving.versions import Division, ModelLibrary
from serve.settings import Settings

logger = logging.getLogger(__name__)


class Supervised:
    """The supervisor of this process, seen from here."""

    def __init__(self, channel: Channel) -> None:
        """Waits for the settings; raises EOFError if the supervisor is gone."""
        first = channel.receive()
        if first is None:
            raise EOFError("the supervisor is gone")
        self.settings: Settings
        self.is_late: bool
        """Whether others answer already: this one must not be connected to before it can answer."""
        self.division: Division | None
        """How the others divide users; None: nothing changed since the start."""
        _, (self.settings, self.is_late, division) = first
        self.division = None if division is None else pickle.loads(division)
        self._channel = channel
        self._opened = threading.Event()
        self._go = threading.Event()
        self._changes = ThreadPoolExecutor(1, "division")

    def follow(self, metrics: Metrics, stop: Callable[[], None]) -> None:
        """From now on metrics are sent when they are asked for, and the end of the supervisor is the end of this
        process: at once if it does not answer yet, else by `stop`."""
        threading.Thread(target=self._follow, args=[metrics, stop], name="supervisor", daemon=True).start()

    def opened(self, models: ModelLibrary) -> None:
        """The models are loaded: divides users as the others were told to meanwhile, and from now on says how they are
        divided here."""
        self._models = models
        models.on_division = self._divided
        self._opened.set()
        self._changes.submit(lambda: None).result()

    def wait_for_others(self) -> None:
        """Waits until all processes may answer."""
        self._channel.send("loaded")
        self._go.wait()

    def serves(self, line: str) -> None:
        """This process answers; `line` is what a server prints then."""
        self._channel.send("serves", line)

    def failed(self, message: str) -> None:
        """This process cannot serve."""
        self._channel.send("failed", message)

    def _divided(self, division: Division, by_hand: bool) -> None:
        self._channel.send("division", (pickle.dumps(division), division.automatic, by_hand))

    def _follow(self, metrics: Metrics, stop: Callable[[], None]) -> None:
        while (message := self._channel.receive()) is not None:
            kind, value = message
            try:
                if kind == "metrics":
                    self._channel.send("metrics", list(metrics.registry.collect()))
                elif kind == "division":
                    # Loading takes long.
                    self._changes.submit(self._take_over, value)
                elif kind == "go":
                    self._go.set()
            except Exception:
                logger.exception("the supervisor gets no answer")
        if not self._go.is_set():
            # Nothing is under way.
            os._exit(1)
        stop()

    def _take_over(self, division: bytes) -> None:
        self._opened.wait()
        try:
            self._models.follow_division(pickle.loads(division))
        except Exception:
            logger.exception("users are divided otherwise than in the other processes")
