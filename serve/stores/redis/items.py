"""The catalogue of a Redis store.

Its keys are `items` (hash of texts by item ID), `item_ids` (sorted set of these IDs, all with the score 0, so that they
are in the order of their bytes), `items_changed` (sorted set of the IDs, also of deleted items, by the revision of the
last change), `items_deleted` (those of deleted items, with the same revisions), `item_marks` (sorted set of the newest
marks by the last revision of their change) and `items_revision` (counter).
"""

from collections.abc import Sequence
from typing import Any

from serve.model.live_catalog import Item
from serve.stores.base import MOST_ITEM_MARKS, ItemChanges, ItemCursor
from serve.stores.counters import Damaged
from serve.stores.redis.connection import RedisConnection
from serve.stores.rows import DAMAGED_ITEM, item_of_text, item_text, new_mark

# Leaves the mark of a change, and forgets old marks, and what was deleted before the first of the others.
MARK = """
local function mark(new, most)
    redis.call('ZADD', 'jaxrec:item_marks', redis.call('GET', 'jaxrec:items_revision'), new)
    redis.call('ZREMRANGEBYRANK', 'jaxrec:item_marks', 0, -1 - most)
    local first = redis.call('ZRANGE', 'jaxrec:item_marks', 0, 0, 'WITHSCORES')[2]
    for _, item in ipairs(redis.call('ZRANGEBYSCORE', 'jaxrec:items_deleted', '-inf', first)) do
        redis.call('ZREM', 'jaxrec:items_changed', item)
        redis.call('ZREM', 'jaxrec:items_deleted', item)
    end
end
"""
# ARGV: a new mark, how many marks are kept, and ids and texts of items, in turns. Returns how many are new.
UPSERT_ITEMS = f"""{MARK}
local new = 0
for at = 3, #ARGV, 2 do
    redis.call('ZREM', 'jaxrec:items_deleted', ARGV[at])
    new = new + redis.call('HSET', 'jaxrec:items', ARGV[at], ARGV[at + 1])
    redis.call('ZADD', 'jaxrec:item_ids', 0, ARGV[at])
    redis.call('ZADD', 'jaxrec:items_changed', redis.call('INCR', 'jaxrec:items_revision'), ARGV[at])
end
mark(ARGV[1], ARGV[2])
return new
"""
# ARGV: a new mark, how many marks are kept, and ids of items. Returns how many there were.
DELETE_ITEMS = f"""{MARK}
local deleted = 0
for at = 3, #ARGV do
    local item = ARGV[at]
    if redis.call('HDEL', 'jaxrec:items', item) == 1 then
        redis.call('ZREM', 'jaxrec:item_ids', item)
        local revision = redis.call('INCR', 'jaxrec:items_revision')
        redis.call('ZADD', 'jaxrec:items_changed', revision, item)
        redis.call('ZADD', 'jaxrec:items_deleted', revision, item)
        deleted = deleted + 1
    end
end
if deleted > 0 then
    mark(ARGV[1], ARGV[2])
end
return deleted
"""
# ARGV: a revision, how many items to read, and marks. Returns whether a mark is missing, so that the items are the
# first of all, the newest mark, and id, revision and text ('': deleted) of each item that changed after the revision.
ITEMS_SINCE = """
local since, anew = ARGV[1], tonumber(ARGV[1]) == 0 and 1 or 0
for at = 3, #ARGV do
    if not redis.call('ZSCORE', 'jaxrec:item_marks', ARGV[at]) then
        since, anew = '0', 1
    end
end
local found = redis.call(
    'ZRANGEBYSCORE', 'jaxrec:items_changed', '(' .. since, '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local rows = {}
for at = 1, #found, 2 do
    rows[#rows + 1] = {found[at], found[at + 1], redis.call('HGET', 'jaxrec:items', found[at]) or ''}
end
return {anew, redis.call('ZRANGE', 'jaxrec:item_marks', -1, -1)[1] or '', rows}
"""
# ARGV: where to begin, as ZRANGEBYLEX has it, and how many items to read. Returns their ids and texts, in turns.
LIST_ITEMS = """
local rows = {}
for _, item in ipairs(redis.call('ZRANGEBYLEX', 'jaxrec:item_ids', ARGV[1], '+', 'LIMIT', 0, ARGV[2])) do
    rows[#rows + 1] = item
    rows[#rows + 1] = redis.call('HGET', 'jaxrec:items', item)
end
return rows
"""


class RedisItems(RedisConnection):
    """The part of a store that keeps the catalogue."""

    def __init__(self, location: str) -> None:
        """As `RedisConnection`."""
        super().__init__(location)
        self._upsert_items = self._redis.register_script(UPSERT_ITEMS)
        self._delete_items = self._redis.register_script(DELETE_ITEMS)
        self._items_since = self._redis.register_script(ITEMS_SINCE)
        self._list_items = self._redis.register_script(LIST_ITEMS)
        self._damaged_items = Damaged("Redis, jaxrec:items", DAMAGED_ITEM)

    def upsert_items(self, items: Sequence[Item]) -> int:
        arguments: list[Any] = [*_new_mark()]
        for one in items:
            arguments += [one.item_id, item_text(one)]
        return int(self._written(lambda client: self._upsert_items(args=arguments, client=client))) if items else 0

    def delete_items(self, item_ids: Sequence[str]) -> int:
        arguments: list[Any] = [*_new_mark(), *item_ids]
        return int(self._written(lambda client: self._delete_items(args=arguments, client=client))) if item_ids else 0

    def items_since(self, cursor: ItemCursor, most: int) -> ItemChanges:
        arguments: list[Any] = [cursor.revision, most, *cursor.marks]
        anew, mark, rows = self._read(lambda: self._items_since(args=arguments))
        newest, revision = mark.decode(), 0 if anew else cursor.revision
        changed: list[tuple[str, Item | None]] = []
        for name, at, text in rows:
            item_id = name.decode()
            changed.append((item_id, self._item(item_id, text) if text else None))
            revision = int(at)
        begun = newest if anew or len(rows) < most else cursor.begun
        return ItemChanges(ItemCursor(revision, begun, newest), changed, bool(anew))

    def item(self, item_id: str) -> Item | None:
        text: Any = self._read(lambda: self._redis.hget("jaxrec:items", item_id))
        return None if text is None else self._item(item_id, text)

    def list_items(self, after: str, most: int) -> list[Item]:
        begin = f"({after}" if after else "-"
        rows = self._read(lambda: self._list_items(args=[begin, most]))
        return [self._item(name.decode(), text) for name, text in zip(rows[::2], rows[1::2], strict=True)]

    def _item(self, item_id: str, text: bytes) -> Item:
        return item_of_text(item_id, text, self._damaged_items)


def _new_mark() -> tuple[str, int]:
    """The first arguments of scripts that change items."""
    return new_mark(), MOST_ITEM_MARKS
