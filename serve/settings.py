"""What a server is configured with, from options, environment variables, a TOML file and defaults, in this order."""

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

Provider = Literal["auto", "cpu", "cuda"]
SearchBy = Literal["auto", "exact", "index"]
LogFormat = Literal["json", "text"]

PREFIX = "JAXREC_"
FILE_VARIABLE = f"{PREFIX}SETTINGS"
# Of the client and of `jaxrec`, which may be in the same environment.
OTHER_VARIABLES = (FILE_VARIABLE, f"{PREFIX}TOKEN", f"{PREFIX}MLFLOW")
# What Kubernetes and Docker set for a service that is called jaxrec.
LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT(_\d+_|$)")


# As browsers write them: in lower case, without the port that the scheme has anyway.
HOST = re.compile(r"[a-z0-9_.-]+")
ORIGIN = re.compile(rf"(http(?!.*:80$)|https(?!.*:443$))://({HOST.pattern}|\[[0-9a-f:]+\])(:\d{{1,5}})?")
# gRPC counts milliseconds in 32 bits.
LONGEST_CONNECTION_S = 2_000_000
MOST_STORE_THREADS = 64
# Of a token; `serve.front.auth` says what each allows.
RIGHTS = ("read", "write", "users", "catalogue", "admin")


class SettingsError(ValueError):
    """A setting is unknown, missing or has a bad value; the message names it and where it came from."""


class Setting(NamedTuple):
    """How one setting is read and described."""

    read: Callable[[Any], Any]
    """The value of a text or of a TOML value; raises ValueError, TypeError, KeyError or AttributeError."""
    expected: str
    metavar: str
    """What stands for the value in the help; empty: true or false."""
    help: str

    @property
    def secret(self) -> bool:
        """Not an option, since other users of the machine can read command lines; not repeated in messages."""
        return not self.help


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _count(value: Any) -> int:
    if isinstance(value, (bool, float)) or int(value) < 1:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < math.inf:
        raise ValueError
    return float(value)


