"""`python -m serve items`: lists, shows, stores and deletes items of a running server's catalogue."""

import csv
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import click
import grpc

from serve.cli.connecting import Connecting, connected, connection_options, table
from serve.client import Item, RecommenderClient
from serve.pb.recommender_pb2 import CatalogItem

AT_ONCE = 1_000
MOST_BYTES = 2 * 2**20
"""Of a part: servers take 8 MiB at most, and proxies less."""
METADATA = "metadata."
"""Columns of metadata begin with it."""
COLUMNS = ("item_id", "title", "tags", "available_from", "available_until", "hidden")
TIMES: tuple[Literal["available_from"], Literal["available_until"]] = ("available_from", "available_until")
BOOLEANS = {"": False, "0": False, "false": False, "1": True, "true": True}


@click.group("items")
def command() -> None:
    """The catalogue of a running server: its items, and what is stored of them."""


@command.command("list")
@connection_options
@click.option("--stored", is_flag=True, help="Only what was stored, without the other items of the model directory.")
@click.option("--most", type=click.IntRange(1), metavar="N", help="At most so many items.  [default: all]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For people, or JSON lines that `upsert` reads.",
)
def list_(connection: Connecting, stored: bool, most: int | None, form: str) -> None:
    """List items in the order of their ids."""
    with connected(connection) as client:
        found = islice(_all_items(client, stored), most)
        if form == "table":
            click.echo(_table(list(found)))
            return
        for entry in found:
            click.echo(json.dumps(_fields(entry.item), ensure_ascii=False))


@command.command("get")
@connection_options
@click.argument("item_id")
def get(connection: Connecting, item_id: str) -> None:
    """Show one item as JSON, with where it comes from."""
    with connected(connection) as client:
        answer = client.get_item(item_id)
    entry = answer.item
    fields = {**_fields(entry.item), "stored": entry.stored, "known": entry.known, "available": entry.available}
    click.echo(json.dumps({**fields, "model_version": answer.model_version}, ensure_ascii=False, indent=2))


@command.command("upsert")
@connection_options
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def upsert(connection: Connecting, file: Path) -> None:
    """Store the items of FILE, each as a whole: what is not in the file is not kept.

    A file that ends with .csv has a header with the column item_id, and any of title, tags (with | between them),
    available_from and available_until (seconds since 1970), hidden (0 or 1), and metadata.NAME for each text of the
    metadata. Any other file has a JSON object on each line, with the same names, tags as a list, and metadata as an
    object of texts.

    The items go to the server in parts of at most 1,000. A part with a bad item is refused as a whole; those before it
    are stored, and the command can be repeated.
    """
    created = replaced = 0
    with connected(connection) as client:
        for part in _parts(_read(file)):
            lines, items = zip(*part, strict=True)
            try:
                answer = client.upsert_items(items)
            except grpc.RpcError as error:
                raise ValueError(_with_line(file, lines, error)) from error
            created, replaced = created + answer.created_count, replaced + answer.replaced_count
    click.echo(f"{created} items created, {replaced} replaced")


@command.command("hide")
@connection_options
@click.argument("item_ids", nargs=-1, required=True, metavar="ITEM...")
def hide(connection: Connecting, item_ids: tuple[str, ...]) -> None:
    """Keep items from being answered. All else that is known of them is stored as it is."""
    click.echo(f"{_set_hidden(connection, item_ids, hidden=True)} items hidden")


@command.command("show")
@connection_options
@click.argument("item_ids", nargs=-1, required=True, metavar="ITEM...")
def show(connection: Connecting, item_ids: tuple[str, ...]) -> None:
    """Let hidden items be answered again."""
    click.echo(f"{_set_hidden(connection, item_ids, hidden=False)} items shown")


@command.command("delete")
@connection_options
@click.argument("item_ids", nargs=-1, required=True, metavar="ITEM...")
def delete(connection: Connecting, item_ids: tuple[str, ...]) -> None:
    """Delete what is stored of items. An item of the model is then what the model directory says."""
    deleted = 0
    with connected(connection) as client:
        for start in range(0, len(item_ids), AT_ONCE):
            deleted += client.delete_items(item_ids[start : start + AT_ONCE]).deleted_count
    click.echo(f"{deleted} items deleted")


def _set_hidden(connection: Connecting, item_ids: Sequence[str], *, hidden: bool) -> int:
    """How many items were not so before."""
    with connected(connection) as client:
        found = [client.get_item(item_id).item.item for item_id in dict.fromkeys(item_ids)]
        changed = [item for item in found if item.hidden != hidden]
        for item in changed:
            item.hidden = hidden
        for part in _parts(enumerate(changed)):
            client.upsert_items([item for _, item in part])
    return len(changed)


def _all_items(client: RecommenderClient, stored: bool) -> Iterator[CatalogItem]:
    token = None
    while token != "":
        page = client.list_items(AT_ONCE, token or "", stored)
        yield from page.items
        token = page.next_page_token


