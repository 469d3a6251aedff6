"""What came of the recommendations in a store, for the admin service: bounded work, and an answer that is kept."""

import math
import threading
import time
from typing import NamedTuple

from serve.api.errors import Violations
from serve.event_log.outcomes import Estimate, Outcomes, outcomes
from serve.event_log.slates import Bounds, Slates, read_slates
from serve.pb import model_admin_pb2 as pb
from serve.stores.base import EventStore

DEFAULT_WINDOW_S = 7 * 86_400
MAX_WINDOW_S = 31 * 86_400
MOST_SLATES = 50_000
"""Some 40 MB while they are compared."""
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
        self._kept: dict[Asked, tuple[float, pb.GetOutcomesResponse]] = {}

    def get(self, asked: Asked) -> pb.GetOutcomesResponse:
        """The message, up to KEPT_S old.

        Raises:
            TooLong: There is too much to compare.
            StoreError: The store cannot be read.
        """
        with self._lock:
            now = time.monotonic()
            self._kept = {key: kept for key, kept in self._kept.items() if now - kept[0] < KEPT_S}
            if asked not in self._kept:
                # Each of these is small.
                if len(self._kept) == MOST_KEPT:
                    self._kept.clear()
                self._kept[asked] = now, self._compared(asked)
            return self._kept[asked][1]

    def _compared(self, asked: Asked) -> pb.GetOutcomesResponse:
        now = int(time.time())
        bounds = Bounds(now - asked.window, MOST_SLATES, MOST_EVENTS, time.monotonic() + READ_S)
        slates = read_slates(self._store, asked.attribution_window, bounds)
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
