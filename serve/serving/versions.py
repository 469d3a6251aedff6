"""Which model versions are loaded, which user each one answers, and how that changes while the server runs.

A version is verified, loaded and warmed up beside the one that serves, and takes over in one assignment. Calls
under way keep the old one until they are answered; then nothing refers to it any more, and its memory is free. What
cannot be loaded is refused, with its reason, and changes nothing.
"""

import ctypes
import hashlib
import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from serve.model.directory import Fingerprint, Version, find_versions
from serve.model.graphs import ProviderError
from serve.model.manifest import ArtifactError
from serve.serving.errors import RefusedModel, UnknownModel, shown
from serve.serving.loaded import LoadedModel

logger = logging.getLogger(__name__)

WATCH_S = 2.0
SHARE_TOLERANCE = 1e-3

Load = Callable[[Path, Callable[[], None]], LoadedModel]
"""Verifies a directory, calls what it was handed, and only then loads."""


class State(Enum):
    """What became of a version in the directory."""

    AVAILABLE = "available"
    LOADING = "loading"
    READY = "ready"
    REFUSED = "refused"


class Report(NamedTuple):
    """One version, for operators."""

    model_version: str
    folder: str
    state: State
    reason: str
    traffic_share: float
    loaded_time: int
    """Seconds since 1970-01-01T00:00Z; 0: not loaded."""


class Division(NamedTuple):
    """How users are divided, for another process of the same server."""

    shares: Mapping[str, float]
    automatic: bool
    previous: str | None
    """The version that had most of them before."""


class _Ready(NamedTuple):
    """A loaded version."""

    model: LoadedModel
    loaded_time: int


class _Traffic:
    """Which model answers which user; replaced as a whole, so that a reader sees one state of it."""

    def __init__(self, ready: Mapping[str, _Ready], shares: Mapping[str, float]) -> None:
        self.ready = ready
        self.shares = shares
        self.main = max(shares, key=lambda version: shares[version], default="")
        # In the order of versions: as a share grows, users move to it and none move elsewhere.
        self._models = [ready[version].model for version in sorted(shares)]
        self._bounds = list(accumulate(shares[version] for version in sorted(shares)))[:-1]

    def for_user(self, user_id: str | None) -> LoadedModel:
        if user_id is None or not self._bounds:
            return self.ready[self.main].model
        return self._models[bisect_right(self._bounds, position(user_id))]


