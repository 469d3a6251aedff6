"""`python -m serve items`, as a human at a terminal has it."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from serve.cli import items as items_command
from serve.cli.main import main
from serve.client import Item, RecommenderClient
from serve.model.recommender import Recommender


def run(address: str, name: str, *arguments: str) -> str:
    ended = CliRunner().invoke(main, ["items", name, "--address", address, *arguments])
    return ended.output if ended.exit_code == 0 else f"exit {ended.exit_code}: {ended.output}"


FILES = {
    "items.csv": (
        "item_id,title,tags,available_from,available_until,hidden,metadata.year,metadata.poster\n"
        '1007,"A, b",Drama|Jazz,5,,0,1995,\n'
        "new,,,,7,TRUE,,p.png\n"
    ),
    "items.jsonl": (
        '{"item_id": "1007", "title": "A, b", "tags": ["Jazz", "Drama"], "available_from": 5,'
        ' "metadata": {"year": "1995"}}\n\n'
        '{"item_id": "new", "available_until": 7, "hidden": true, "metadata": {"poster": "p.png"}}\n'
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_items_of_a_file_are_stored(name: str, address: str, client: RecommenderClient, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    assert run(address, "upsert", str(tmp_path / name)) == "2 items created, 0 replaced\n"
    assert run(address, "upsert", str(tmp_path / name)) == "0 items created, 2 replaced\n"
    known, new = (one.item for one in client.list_items(stored_only=True).items)
    expected = Item(item_id="1007", title="A, b", tags=["Drama", "Jazz"], available_from=5, metadata={"year": "1995"})
    assert known == expected
    assert new == Item(item_id="new", available_until=7, hidden=True, metadata={"poster": "p.png"})


def test_what_is_listed_as_json_can_be_stored_again(
    address: str, client: RecommenderClient, model: Recommender, tmp_path: Path
) -> None:
    (tmp_path / "items.csv").write_text(FILES["items.csv"])
    run(address, "upsert", str(tmp_path / "items.csv"))
    before = client.list_items(1000, stored_only=True).items
    listed = run(address, "list", "--stored", "--format", "json")
    assert len(listed.splitlines()) == 2
    client.delete_items(["1007", "new"])
    (tmp_path / "items.jsonl").write_text(listed)
    run(address, "upsert", str(tmp_path / "items.jsonl"))
    assert client.list_items(1000, stored_only=True).items == before
    everything = run(address, "list", "--format", "json").splitlines()
    assert len(everything) == len(model.catalog) + 1


def test_lists_and_items_are_shown(address: str, client: RecommenderClient, model: Recommender) -> None:
    client.upsert_items([Item(item_id="0", title="First", tags=["a", "b"], available_until=86_400, hidden=True)])
    lines = run(address, "list", "--most", "2").splitlines()
    assert lines[1].split() == ["0", "First", "a,", "b", "1970-01-02", "00:00", "hidden", "stored"]
    assert lines[2].split()[0] == model.catalog.item_ids[1]
    assert lines[2].endswith("known, available")
    assert len(lines) == 3
    shown = json.loads(run(address, "get", "0"))
    assert (shown["title"], shown["hidden"], shown["stored"], shown["known"]) == ("First", True, True, False)
    assert run(address, "delete", "0", "nobody knows it") == "1 items deleted\n"
    assert run(address, "get", "0").startswith("exit 1: Error: NOT_FOUND: the item '0' is not stored")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "title\nA\n", "a.csv:1: expected a header with the column item_id"),
        ("a.csv", "item_id,title\n1,A\n2\n", "a.csv:3: expected 2 fields"),
        ("a.csv", "item_id,hidden\n1,0\n2,maybe\n", "a.csv:3: hidden: expected 0 or 1, came 'maybe'"),
        (
            "a.csv",
            "item_id,available_from\n1,soon\n",
            "a.csv:2: available_from: expected seconds since 1970, came 'soon'",
        ),
        ("a.csv", "item_id,title\n1,A\n,B\n", "a.csv:3: INVALID_ARGUMENT: items[1].item_id: expected an id"),
        ("a.jsonl", "{}\n[]\n", "a.jsonl:2: expected a JSON object"),
        ("a.jsonl", '{"item_id": "1"}\n{\n', "a.jsonl:2: expected a JSON object: "),
        ("a.jsonl", '\n{"item_id": "1", "genre": "x"}\n', "a.jsonl:2: expected item_id, title, tags,"),
        ("a.jsonl", '{"item_id": 1}\n', "a.jsonl:1: "),
        ("a.csv", "item_id,Hidden\n1,1\n", "a.csv:1: expected the columns item_id, title, tags,"),
        ("a.csv", "item_id,avaliable_until\n1,1\n", "a.csv:1: expected the columns item_id, title, tags,"),
        ("a.csv", "item_id,metadata.\n1,1\n", "a.csv:1: expected the columns item_id, title, tags,"),
        ("a.csv", "item_id,tags,hidden,tags\n1,a,0,b\n", "a.csv:1: expected each column once, came 'tags' twice"),
        (
            "a.csv",
            "item_id,metadata.a,metadata.a\n1,a,b\n",
            "a.csv:1: expected each column once, came 'metadata.a' twice",
        ),
        (
            "a.jsonl",
            '{"item_id": "1"}\n{"item_id": "2", "tags": "Drama"}\n',
            "a.jsonl:2: tags: expected a list of texts, came 'Drama'",
        ),
        ("a.jsonl", '{"item_id": "1", "tags": {"a": "b"}}\n', "a.jsonl:1: tags: expected a list of texts, came {"),
        ("a.jsonl", '{"item_id": "1", "tags": [1]}\n', "a.jsonl:1: tags: expected a list of texts, came [1]"),
        ("a.jsonl", '{"item_id": "1", "metadata": {"a": 1}}\n', "a.jsonl:1: metadata: expected an object of texts"),
        ("a.jsonl", '{"item_id": "1", "metadata": ["a"]}\n', "a.jsonl:1: metadata: expected an object of texts"),
        ("a.jsonl", '{"item_id": "1", "hidden": 1}\n', "a.jsonl:1: hidden: expected true or false, came 1"),
        ("a.jsonl", '{"item_id": "1", "available_from": true}\n', "a.jsonl:1: available_from: expected seconds"),
        ("a.jsonl", '{"item_id": "1", "hidden": false, "hidden": true}\n', "a.jsonl:1: expected a JSON object: each"),
        (
            "a.jsonl",
            '{"item_id": "0"}\n'
            + json.dumps({"item_id": "1", "title": "\u20ac" * 1_000, "tags": ["\u20ac" * 100] * 5}),
            "a.jsonl:2: INVALID_ARGUMENT: items[1]: expected an item of at most 4096 bytes",
        ),
        ("a.jsonl", '\n{"item_id": "1", "tags": [""]}\n', "a.jsonl:2: INVALID_ARGUMENT: items[0].tags[0]: expected"),
    ],
)
def test_a_bad_line_is_named(
    name: str, text: str, message: str, address: str, client: RecommenderClient, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    refused = run(address, "upsert", str(tmp_path / name))
    assert refused.startswith(f"exit 1: Error: {tmp_path}/{message}")
    assert not client.list_items(stored_only=True).items


def test_a_long_file_is_stored_in_parts(
    address: str, client: RecommenderClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items_command, "AT_ONCE", 3)
    file = tmp_path / "items.csv"
    file.write_text("item_id,title\n" + "".join(f"{at},T{at}\n" for at in range(8)))
    assert run(address, "upsert", str(file)) == "8 items created, 0 replaced\n"
    assert len(run(address, "list", "--stored").splitlines()) == 9
    assert run(address, "delete", *(f"{at}" for at in range(8))) == "8 items deleted\n"
    # The part with the bad item is refused, and the one before it is stored.
    file.write_text("item_id,title\n" + "".join(f"{at or ''},T{at}\n" for at in (1, 2, 3, 4, 0)))
    refused = run(address, "upsert", str(file))
    assert refused.startswith(f"exit 1: Error: {file}:6: INVALID_ARGUMENT: items[1].item_id")
    assert len(client.list_items(stored_only=True).items) == 3


def test_items_are_hidden_and_shown_with_all_that_is_known_of_them(
    address: str, client: RecommenderClient, model: Recommender
) -> None:
    known, stored = model.catalog.item_ids[1], Item(item_id="0", title="T", tags=["a"], metadata={"k": "v"})
    client.upsert_items([stored])
    before = client.get_item(known).item.item
    assert before.title
    assert run(address, "hide", known, "0", known) == "2 items hidden\n"
    assert run(address, "hide", known, "0") == "0 items hidden\n"
    hidden = [client.get_item(item_id).item for item_id in (known, "0")]
    assert [one.available for one in hidden] == [False, False]
    assert run(address, "show", known, "0") == "2 items shown\n"
    assert [client.get_item(item_id).item.item for item_id in (known, "0")] == [before, stored]
    assert run(address, "hide", "0", "nobody knows it").startswith("exit 1: Error: NOT_FOUND")
    assert client.get_item("0").item.available


def test_long_items_are_stored_in_smaller_parts(
    address: str, client: RecommenderClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of at most so many bytes; an item that is longer comes alone, and the server says which one it is."""
    sizes: list[int] = []
    monkeypatch.setattr(items_command, "MOST_BYTES", 5_000)
    upsert = RecommenderClient.upsert_items
    monkeypatch.setattr(
        RecommenderClient, "upsert_items", lambda self, items: sizes.append(len(items)) or upsert(self, items)
    )
    file = tmp_path / "items.csv"
    file.write_text("item_id,title\n" + "".join(f"{at},{'x' * 990}\n" for at in range(12)))
    assert run(address, "upsert", str(file)) == "12 items created, 0 replaced\n"
    assert sizes == [5, 5, 2]
    file.write_text(f"item_id,metadata.k\n1,a\n2,{'x' * 9_000}\n")
    refused = run(address, "upsert", str(file))
    assert refused.startswith(f"exit 1: Error: {file}:3: INVALID_ARGUMENT: items[0].metadata: expected")


@pytest.mark.parametrize("name", items_command.command.commands)
def test_help_explains_every_option(name: str) -> None:
    options = [one for one in items_command.command.commands[name].params if isinstance(one, click.Option)]
    assert len(options) >= 7
    assert [one.name for one in options if not one.help] == []
