"""`python -m serve ask` and `run` with its security, as a human at a terminal has them."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner

from bench.model_versions import add_version, edit_manifest
from serve.cli.connecting import table
from serve.cli.main import main
from serve.client import Part, RecommenderClient, UserEvent
from serve.front.server import create_server
from serve.model.directory import read_artifact
from serve.model.recommender import Recommender
from serve.stores.base import EventStore
from tests.serve.one_model import one_model
from tests.serve.process import running_server

TOKENS = "read,write writer-token-0123\nread reader-token-0123\n"


def ask(address: str, *arguments: str, **variables: str) -> str:
    ended = CliRunner().invoke(main, ["ask", "--address", address, *arguments], env=variables)
    return ended.output if ended.exit_code == 0 else f"exit {ended.exit_code}: {ended.output}"


def test_tables_are_aligned_and_harmless() -> None:
    assert table(["", "name", "score"], [["1", "a", "-1.5"], ["10", "b\x1b[31m", "12"]]) == (
        "    name    score\n 1  a        -1.5\n10  b?[31m     12"
    )


def test_recommendations(address: str, client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids
    client.record_events(
        UserEvent(event_id=f"{at}", user_id="7", item_id=ids[at], rating=4.5, timestamp=at) for at in (3, 9)
    )
    expected = client.recommend(user_id="7", k=2, explain=True).recommendations
    lines = ask(address, "--user", "7", "--k", "2", "--why").splitlines()
    assert lines[0].split() == ["item", "title", "genres", "score", "why", "parts", "of", "the", "score"]
    for line, one in zip(lines[1:3], expected, strict=True):
        for text in (one.item_id, one.title, ", ".join(one.genres), f"{one.score:.3f}", one.explanation.text):
            assert text in line
        for part in one.explanation.parts:
            assert f"{Part.Name(part.part).removeprefix('PART_').lower()} {part.value:+.3f}" in line
    assert f"policy reinforce, model {model.info.model_version}, recommendation " in lines[4]
    inline = ask(address, "--watched", ids[3], "--watched", f"{ids[9]}=4.5", "--watched", "no such film", "--k", "3")
    assert len(inline.splitlines()) == 1 + 3 + 3
    assert "1 events on items that the model does not know were left out" in inline


def test_events_with_a_user_an_id_and_a_version(address: str, client: RecommenderClient, model: Recommender) -> None:
    ids, version = model.catalog.item_ids, model.info.model_version
    client.record_events([UserEvent(event_id="1", user_id="7", item_id=ids[3], timestamp=3)])
    asked = ["--user", "7", "--watched", ids[9], "--k", "60"]
    found = ask(address, *asked, "--request-id", "r", "--model-version", version)
    assert {line.split()[1] for line in found.splitlines()[1:59]} == set(ids[1:]) - {ids[3], ids[9]}
    assert found.splitlines()[-1] == ask(address, *asked, "--request-id", "r").splitlines()[-1]
    assert f"the loaded versions are '{version}'; 'x' is not loaded" in ask(address, *asked, "--model-version", "x")
    assert version in ask(address, "--model-version", version)
    for other in (["--user", "7"], ["--profile", "7"], []):
        refused = ask("127.0.0.1:1", *other, "--bucket-key", "x")
        assert "--bucket-key: expected --watched or --similar, without --user, with it" in refused
    for question in (["--watched", ids[3]], ["--similar", ids[3]]):
        assert ask(address, *question, "--bucket-key", "visit").startswith(" ")
        assert "expected none with model_version" in ask(
            address, *question, "--bucket-key", "v", "--model-version", version
        )
    refused = ask("127.0.0.1:1", "--profile", "7", "--model-version", "x")
    assert "Error: --model-version: expected --user, --watched, --similar or nothing with it" in refused


def test_filters_and_other_options(address: str, client: RecommenderClient, model: Recommender) -> None:
    ids, genres = model.catalog.item_ids, model.catalog.genres
    both = next(item for item in range(4, 61) if {"Drama", "Horror"} <= set(genres[item]))
    asked = ["--allow", ids[both], "--allow", ids[3], "--all-tag", "Drama", "--any-tag", "Horror"]

    def lines(*more: str) -> list[str]:
        return ask(address, *more, *asked).splitlines()

    assert lines("--watched", ids[1])[1].split()[:2] == ["1", ids[both]]
    assert lines("--similar", ids[1])[1].split()[:2] == ["1", ids[both]]
    assert lines("--watched", ids[1], "--exclude", ids[both])[1] == ""
    contradiction = (
        "exit 1: Error: INVALID_ARGUMENT: filter.all_tags: expected no tag of filter.none_tags, came 'Drama'"
    )
    assert lines("--watched", ids[1], "--no-tag", "Drama")[0] == contradiction
    assert ask(address, "--watched", ids[1], "--minimum-score", "1e9").splitlines()[1] == ""
    seen = ["--watched", ids[1], "--allow", ids[1], "--seen"]
    assert ask(address, *seen, "allow").splitlines()[1].split()[1] == ids[1]
    assert ask(address, *seen, "exclude").splitlines()[1] == ""
    assert len(ask(address, "--watched", ids[1], "--new-items", "3").splitlines()) == 1 + 10 + 2


@pytest.mark.parametrize(
    "option", [["--seen", "allow"], ["--new-items", "3"], ["--why"], ["--pin", "1=1"]], ids=lambda option: option[0]
)
@pytest.mark.parametrize(
    "question", [["--similar", "1007"], ["--profile", "7"], []], ids=["similar", "profile", "model"]
)
def test_options_of_recommendations_are_refused_elsewhere(question: list[str], option: list[str]) -> None:
    assert f"Error: {option[0]}: expected --user or --watched with it" in ask("127.0.0.1:1", *question, *option)


@pytest.mark.parametrize("option", ["--exclude", "--allow", "--any-tag", "--all-tag", "--no-tag", "--minimum-score"])
@pytest.mark.parametrize("question", [["--profile", "7"], []], ids=["profile", "model"])
def test_filters_are_refused_where_no_items_are_ranked(question: list[str], option: str) -> None:
    refused = ask("127.0.0.1:1", *question, option, "1")
    assert refused.startswith("exit 2: ")
    assert f"Error: {option}: expected --user, --watched, --similar or --trending with it" in refused


def test_what_is_popular_now(address: str, model: Recommender) -> None:
    ids, tag = model.catalog.item_ids, model.catalog.genres[1][0]
    lines = ask(address, "--trending", "week", "--k", "60", "--any-tag", tag, "--exclude", ids[1]).splitlines()
    assert lines[0].split() == ["item", "title", "genres", "events"]
    with_tag = {item_id for item_id, of_item in zip(ids, model.catalog.genres, strict=True) if tag in of_item}
    assert {line.split()[1] for line in lines[1:]} == with_tag - {ids[1]}
    assert "expected one of --user or --watched, --similar, --trending" in ask(
        address, "--trending", "day", "--user", "7"
    )


def test_rules_after_the_model(address: str, model: Recommender) -> None:
    ids = model.catalog.item_ids
    whole = [line.split()[1] for line in ask(address, "--watched", ids[1], "--k", "60").splitlines()[1:-2]]
    last = whole[-1]
    pinned = ask(address, "--watched", ids[1], "--pin", f"{last}=2", "--k", "3").splitlines()
    assert pinned[0].split() == ["item", "title", "genres", "score", "rules"]
    assert [line.split()[1] for line in pinned[1:4]] == [whole[0], last, whole[1]]
    assert [line.endswith("pin") for line in pinned[1:4]] == [False, True, False]
    boosted = ask(address, "--watched", ids[1], "--boost-tag", "Drama=100", "--boost", f"{last}=100", "--why")
    assert "boost" in boosted
    tagged = ask(address, "--watched", ids[1], "--pin-tag", "Drama=1", "--diversity", ".5", "--max-per-tag", "2")
    assert "Drama" in tagged.splitlines()[1]
    assert "rules.diversity: expected 0 to 1" in ask(address, "--watched", ids[1], "--diversity", "2")
    assert ask(address, "--watched", ids[1], "--pin", last).splitlines() == [
        f"exit 1: Error: expected NAME=VALUE, came {last}"
    ]


def test_an_argument_that_is_no_text_is_one_line(address: str) -> None:
    refused = ask(address, "--watched", "1007", "--allow", b"\xff".decode(errors="surrogateescape"))
    assert refused.startswith("exit 1: Error: ")
    assert "surrogates not allowed" in refused


def test_similar_items_profile_and_model(address: str, client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids
    (nearest,) = client.similar_items(ids[3], k=1).items
    assert nearest.title in ask(address, "--similar", ids[3], "--k", "1")
    client.record_events([UserEvent(event_id="1", user_id="7", item_id=ids[3], rating=4.5, timestamp=86_400)])
    profile = ask(address, "--profile", "7")
    assert profile.startswith("1 events, the last 1:")
    assert "1970-01-02 00:00" in profile
    assert "4.5" in profile
    for genre in model.catalog.genres[3]:
        assert genre in profile
    client.record_events(
        [UserEvent(event_id="2", user_id="7", item_id="new", timestamp=90_000, type="purchase", value=19.5)]
    )
    first, last = (line.split() for line in ask(address, "--events", "7").splitlines()[1:])
    assert first == ["1970-01-02", "01:00", "purchase", "new", "19.5", "2"]
    assert last == ["1970-01-02", "00:00", "interaction", ids[3], "4.5", "1"]
    about = ask(address)
    assert model.info.model_version in about
    assert "0.5 to 5" in about


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--similar", "no such film"], "exit 1: Error: NOT_FOUND: the model"),
        (["--profile", "nobody"], "exit 1: Error: NOT_FOUND: no event of the user 'nobody' is stored"),
        (["--watched", "1007=9"], "exit 1: Error: INVALID_ARGUMENT: history.events[0].rating: expected a rating in"),
        (["--watched", "1007=good"], "exit 1: Error: could not convert string to float: 'good'"),
        (["--user", "7", "--similar", "1007"], "exit 2: Usage: "),
        (["--user", "7", "--events", "7"], "exit 2: Usage: "),
    ],
)
def test_failures_are_one_line(address: str, arguments: list[str], message: str) -> None:
    assert ask(address, *arguments).startswith(message)


def test_no_server_listens() -> None:
    assert ask("127.0.0.1:1", "--timeout", "0.3").startswith("exit 1: Error: ")


def test_a_time_that_is_not_known_is_not_1970(model_directory: Path, store: EventStore, tmp_path: Path) -> None:
    folder = add_version(tmp_path / "versions", model_directory, "1")
    edit_manifest(folder, lambda manifest: manifest.update(created="yesterday"))
    server = create_server(one_model(Recommender(read_artifact(folder), "cpu"), store), store, "127.0.0.1:0")
    server.start()
    assert "exported  unknown" in ask(f"127.0.0.1:{server.port}")
    server.drain()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "tokens").write_text(TOKENS)
    (folder / "token").write_text("writer-token-0123\n")
    return folder


@pytest.fixture(scope="module")
def secured(model_directory: Path, files: Path) -> Iterator[str]:
    options = ["--tls-cert", f"{files}/cert.pem", "--tls-key", f"{files}/key.pem", "--tokens-file", f"{files}/tokens"]
    with running_server(model_directory, files / "s", provider="cpu", options=options) as server:
        yield server.address


def test_a_secured_server_answers_clients_with_certificate_and_token(secured: str, files: Path) -> None:
    ca = ["--ca", f"{files}/ca.pem"]
    assert "exported" in ask(secured, *ca, "--token-file", f"{files}/token")
    assert "exported" in ask(secured, *ca, JAXREC_TOKEN="reader-token-0123")
    assert ask(secured, *ca).startswith("exit 1: Error: UNAUTHENTICATED: expected the metadata authorization")
    assert ask(secured, "--timeout", "0.5").startswith("exit 1: Error: ")


def run(model_directory: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve", "run", str(model_directory), "--store", str(folder / "s"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_run_refuses_an_open_door_and_shows_no_secret(model_directory: Path, files: Path, tmp_path: Path) -> None:
    open_door = run(model_directory, tmp_path, "--address", "0.0.0.0:0")
    assert open_door.returncode == 1
    assert "0.0.0.0:0 can be reached from other machines, and there is no TLS" in open_door.stderr
    half = run(model_directory, tmp_path, "--tls-cert", f"{files}/cert.pem")
    assert half.returncode == 2
    assert "expected tls_cert and tls_key together" in half.stderr
    bad_tokens = tmp_path / "tokens"
    bad_tokens.write_text("read,wrong writer-token-0123\n")
    refused = run(model_directory, tmp_path, "--tokens-file", str(bad_tokens))
    assert refused.returncode == 1
    assert f"{bad_tokens}:1: expected RIGHTS TOKEN" in refused.stderr
    assert "writer-token" not in refused.stderr + refused.stdout


def test_prometheus_fetches_metrics_and_the_log_is_json(model_directory: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        options = ["--metrics", "127.0.0.1:0", "--log-calls"]
        with (
            running_server(model_directory, tmp_path / "s", provider="cpu", options=options, stderr=stream) as server,
            RecommenderClient(server.address, timeout_s=30) as client,
        ):
            client.recommend(history=[])
            at = next(line["address"] for line in map(json.loads, log.read_text().splitlines()) if "address" in line)
            with urllib.request.urlopen(f"http://{at}/metrics", timeout=30) as response:
                text = response.read().decode()
    assert 'jaxrec_answers_total{policy="popularity"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    (model_version,) = [line for line in text.splitlines() if line.startswith("jaxrec_model_info{")]
    assert model_version.endswith(" 1.0")
    calls = [line for line in map(json.loads, log.read_text().splitlines()) if "method" in line]
    assert calls[0]["method"] == "/jaxrec.v1.Recommender/Recommend"
