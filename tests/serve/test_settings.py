"""Settings come from options, environment variables, a file and defaults, and what is wrong with one is said."""

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from jaxrec.cli.main import main as of_jaxrec
from serve.cli import run
from serve.cli.main import main
from serve.front.auth import METHODS
from serve.settings import RIGHTS, SETTINGS, Settings, SettingsError, read_settings

MODEL = {"model": "m"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text('model = "of the file"\naddress = "file:1"\nthreads = 2\nwatch = 3\nlog_calls = true\n')
    return path


def test_an_option_beats_a_variable_which_beats_the_file_which_beats_the_default(file: Path) -> None:
    variables = {"JAXREC_ADDRESS": "variable:1", "JAXREC_THREADS": "4", "OTHER": "x", "JAXREC_LOG_CALLS": "false"}
    settings = read_settings({"threads": 8, "watch": None}, variables, file)
    assert settings == Settings(model=Path("of the file"), address="variable:1", threads=8, watch=3.0)
    assert read_settings({}, {"JAXREC_SETTINGS": str(file)}).threads == 2
    assert read_settings(MODEL, {}) == Settings(Path("m"))


def test_every_setting_can_be_a_variable_and_a_key(tmp_path: Path) -> None:
    texts = {
        **{name: "1" for name in SETTINGS if name not in ("tokens", "reranker")},
        **{"provider": "cuda", "search": "index", "log_format": "text", "slate_log": "0.5", "processes": "2"},
        "http_origins": "https://example.org",
    }
    (tmp_path / "f.toml").write_text("\n".join(f'{name} = "{text}"' for name, text in texts.items()))
    from_file = read_settings({}, {}, tmp_path / "f.toml")
    assert from_file == read_settings({}, {f"JAXREC_{name.upper()}": text for name, text in texts.items()})
    default = Settings(Path("m"))
    assert all(getattr(from_file, name) != getattr(default, name) for name in texts if name != "threads")


def test_tokens_of_one_source_replace_those_of_another(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text('tokens = "read of-the-file-0123"\n')
    settings = read_settings({**MODEL, "tokens_file": "here"}, {}, tmp_path / "f.toml")
    assert (settings.tokens, settings.tokens_file) == (None, Path("here"))
    kept = read_settings(MODEL, {"JAXREC_TOKENS": "read a-secret-0123456"})
    assert kept.tokens == "read a-secret-0123456"
    assert "secret" not in repr(kept)
    assert "secret" not in repr(Settings(Path("m"), store="postgresql://jaxrec:secret@host/events"))


def test_no_variable_of_another_command_keeps_a_server_from_starting() -> None:
    found = set()
    for group in (main, of_jaxrec):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            commands = command.commands.values() if isinstance(command, click.Group) else [command]
            found |= {option.envvar for one in commands for option in one.params if isinstance(option.envvar, str)}
    ours = {name for name in found if name.startswith("JAXREC_")}
    assert {"JAXREC_MLFLOW", "JAXREC_STORE", "JAXREC_ADDRESS"} <= ours
    for name in ours:
        read_settings(MODEL, {name: "127.0.0.1:1"} | ({"JAXREC_TLS_KEY": "k"} if name == "JAXREC_TLS_CERT" else {}))


def test_variables_of_the_client_and_of_a_service_called_jaxrec_are_not_settings() -> None:
    names = ["TOKEN", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP_ADDR"]
    assert read_settings(MODEL, {f"JAXREC_{name}": "tcp://10.0.0.1:50051" for name in names}) == Settings(Path("m"))


@pytest.mark.parametrize(
    ("options", "variables", "text", "message"),
    [
        ({}, {"JAXREC_TLS_CRT": "x"}, "", "JAXREC_TLS_CRT: unknown setting, expected one of model, address, store"),
        ({}, {}, "wach = 1", "serve.toml: wach: unknown setting, expected one of "),
        ({"threads": "0"}, {}, "", "--threads: expected a whole number from 1 on, came '0'"),
        ({"log_format": "xml"}, {}, "", "--log-format: expected one of json|text, came 'xml'"),
        ({}, {"JAXREC_WATCH": "soon"}, "", "JAXREC_WATCH: expected a number from 0 on, came 'soon'"),
        ({}, {"JAXREC_DRAIN": "-1"}, "", "JAXREC_DRAIN: expected a number from 0 on, came '-1'"),
        ({}, {"JAXREC_DRAIN": "nan"}, "", "JAXREC_DRAIN: expected a number from 0 on, came 'nan'"),
        ({}, {"JAXREC_HTTP_HOSTS": "example.org"}, "", "expected http_origins and http_hosts only with http"),
        *(
            ({"http": "127.0.0.1:0", name: f"{good},{bad}"}, {}, "", f"{name}: expected ")
            for name, good, bads in (
                (
                    *("http_origins", "https://example.org:8443"),
                    (
                        *("example.org", "https://example.org/", "ftp://example.org", "https://", "https://a:b"),
                        *("https://*.example.org", "HTTPS://example.org", "https://a:443", "http://a:80", "", "null"),
                    ),
                ),
                ("http_hosts", "example.org", ("https://example.org", "example.org:80", "Example.org", "", "a b")),
            )
            for bad in bads
        ),
        ({}, {"JAXREC_SHARED_PORT": "yes"}, "", "JAXREC_SHARED_PORT: expected true or false, came 'yes'"),
        ({}, {"JAXREC_TOKENS": ""}, "", "JAXREC_TOKENS: expected a text, came another value"),
        ({}, {}, "threads = 1.5", "serve.toml: threads: expected a whole number from 1 on, came 1.5"),
        ({}, {}, "tokens = [1234]", "serve.toml: tokens: expected a text, came another value"),
        ({}, {}, "watch = true", "serve.toml: watch: expected a number from 0 on, came True"),
        ({}, {}, "shared_port = 1", "serve.toml: shared_port: expected true or false, came 1"),
        ({}, {}, "watch", "serve.toml: expected TOML in UTF-8: "),
        ({}, {"JAXREC_TLS_CERT": "x"}, "", "expected tls_cert and tls_key together, and tls_client_ca only with them"),
        ({"address": "unix:/a"}, {}, "processes = 2", "expected processes = 1 with unix:PATH"),
        ({"fast": "unix:/a"}, {}, "processes = 2", "fast: expected 127.0.0.1:PORT, which 2 processes share"),
        ({"fast": "127.0.0.1:0"}, {}, "processes = 2", "fast: expected 127.0.0.1:PORT, which 2 processes share"),
        ({"explore": 0.5, "reranker": "m:f"}, {}, "", "expected explore or reranker, and not both"),
        ({"reranker": "m:f"}, {}, "reranker_timeout_s = 0", "reranker_timeout_s: expected a number above 0, came 0"),
        ({"model": None}, {}, "", "expected a model directory: MODEL, JAXREC_MODEL or the key model"),
    ],
)
def test_what_is_wrong_names_its_source(
    options: dict[str, Any], variables: dict[str, str], text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as failure:
        read_settings(MODEL | options, variables, file)
    assert message in str(failure.value)
    assert "1234" not in str(failure.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere: cannot be read: No such file"):
        read_settings(MODEL, {}, tmp_path / "nowhere")


def test_run_is_configured_by_all_sources(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []
    monkeypatch.setattr(run, "serve", given.append)
    arguments = [
        "run",
        "--settings",
        str(file),
        "--explore",
        "0.5",
        "--no-log-calls",
        "--shared-port",
        "--tls-cert",
        "c",
        "--tls-key",
        "k",
    ]
    ended = CliRunner().invoke(main, arguments, env={"JAXREC_STORE": "redis://"})
    assert ended.exit_code == 0, ended.output
    expected = Settings(Path("of the file"), "file:1", "redis://", threads=2, watch=3.0, explore=0.5, shared_port=True)
    assert given == [dataclasses.replace(expected, tls_cert=Path("c"), tls_key=Path("k"))]
    wrong = CliRunner().invoke(main, ["run", "m", "--threads", "none"])
    assert wrong.exit_code == 2
    assert "--threads': expected a whole number from 1 on, came 'none'" in wrong.output


@pytest.mark.parametrize("seconds", [0, 0.0004, 0.9, 1e7])
def test_an_age_of_connections_that_grpc_cannot_count_is_refused(seconds: float) -> None:
    with pytest.raises(SettingsError, match="connection_age: expected 1 to 2000000 seconds"):
        Settings(model=Path("model"), connection_age=seconds)


def test_more_threads_than_the_store_keeps_connections_for_are_refused() -> None:
    assert Settings(Path("m"), store_threads=64).store_threads == 64
    with pytest.raises(SettingsError, match="store_threads: expected 1 to 64, came 65"):
        Settings(Path("m"), store_threads=65)


def test_the_help_and_the_token_of_the_docs_have_every_right() -> None:
    every = ",".join(RIGHTS)
    assert {right for methods in METHODS.values() for right in methods} <= set(RIGHTS)
    assert f"some of {every}." in SETTINGS["tokens_file"].help
    for page, line in (("security", f'echo "{every} $'), ("deploying", f'JAXREC_TOKENS="{every} $')):
        assert line in (Path(__file__).parents[2] / f"docs/{page}.md").read_text("utf-8")