class ModelLibrary:
    """The loaded versions of one directory, to be shared between threads. Close it, or use it in a `with` statement."""

    def __init__(
        self,
        directory: Path,
        load: Load,
        *,
        watch_s: float = WATCH_S,
        on_attempt: Callable[[str], None] = lambda result: None,
        on_change: Callable[[Sequence[LoadedModel]], None] = lambda models: None,
        on_resident: Callable[[Sequence[LoadedModel]], None] = lambda models: None,
        keep_previous: bool = True,
        on_close: Callable[[], None] = lambda: None,
        load_now: bool = True,
    ) -> None:
        """Loads and raises as `open`, or leaves that for later.

        `load` verifies, loads and warms up, and raises ArtifactError or ProviderError. Every `watch_s` seconds the
        directory is looked at for a newer version; 0: never. `on_attempt` gets `loaded` or `refused`, `on_change`
        the loaded models, most traffic first, `on_resident` all that are in memory; `on_close` is called at the end.
        `keep_previous`: the version that answered most before the last change stays in memory for `roll_back`, until
        another one is verified and to be loaded.
        """
        self._directory = directory
        self._load = load
        self._on_attempt = on_attempt
        self._on_change = on_change
        self._on_resident = on_resident
        self._keep_previous = keep_previous
        self._on_close = on_close
        # Held while versions are loaded and traffic changes; answering needs no lock.
        self._changing = threading.Lock()
        self._refused: dict[str, tuple[Fingerprint, str]] = {}
        self._loading = ""
        self._traffic = _Traffic({}, {})
        self._previous: str | None = None
        self._kept: dict[str, _Ready] = {}
        """The version that answered most before the last change, while it is in memory and does not answer."""
        self._has_changed = False
        self.on_division: Callable[[Division, bool], None] = lambda division, by_hand: None
        """Called when users are divided otherwise, and with whether that was by hand."""
        self.automatic = watch_s > 0
        self._watches = self.automatic
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=[watch_s], name="model-watch", daemon=True)
        if load_now:
            self.open()

    def open(self, division: Division | None = None) -> None:
        """Loads the newest valid version, or raises ArtifactError or ProviderError with the reason of the newest.

        Args:
            division: How other processes of the same server divide users. What was set by hand is loaded at first,
                and the newest only if that cannot be.
        """
        if division is not None and not division.automatic:
            self.follow_division(division)
        if not self._traffic.main:
            self._open_newest()
        if division is not None and division.automatic:
            self._follow_previous(division)
        if self._watches:
            self._thread.start()

    def _open_newest(self) -> None:
        versions = find_versions(self._directory)
        if not versions:
            raise ArtifactError(f"{self._directory}: expected a model directory, or one with model directories in it")
        error: Exception | None = None
        for version in versions:
            try:
                ready = self._loaded(version)
            except (ArtifactError, ProviderError) as refused:
                error = error or refused
                continue
            self._serve(_Traffic({version.model_version: ready}, {version.model_version: 1.0}))
            break
        else:
            assert error is not None
            raise error

    def __enter__(self) -> "ModelLibrary":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops watching, and has the states of users spilled. Calls under way may go on."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._on_close()
        for ready in self._traffic.ready.values():
            ready.model.states.spill()

    def for_user(self, user_id: str | None) -> LoadedModel:
        """The model that answers a user, always the same while the traffic stays; None: no certain user."""
        return self._traffic.for_user(user_id)

    def version(self, model_version: str) -> LoadedModel:
        """One loaded version, or with "" the one that answers most; raises UnknownModel."""
        traffic = self._traffic
        ready = traffic.ready.get(model_version or traffic.main)
        if ready is None:
            loaded = ", ".join(map(shown, sorted(traffic.ready)))
            raise UnknownModel(f"the loaded versions are {loaded}; {shown(model_version)} is not loaded")
        return ready.model

    def versions(self) -> Sequence[str]:
        """The loaded versions, the one that answers most first."""
        shares = self._traffic.shares
        return sorted(shares, key=lambda version: -shares[version])

    def forget(self, user_id: str) -> None:
        """Drops what is in memory of a user that was deleted from the store."""
        for ready in (*self._traffic.ready.values(), *self._kept.values()):
            ready.model.states.forget(user_id)

    def shares(self) -> list[tuple[str, float]]:
        """The loaded versions and their shares of the users, largest first."""
        traffic = self._traffic
        return sorted(traffic.shares.items(), key=lambda entry: -entry[1])

    def report(self) -> list[Report]:
        """Every version of the directory and every loaded one, newest first; raises ArtifactError."""
        traffic = self._traffic
        reports = []
        found = find_versions(self._directory)
        for version in found:
            refused = self._refused.get(version.folder)
            ready = traffic.ready.get(version.model_version)
            state, reason = State.AVAILABLE, ""
            if ready is not None:
                state = State.READY
            elif self._loading and version.model_version == self._loading:
                state = State.LOADING
            elif refused is not None and refused[0] == version.fingerprint:
                state, reason = State.REFUSED, refused[1]
            reports.append(self._report(traffic, version.model_version, version.folder, state, reason))
        gone = traffic.ready.keys() - {version.model_version for version in found}
        reports += [self._report(traffic, version, "", State.READY, "") for version in gone]
        return sorted(reports, key=lambda report: (report.model_version, report.folder), reverse=True)

    def load_newest(self) -> bool:
        """Gives the newest valid version all traffic, and follows the directory again; whether anything changed."""
        with self._changing:
            self.automatic = self._watches
            changed = self._follow(find_versions(self._directory), older_too=True)
            self._divided(by_hand=True)
            return changed

    def load(self, model_version: str) -> bool:
        """Gives a version all traffic, and no longer follows the directory; whether anything changed.

        Raises UnknownModel when it is not there, and RefusedModel.
        """
        return self.set_traffic({model_version: 1.0})

    def set_traffic(self, shares: Mapping[str, float]) -> bool:
        """Divides users between one or two versions, and no longer follows the directory; whether anything changed.

        Raises UnknownModel, and RefusedModel when a version cannot be loaded or the shares don't add up to 1.
        """
        if not 1 <= len(shares) <= 2:
            raise RefusedModel(f"expected one or two versions, came {len(shares)}")
        if any(share <= 0 for share in shares.values()):
            raise RefusedModel(f"expected shares above 0, came {', '.join(f'{share:g}' for share in shares.values())}")
        total = sum(shares.values())
        if abs(total - 1) > SHARE_TOLERANCE:
            raise RefusedModel(f"expected shares that add up to 1, came {total:g}")
        with self._changing:
            changed = self._divide({version: share / total for version, share in shares.items()})
            self.automatic = False
            self._divided(by_hand=True)
            return changed

    def roll_back(self) -> str:
        """Gives all traffic to the version that had most of it before the last change, and returns it.

        It no longer follows the directory. Raises RefusedModel when there is none or it cannot be loaded any more.
        """
        with self._changing:
            previous = self._previous
            if previous is None:
                raise RefusedModel("no other version has served since the start")
            try:
                self._divide({previous: 1.0})
            except UnknownModel as error:
                raise RefusedModel(str(error)) from error
            self.automatic = False
            self._divided(by_hand=True)
            return previous

    def follow_division(self, division: Division) -> None:
        """Divides users as another process was told to; logs why, if that cannot be done. Where the directory is
        followed, the newest version counts: the other process may have said so before there was a newer one."""
        with self._changing:
            self.automatic = division.automatic and self._watches
            try:
                if division.automatic:
                    self._follow(find_versions(self._directory), older_too=True)
                else:
                    self._divide(division.shares)
            except (ArtifactError, UnknownModel, RefusedModel) as error:
                logger.error("users are divided otherwise than in the other processes: %s", error)
            self._follow_previous(division)

    def _follow_previous(self, division: Division) -> None:
        """Rolls back to what the other process would; to what that serves, where another version is served here."""
        main = max(division.shares, key=lambda version: division.shares[version], default="")
        self._previous = division.previous if main in ("", self._traffic.main) else main

    def _divided(self, *, by_hand: bool) -> None:
        self.on_division(Division(self._traffic.shares, self.automatic, self._previous), by_hand)

    def _divide(self, shares: Mapping[str, float]) -> bool:
        traffic = self._traffic
        if dict(shares) == dict(traffic.shares):
            return False
        there = {**self._kept, **traffic.ready}
        ready = {version: there.get(version) or self._named(version) for version in shares}
        self._serve(_Traffic(ready, shares))
        return True

    def _named(self, model_version: str) -> _Ready:
        found = [one for one in find_versions(self._directory) if one.model_version == model_version]
        if not found:
            raise UnknownModel(f"the version {shown(model_version)} is not in the model directory")
        try:
            return self._loaded(found[0])
        except (ArtifactError, ProviderError) as error:
            raise RefusedModel(f"the version {shown(model_version)} is refused: {error}") from error

    def _watch(self, watch_s: float) -> None:
        while not self._closed.wait(watch_s):
            if self._has_changed:
                # By now no call waits for the old version any more.
                self._has_changed = False
                return_memory()
            try:
                with self._changing:
                    if self.automatic and self._follow(find_versions(self._directory), older_too=False):
                        self._divided(by_hand=False)
            except ArtifactError as error:
                logger.error("the model directory cannot be followed: %s", error)
            except Exception:
                # Whatever it is, the next version may do, and meanwhile the loaded one serves.
                logger.exception("the model directory cannot be followed")

    def _follow(self, versions: Sequence[Version], *, older_too: bool) -> bool:
        """Serves the newest version that can be loaded, alone; whether that is a change."""
        folders = {version.folder for version in versions}
        self._refused = {folder: refused for folder, refused in self._refused.items() if folder in folders}
        for version in versions:
            if not version.model_version:
                # Its manifest cannot be read: for the record.
                self._try(version)
        for version in versions:
            traffic = self._traffic
            if not version.model_version:
                continue
            if version.model_version in traffic.ready:
                return self._divide({version.model_version: 1.0})
            if version.model_version < traffic.main and not older_too:
                return False
            ready = self._try(version)
            if ready is not None:
                self._serve(_Traffic({version.model_version: ready}, {version.model_version: 1.0}))
                return True
        return False

    def _try(self, version: Version) -> _Ready | None:
        """Loads a version unless it was refused as it is."""
        refused = self._refused.get(version.folder)
        if refused is not None and refused[0] == version.fingerprint:
            return None
        try:
            return self._loaded(version)
        except (ArtifactError, ProviderError):
            return None

    def _loaded(self, version: Version) -> _Ready:
        """Raises ArtifactError or ProviderError, having noted the reason."""
        self._loading = version.model_version
        try:
            model = self._load(version.path, self._make_room)
            if model.model.info.model_version != version.model_version:
                raise ArtifactError(f"{version.path}: was replaced while it was read")
        except (ArtifactError, ProviderError) as error:
            self._refused[version.folder] = (version.fingerprint, str(error))
            logger.error("refused the model %s: %s", version.model_version or version.folder, error)
            self._on_attempt("refused")
            raise
        finally:
            self._loading = ""
        self._refused.pop(version.folder, None)
        self._on_attempt("loaded")
        logger.info("loaded the model %s", version.model_version)
        return _Ready(model, int(time.time()))

    def _serve(self, traffic: _Traffic) -> None:
        before = self._traffic
        self._traffic = traffic
        self._has_changed = True
        if before.main:
            self._previous = before.main
        logger.info("serving %s", ", ".join(f"{version} to {share:.1%}" for version, share in self.shares()))
        self._on_change([traffic.ready[version].model for version in self.versions()])
        previous = self._previous
        there = {**self._kept, **before.ready}
        is_kept = self._keep_previous and previous in there and previous not in traffic.ready
        self._keep({previous: there[previous]} if is_kept and previous is not None else {})

    def _make_room(self) -> None:
        """Not three at once. If the new one fails after all, the one before is loaded again to roll back to it."""
        if self._kept:
            self._keep({})

    def _keep(self, kept: dict[str, _Ready]) -> None:
        self._kept = kept
        traffic = self._traffic
        serving = [traffic.ready[version].model for version in self.versions()]
        self._on_resident([*serving, *(ready.model for ready in kept.values())])

    @staticmethod
    def _report(traffic: _Traffic, version: str, folder: str, state: State, reason: str) -> Report:
        ready = traffic.ready.get(version)
        loaded_time = 0 if ready is None else ready.loaded_time
        return Report(version, folder, state, reason, traffic.shares.get(version, 0.0), loaded_time)


def position(user_id: str) -> float:
    """A user's place in [0, 1), the same in every process and independent of how ids are given."""
    return int.from_bytes(hashlib.blake2b(user_id.encode(), digest_size=6).digest()) / 2**48


def return_memory() -> None:
    """Gives freed memory back to the system: glibc keeps what lies between blocks still in use, some 100 MB."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
