"""The catalogue of a Redis store.

Its keys are `items` (hash of texts by item ID), `item_ids` (sorted set of these IDs, all with the score 0, so that they
are in the order of their bytes), `items_changed` (sorted set of the IDs, also of deleted items, by the revision of the
last change) and `items_revision` (counter).
"""

from collections.abc import Sequence
from typing import Any

from serve.model.live_catalog import Item
from serve.stores.base import ItemChanges
from serve.stores.redis.connection import RedisConnection
from serve.stores.rows import item_of_text, item_text

# ARGV: ids and texts of items, in turns. Returns how many are new.
UPSERT_ITEMS = """
local new = 0
for at = 1, #ARGV, 2 do
    new = new + redis.call('HSET', 'jaxrec:items', ARGV[at], ARGV[at + 1])
    redis.call('ZADD', 'jaxrec:item_ids', 0, ARGV[at])
    redis.call('ZADD', 'jaxrec:items_changed', redis.call('INCR', 'jaxrec:items_revision'), ARGV[at])
end
return new
"""
# ARGV: ids of items. Returns how many there were.
DELETE_ITEMS = """
local deleted = 0
for _, item in ipairs(ARGV) do
    if redis.call('HDEL', 'jaxrec:items', item) == 1 then
        redis.call('ZREM', 'jaxrec:item_ids', item)
        redis.call('ZADD', 'jaxrec:items_changed', redis.call('INCR', 'jaxrec:items_revision'), item)
        deleted = deleted + 1
    end
end
return deleted
"""
# ARGV: a revision, and how many items to read. Returns whether the store never had that revision, so that the items are
# the first of all, and id, revision and text ('': deleted) of each item that changed after it.
ITEMS_SINCE = """
local since, anew = ARGV[1], 0
if tonumber(since) > tonumber(redis.call('GET', 'jaxrec:items_revision') or '0') then
    since, anew = '0', 1
end
local found = redis.call(
    'ZRANGEBYSCORE', 'jaxrec:items_changed', '(' .. since, '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local rows = {}
for at = 1, #found, 2 do
    rows[#rows + 1] = {found[at], found[at + 1], redis.call('HGET', 'jaxrec:items', found[at]) or ''}
end
return {anew, rows}
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

    def upsert_items(self, items: Sequence[Item]) -> int:
        arguments = [argument for one in items for argument in (one.item_id, item_text(one))]
        return int(self._written(lambda client: self._upsert_items(args=arguments, client=client))) if items else 0

    def delete_items(self, item_ids: Sequence[str]) -> int:
        arguments = list(item_ids)
        return int(self._written(lambda client: self._delete_items(args=arguments, client=client))) if arguments else 0

    def items_since(self, revision: int, most: int) -> ItemChanges:
        is_older, rows = self._read(lambda: self._items_since(args=[revision, most]))
        anew = bool(is_older) or not revision
        if anew:
            revision = 0
        changed: list[tuple[str, Item | None]] = []
        for name, at, text in rows:
            item_id = name.decode()
            changed.append((item_id, item_of_text(item_id, text) if text else None))
            revision = int(at)
        return ItemChanges(revision, changed, anew)

    def item(self, item_id: str) -> Item | None:
        text: Any = self._read(lambda: self._redis.hget("jaxrec:items", item_id))
        return None if text is None else item_of_text(item_id, text)

    def list_items(self, after: str, most: int) -> list[Item]:
        begin = f"({after}" if after else "-"
        rows = self._read(lambda: self._list_items(args=[begin, most]))
        return [item_of_text(name.decode(), text) for name, text in zip(rows[::2], rows[1::2], strict=True)]
