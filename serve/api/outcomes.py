"""How users responded to the recommendations in a store, for the admin service: bounded work, answers that are kept."""

import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from serve.api.errors import Violations
from serve.event_log.outcomes import Estimate, Outcomes, outcomes
from serve.event_log.slates import Bounds, Slates, TooLong, TooSlow, read_slates
from serve.pb import model_admin_pb2 as pb
from serve.stores.base import EventStore

DEFAULT_WINDOW_S = 7 * 86_400
MAX_WINDOW_S = 31 * 86_400
MOST_SLATES = 50_000
MOST_ITEMS = 2_000_000
"""In all of the slates together."""
MOST_EVENTS = 200_000
READ_S = 5.0
KEPT_S = 10.0
MOST_KEPT = 16
MOST_ARMS = 100


class Asked(NamedTuple):
    """What is asked for; times in seconds."""

    window: int
    attribution_window: int | None


def decode_outcomes(request: pb.GetOutcomesRequest) -> Asked:
    """Raises InvalidRequest."""
    found, attribution = Violations(), None
    if not 0 <= request.window <= MAX_WINDOW_S:
        found.add("window", f"1 to {MAX_WINDOW_S} seconds, or 0 for {DEFAULT_WINDOW_S}", request.window)
    if request.HasField("attribution_window"):
        attribution = request.attribution_window
        if not 0 <= attribution <= MAX_WINDOW_S:
            found.add("attribution_window", f"0 to {MAX_WINDOW_S} seconds", attribution)
    found.raise_any()
    return Asked(request.window or DEFAULT_WINDOW_S, attribution)


class OutcomesReport:
    """Compares what a store logged. Safe to share between threads; one compares at a time."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: dict[Asked, tuple[float, pb.GetOutcomesResponse | TooLong | TooSlow]] = {}

    def get(self, asked: Asked, check_wanted: Callable[[], None] = lambda: None) -> pb.GetOutcomesResponse:
        """The message, up to KEPT_S old.

        Args:
            asked: What is asked for.
            check_wanted: Raises an exception, which ends the work, if nobody waits for the message any more.

        Raises:
            TooLong: There is too much to compare. This and the next one are kept, too.
            TooSlow: The log was not read in READ_S.
            StoreError: The store cannot be read.
        """
        with self._lock:
            now = time.monotonic()
            self._kept = {key: kept for key, kept in self._kept.items() if now - kept[0] < KEPT_S}
            if asked not in self._kept:
                found = self._compared(asked, check_wanted)
                # Each of these is small.
                if len(self._kept) == MOST_KEPT:
                    self._kept.clear()
                self._kept[asked] = time.monotonic(), found
            _, found = self._kept[asked]
        if isinstance(found, Exception):
            raise found
        return found

    def _compared(self, asked: Asked, check_wanted: Callable[[], None]) -> pb.GetOutcomesResponse | TooLong | TooSlow:
        now = int(time.time())
        until = time.monotonic() + READ_S
        bounds = Bounds(now - asked.window, MOST_SLATES, MOST_ITEMS, MOST_EVENTS, until, check_wanted)
        try:
            slates = read_slates(self._store, asked.attribution_window, bounds)
        except (TooLong, TooSlow) as error:
            return error.with_traceback(None)
        check_wanted()
        return _message(slates, outcomes(slates), now)


def _message(slates: Slates, found: Outcomes, now: int) -> pb.GetOutcomesResponse:
    return pb.GetOutcomesResponse(
        outcomes=[
            pb.Outcome(
                model_version=one.arm.model_version,
                policy=one.arm.policy,
                recommendation_count=one.slates,
                user_count=one.users,
                interaction_rate=_estimate(one.interaction_rate),
                reward=_estimate(one.reward),
            )
            for one in found.arms[:MOST_ARMS]
        ],
        differences=[
            pb.OutcomeDifference(
                model_version=one.arm.model_version,
                policy=one.arm.policy,
                interaction_rate=_estimate(one.interaction_rate),
                reward=_estimate(one.reward),
                verdict=one.verdict,
            )
            for one in found.differences[: MOST_ARMS - 1]
        ],
        attribution_window=slates.attribution_window,
        left_out=slates.left_out,
        computed_time=now,
    )


def _estimate(one: Estimate) -> pb.Estimate:
    if math.isnan(one.low):
        return pb.Estimate(mean=one.mean)
    return pb.Estimate(mean=one.mean, low=one.low, high=one.high)
