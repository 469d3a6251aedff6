"""Who may call what: bearer tokens with rights.

The rights are `read` (recommend, look things up), `write` (record events and impressions), `users` (forget users and
events, merge users), `catalogue` (store and delete items) and `admin` (models). Health checks need none. A method that
is in no table needs `admin`. Without tokens, every caller may do everything.
"""

import hashlib
import hmac
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from serve.addresses import SecurityError
from serve.api.errors import NoRight, NoToken
from serve.settings import RIGHTS

logger = logging.getLogger(__name__)

SHORTEST_TOKEN = 16
# How often to look whether the file changed.
READ_EVERY_S = 2.0
# Methods by the service, and by the right that they need.
METHODS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "jaxrec.v1.Recommender": {
        "read": (
            *("Recommend", "BatchRecommend", "SimilarItems", "Trending", "GetUserProfile", "ListEvents"),
            *("GetItem", "ListItems", "GetModelInfo"),
        ),
        "write": ("RecordEvents", "RecordImpressions"),
        "users": ("DeleteUser", "DeleteEvents", "MergeUsers"),
        "catalogue": ("UpsertItems", "DeleteItems"),
    },
    "inference.GRPCInferenceService": {
        "read": ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
    },
    "grpc.reflection.v1alpha.ServerReflection": {"read": ("ServerReflectionInfo",)},
    # Not there: clients ask it first, and v1alpha only if it is UNIMPLEMENTED.
    "grpc.reflection.v1.ServerReflection": {"read": ("ServerReflectionInfo",)},
}
NEEDED: Mapping[str, str] = {
    f"/{service}/{name}": right
    for service, rights in METHODS.items()
    for right, names in rights.items()
    for name in names
}
HEALTH = "/grpc.health.v1.Health/"
"""Of its methods no right is asked."""


class Tokens:
    """The tokens that are accepted, with their rights. Keeps digests, so that no secret is in memory."""

    def __init__(self, rights_by_token: Mapping[str, Sequence[str]]) -> None:
        """Raises SecurityError."""
        if not rights_by_token:
            raise SecurityError("expected at least one token, came none")
        for token in rights_by_token:
            if len(token) < SHORTEST_TOKEN or not token.isascii() or any(c.isspace() for c in token):
                raise SecurityError(f"expected tokens of at least {SHORTEST_TOKEN} ASCII characters without spaces")
        self._path: Path | None = None
        self._read: FileState | None = None
        self._rights = [(_digest(token), frozenset(rights)) for token, rights in rights_by_token.items()]

    def follow(self, path: Path, state: "FileState") -> None:
        """Notes the file that the tokens come from, as it was read; see `read_again`."""
        self._path, self._read = path, state

    def watch(self, until: threading.Event) -> None:
        """Begins to read the file again when it changes, in a thread of its own."""

        def look() -> None:
            while not until.wait(READ_EVERY_S):
                try:
                    self.read_again()
                except Exception:
                    logger.exception("the tokens stay as they were")

        if self._path is not None:
            threading.Thread(target=look, name="tokens", daemon=True).start()

    def read_again(self) -> None:
        """Takes the tokens of the file that is followed, if it changed; what cannot be used changes nothing."""
        if self._path is None:
            return
        try:
            state = _state(self._path)
        except OSError:
            # It is being replaced.
            return
        if state == self._read:
            return
        self._read = state
        try:
            self._rights = read_tokens(self._path)._rights
        except SecurityError as error:
            logger.error("the tokens stay as they were: %s", error)
        else:
            logger.info("the tokens were read again")

    def rights(self, authorization: str) -> frozenset[str] | None:
        """The rights of `Bearer TOKEN`; None: no such token. Takes the same time whatever came."""
        scheme, _, token = authorization.partition(" ")
        digest, found = _digest(token.strip()), None
        for known, rights in self._rights:
            if hmac.compare_digest(known, digest):
                found = rights
        return found if scheme.lower() == "bearer" else None

    def check(self, right: str | None, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Raises NoToken or NoRight unless the metadata of a call have a token with a right; None: it needs none."""
        if right is None:
            return
        given = [value for key, value in metadata if key == "authorization"]
        # Of several headers, it would not be clear which one counts.
        rights = self.rights(str(given[0])) if len(given) == 1 else None
        if rights is None:
            raise NoToken
        if right not in rights:
            raise NoRight(right)


class FileState(NamedTuple):
    """By which a file that changed is known."""

    inode: int
    size: int
    changed_ns: int


def _state(path: Path) -> FileState:
    """Raises OSError."""
    stat = path.stat()
    return FileState(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def parse_tokens(text: str, where: str) -> Tokens:
    """Reads lines of `RIGHTS TOKEN`, such as `read,write 3fa9...`; empty lines and `#` lines are skipped.

    Raises SecurityError with `where` and the line.
    """
    rights_by_token: dict[str, Sequence[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 2 or not set(fields[0].split(",")) <= set(RIGHTS):
            raise SecurityError(
                f"{where}:{number}: expected RIGHTS TOKEN, with rights of {', '.join(RIGHTS)} joined by commas"
            )
        if fields[1] in rights_by_token:
            raise SecurityError(f"{where}:{number}: expected different tokens")
        rights_by_token[fields[1]] = fields[0].split(",")
    try:
        return Tokens(rights_by_token)
    except SecurityError as error:
        raise SecurityError(f"{where}: {error}") from error


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file, to be read again when it changes; raises SecurityError."""
    try:
        state, contents = _state(path), path.read_bytes()
        tokens = parse_tokens(contents.decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SecurityError(f"{path}: expected lines of text: {type(error).__name__}") from error
    tokens.follow(path, state)
    return tokens


@lru_cache(maxsize=256)
def needed_right(method: str) -> str | None:
    """What a call of `/package.Service/Method` needs."""
    return None if method.startswith(HEALTH) else NEEDED.get(method, "admin")