def _fields(item: Item) -> dict[str, Any]:
    """What an item has, by name."""
    fields: dict[str, Any] = {"item_id": item.item_id, "title": item.title, "tags": list(item.tags)}
    fields |= {name: getattr(item, name) for name in TIMES if item.HasField(name)}
    return {**fields, "hidden": item.hidden, "metadata": dict(sorted(item.metadata.items()))}


def _table(entries: Sequence[CatalogItem]) -> str:
    rows = []
    for entry in entries:
        item = entry.item
        since, until = (
            time.strftime("%Y-%m-%d %H:%M", time.gmtime(getattr(item, name))) if item.HasField(name) else ""
            for name in TIMES
        )
        marks = [
            name
            for name, holds in (("stored", entry.stored), ("known", entry.known), ("available", entry.available))
            if holds
        ]
        row = [item.item_id, item.title, ", ".join(item.tags), since, until, "hidden" if item.hidden else ""]
        rows.append([*row, ", ".join(marks)])
    return table(["item", "title", "tags", "from (UTC)", "until (UTC)", "hidden", ""], rows)


def _parts(items: Iterable[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """Parts of at most `AT_ONCE` items and, unless it is one item, of at most `MOST_BYTES`."""
    part: list[tuple[int, Item]] = []
    size = 0
    for line, item in items:
        size += item.ByteSize()
        if part and (len(part) == AT_ONCE or size > MOST_BYTES):
            yield part
            part, size = [], item.ByteSize()
        part.append((line, item))
    if part:
        yield part


def _read(file: Path) -> Iterator[tuple[int, Item]]:
    """The items of a file with their lines; raises ValueError with the line."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = _csv_rows(lines) if file.suffix == ".csv" else _json_rows(lines)
        line = 0
        try:
            for line, fields in rows:
                yield line, _item(fields)
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{file}:{getattr(error, 'line', line) or 1}: {error}") from error


def _csv_rows(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    header = list(reader.fieldnames or ())
    if "item_id" not in header:
        raise ValueError("expected a header with the column item_id")
    for at, name in enumerate(header):
        if name in header[:at]:
            raise ValueError(f"expected each column once, came {name!r} twice")
        if name not in COLUMNS and not (name.startswith(METADATA) and name != METADATA):
            raise ValueError(f"expected the columns {', '.join(COLUMNS)} and {METADATA}NAME, came {name!r}")
    for row in reader:
        if None in row or None in row.values():
            raise LineError(reader.line_num, f"expected {len(header)} fields")
        fields: dict[str, Any] = {name: row.pop(name) for name in COLUMNS if name in row}
        fields["tags"] = [tag for tag in fields.get("tags", "").split("|") if tag]
        hidden = fields.get("hidden", "").lower()
        if hidden not in BOOLEANS:
            raise LineError(reader.line_num, f"hidden: expected 0 or 1, came {hidden!r}")
        fields["hidden"] = BOOLEANS[hidden]
        for name in TIMES:
            text = fields.pop(name, "")
            try:
                fields |= {name: int(text)} if text else {}
            except ValueError as error:
                raise LineError(reader.line_num, f"{name}: expected seconds since 1970, came {text!r}") from error
        # An empty field is none: each row has a field for every column.
        metadata = {key.removeprefix(METADATA): value for key, value in row.items() if value}
        yield reader.line_num, {**fields, "metadata": metadata}


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text, object_pairs_hook=_each_once)
        except ValueError as error:
            raise LineError(number, f"expected a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise LineError(number, "expected a JSON object")
        yield number, fields


def _each_once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in fields]
    if len(set(names)) < len(names):
        raise ValueError(f"each name once, came {max(names, key=names.count)!r} twice")
    return dict(fields)


class LineError(ValueError):
    """A line of a file cannot be read."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _item(fields: Mapping[str, Any]) -> Item:
    unknown = fields.keys() - {*COLUMNS, "metadata"}
    if unknown:
        raise ValueError(f"expected {', '.join(COLUMNS)} and metadata, came {', '.join(sorted(unknown))}")
    tags, metadata = fields.get("tags", []), fields.get("metadata", {})
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"tags: expected a list of texts, came {tags!r}")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"metadata: expected an object of texts, came {metadata!r}")
    for name, kind, expected in (
        ("hidden", bool, "true or false"),
        *((name, int, "seconds since 1970") for name in TIMES),
    ):
        if name in fields and type(fields[name]) is not kind:
            raise ValueError(f"{name}: expected {expected}, came {fields[name]!r}")
    return Item(**fields)


def _with_line(file: Path, lines: Sequence[int], error: grpc.RpcError) -> str:
    """What the server says of a part, with the line that it means."""
    details = error.details() or ""
    found = re.match(r"items\[(\d+)\]", details)
    where = f"{file}:{lines[int(found[1])]}" if found else f"{file}: lines {lines[0]} to {lines[-1]}"
    return f"{where}: {error.code().name}: {details}"