_FLAGS = {"true": True, "1": True, "false": False, "0": False}
# By the type of a field: how it is read, what is expected, its usual metavar.
_KINDS: Mapping[Any, tuple[Callable[[Any], Any], str, str]] = {
    str: (_text, "a text", "TEXT"),
    Path: (lambda value: Path(value if isinstance(value, Path) else _text(value)), "a path", "FILE"),
    bool: (lambda value: value if isinstance(value, bool) else _FLAGS[value.lower()], "true or false", ""),
    int: (_count, "a whole number from 1 on", "N"),
    float: (_number, "a number from 0 on", "NUMBER"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of `python -m serve run`, each with its metavar, where that is not the usual one, and its help.

    A field `tls_cert` is the option `--tls-cert`, the environment variable `JAXREC_TLS_CERT` and the key `tls_cert` of
    the file. Paths are relative to the working directory, wherever they came from.
    """

    model: Annotated[Path, "MODEL", "Model directory, or a directory of model directories."]
    address: Annotated[
        str,
        "HOST:PORT",
        "Where to listen, or unix:PATH. Port 0: a free one. An address that other machines reach needs TLS and"
        " authentication.",
    ] = "127.0.0.1:50051"
    store: Annotated[
        str,
        "STORE",
        "SQLite file with the events of all users, created when missing; or postgresql://... or redis://...",
    ] = field(default="events.sqlite", repr=False)  # a URL may hold a password
    fast: Annotated[
        str | None,
        "ADDRESS",
        "Where to answer Recommend alone, faster, for a proxy on this machine: unix:PATH or HOST:PORT of loopback."
        " Needs the extra fast; strangers must not reach it.",
    ] = None
    http: Annotated[
        str | None,
        "HOST:PORT",
        "Where to answer HTTP with JSON, and a browser with a page, with the TLS and the tokens of the address.",
    ] = None
    http_origins: Annotated[
        str | None,
        "ORIGINS",
        "Origins of other sites' pages that may call over HTTP, joined by commas, such as https://example.org; or *.",
    ] = None
    http_hosts: Annotated[
        str | None,
        "NAMES",
        "Names, joined by commas, under which a server is asked over HTTP that needs neither a token nor a client"
        " certificate, beside localhost, its own and IP addresses; or *.",
    ] = None
    provider: Annotated[
        Provider, "What runs the model. auto: CUDA where it works, else the CPU. cuda: fail without CUDA."
    ] = "auto"
    threads: Annotated[int, "Threads within one run of the model. Requests run in parallel anyway."] = 1
    states: Annotated[
        int,
        "USERS",
        "For how many users to keep in memory what the model has read of them: about 5 KB each, 50 KB with histories of"
        " thousands of events. Others' are read from the store.",
    ] = 10_000
    store_threads: Annotated[
        int, "Threads for calls that write or read the store, such as RecordEvents, not for Recommend. At most 64."
    ] = 8
    event_types: Annotated[
        Path | None,
        "TOML file with a line `name = weight` for each type of events beside the built-in ones. Above 0: part of the"
        " history, and so much reward. Below 0: the item is not recommended to the user again. 0: only kept.",
    ] = None
    slate_log: Annotated[
        float,
        "SHARE",
        "Share of the users whose recommendations are kept in the store, 0 to 1: of these users all, of others none.",
    ] = 1.0
    slate_retention: Annotated[
        float,
        "DAYS",
        "Delete recommendations and impressions that are older. 0: they are kept until their user is deleted.",
    ] = 0.0
    search: Annotated[
        SearchBy,
        "How the best items are found. auto: with the model's index if it has one, which large catalogues do. exact:"
        " all items are scored. index: fail without an index.",
    ] = "auto"
    tls_cert: Annotated[Path | None, "Certificate chain in PEM; read again when it changes."] = None
    tls_key: Annotated[Path | None, "Private key of the certificate in PEM."] = None
    tls_client_ca: Annotated[Path | None, "Accept only clients with a certificate of these authorities, in PEM."] = None
    tokens_file: Annotated[
        Path | None,
        f"File with one line `RIGHTS TOKEN` for each accepted token, RIGHTS being some of {','.join(RIGHTS)}. The"
        " variable JAXREC_TOKENS can hold the lines instead. Without either, no token is needed.",
    ] = None
    tokens: Annotated[str | None, ""] = field(default=None, repr=False)
    """The lines of a tokens file themselves."""
    allow_insecure: Annotated[
        bool, "Listen for other machines without TLS or authentication, for calls and for metrics."
    ] = False
    metrics: Annotated[
        str | None, "HOST:PORT", "Where Prometheus fetches metrics, over HTTP without TLS or authentication."
    ] = None
    allow_insecure_metrics: Annotated[
        bool, "Let other machines fetch the metrics. Calls keep their TLS and authentication."
    ] = False
    explore: Annotated[
        float,
        "TEMPERATURE",
        "Sample the items of an answer in proportion to exp(score / TEMPERATURE), with their probabilities in the"
        " answer and in the store, so that a policy can learn from the log. 0: always the best items.",
    ] = 0.0
    reranker: Annotated[
        str | None,
        "FUNCTION",
        "Python function that orders the model's candidates before they are answered, as MODULE:FUNCTION or the name of"
        " an entry point of the group jaxrec.rerankers. Not with --explore, which draws answers.",
    ] = None
    reranker_timeout_s: Annotated[
        float, "SECONDS", "How long the re-ranker may take; after that, the model's order is answered."
    ] = 0.05
    processes: Annotated[
        int,
        "Server processes, for example one for each core. They share the port, over which the kernel spreads"
        " connections, and the store; a process that ends is started again.",
    ] = 1
    shared_port: Annotated[
        bool,
        "Let other servers that have this setting listen on the same port: the kernel spreads connections over them."
        " They may share a store.",
    ] = False
    connection_age: Annotated[
        float,
        "SECONDS",
        "After so long a client is asked to connect anew, so that clients spread over servers that came later; a"
        " response that its client does not read is kept for no longer.",
    ] = 600.0
    watch: Annotated[float, "SECONDS", "How often to look for a newer version of MODEL. 0: never."] = 2.0
    forget_previous: Annotated[
        bool,
        "Do not keep the version that answered before in memory: RollBack then loads it from its folder, which takes as"
        " long as at the start and fails if the folder is gone.",
    ] = False
    trend_refresh_s: Annotated[
        float,
        "SECONDS",
        "How often to read new counts of items' events from the store. 0: never, the trend is that of MODEL's export,"
        " and decays.",
    ] = 5.0
    drain: Annotated[float, "SECONDS", "How long calls may take to finish when the server stops."] = 10.0
    log_format: Annotated[
        LogFormat, "Format of the log on standard error: JSON objects, or text for human readers."
    ] = "json"
    log_calls: Annotated[bool, "Write a log line for every call, not only for failures of the server."] = False

    def __post_init__(self) -> None:
        """Raises SettingsError for settings that exclude each other, and for what is too large."""
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and not self.tls_cert):
            raise SettingsError("expected tls_cert and tls_key together, and tls_client_ca only with them")
        for name, least, most, unit in (
            ("connection_age", 1, LONGEST_CONNECTION_S, " seconds"),
            ("slate_log", 0, 1, ""),
            ("store_threads", 1, MOST_STORE_THREADS, ""),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise SettingsError(f"{name}: expected {least} to {most}{unit}, came {value:g}")
        if self.processes > 1 and self.address.startswith("unix:"):
            raise SettingsError("expected processes = 1 with unix:PATH: processes cannot share a Unix socket")
        if self.processes > 1 and self.fast is not None and (self.fast.startswith("unix:") or self.fast.endswith(":0")):
            raise SettingsError(
                f"fast: expected 127.0.0.1:PORT, which {self.processes} processes share, came {self.fast}"
            )
        if self.http is None and (self.http_origins is not None or self.http_hosts is not None):
            raise SettingsError("expected http_origins and http_hosts only with http")
        for name, form, expected in (
            ("http_origins", ORIGIN, "origins such as https://example.org:8443, without a path"),
            ("http_hosts", HOST, "names without a scheme or a port"),
        ):
            for one in listed(getattr(self, name)):
                if one != "*" and not form.fullmatch(one):
                    raise SettingsError(f"{name}: expected {expected}, or *, came {one!r}")
        if self.tokens is not None and self.tokens_file is not None:
            raise SettingsError("expected tokens or tokens_file, and not both")
        if self.reranker is not None and self.explore:
            raise SettingsError("expected explore or reranker, and not both: what a re-ranker orders is not drawn")
        if self.reranker is not None and not self.reranker_timeout_s:
            raise SettingsError("reranker_timeout_s: expected a number above 0, came 0: every call would be late")


def listed(text: str | None) -> list[str]:
    """The parts of a setting that are joined by commas."""
    return [] if text is None else [one.strip() for one in text.split(",")]


def _setting(hint: Any) -> Setting:
    kind, (*metavar, what) = hint.__origin__, hint.__metadata__
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        names = "|".join(choices)
        return Setting(lambda value: choices[choices.index(value)], f"one of {names}", f"[{names}]", what)
    read, expected, usual = _KINDS[choices[0] if choices else kind]
    return Setting(read, expected, metavar[0] if metavar else usual, what)


SETTINGS: Mapping[str, Setting] = {
    name: _setting(hint) for name, hint in get_type_hints(Settings, include_extras=True).items()
}
"""By field name."""
DEFAULTS: Mapping[str, Any] = {
    one.name: one.default
    for one in fields(Settings)
    if not (one.default is MISSING or one.default is None or one.default is False)
}
"""By field name; those that the help shows."""


def read_settings(
    options: Mapping[str, Any], environment: Mapping[str, str], file: str | Path | None = None
) -> Settings:
    """Gathers the settings; an option beats an environment variable, which beats the file, which beats a default.

    Args:
        options: Values by field name; None for an option that was not given.
        environment: Environment variables; those whose names start with `JAXREC_` count.
        file: A TOML file with field names as keys. None: the file that `JAXREC_SETTINGS` names, if any.

    Raises:
        SettingsError: A key is unknown, a value is bad, MODEL is missing, or the file cannot be read.
    """
    values: dict[str, Any] = {}
    file = file or environment.get(FILE_VARIABLE) or None
    if file is not None:
        values |= _checked({f"{file}: {key}": (key, value) for key, value in _table(Path(file)).items()})
    variables = {
        name: (key, value)
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in OTHER_VARIABLES
        if (key := name.removeprefix(PREFIX).lower()) in SETTINGS or not LINK.search(name)
    }
    # A source that has one of the two replaces both of an earlier source.
    for more in (
        _checked(variables),
        _checked({f"--{key.replace('_', '-')}": (key, value) for key, value in options.items() if value is not None}),
    ):
        if more.keys() & {"tokens", "tokens_file"}:
            values.pop("tokens", None)
            values.pop("tokens_file", None)
        values |= more
    if "model" not in values:
        raise SettingsError(f"expected a model directory: MODEL, {PREFIX}MODEL or the key model of the settings file")
    return Settings(**values)


def _table(file: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{file}: expected TOML in UTF-8: {error}") from error


def _checked(given: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Values by field name, of keys and raw values by where they came from."""
    values = {}
    for source, (key, value) in given.items():
        if key not in SETTINGS:
            raise SettingsError(f"{source}: unknown setting, expected one of {', '.join(SETTINGS)}")
        setting = SETTINGS[key]
        try:
            values[key] = setting.read(value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            came = "another value" if setting.secret else repr(value)
            raise SettingsError(f"{source}: expected {setting.expected}, came {came}") from error
    return values
