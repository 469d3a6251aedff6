"""What runs within Redis on all that is stored of a user; see `serve.stores.redis.scripts`."""

# Remembers that a user is deleted, and forgets all but so many of the last deletions.
NOTE_DELETION = """
local function note_deletion(digest, kept)
    local number = redis.call('INCR', 'jaxrec:deletion')
    redis.call('ZADD', 'jaxrec:deletions', number, digest)
    redis.call('HSET', 'jaxrec:deletion_numbers', digest, number)
    for _, old in ipairs(redis.call('ZRANGEBYSCORE', 'jaxrec:deletions', '-inf', number - kept)) do
        redis.call('ZREM', 'jaxrec:deletions', old)
        redis.call('HDEL', 'jaxrec:deletion_numbers', old)
    end
end
"""
# Gives the history of a user a revision above all that were before, as of which it is read as a whole.
BEGIN_ANEW = """
local function begin_anew(user)
    redis.call('SREM', 'jaxrec:states', user)
    redis.call('DEL', 'jaxrec:states:' .. user, 'jaxrec:user:' .. user)
    if redis.call('EXISTS', 'jaxrec:events:' .. user, 'jaxrec:neutral:' .. user) > 0 then
        local revision = redis.call('INCR', 'jaxrec:revision')
        redis.call('HSET', 'jaxrec:user:' .. user, 'first', revision, 'last', revision)
    end
end
"""
# Removes so many entries from the head of a list, their ids from the set of all, and what was shown of them; returns
# how many are left.
FORGET = """
local function forget(list, ids, most)
    local part = redis.call('LRANGE', list, 0, most - 1)
    for _, text in ipairs(part) do
        local value = cjson.decode(string.sub(text, (string.find(text, '[', 1, true))))
        redis.call('SREM', ids, value[1])
        if ids == 'jaxrec:shown_ids' then
            redis.call('UNLINK', 'jaxrec:shown_items:' .. value[1])
        end
    end
    redis.call('LTRIM', list, #part, -1)
    return redis.call('LLEN', list)
end
"""
# ARGV: user, its digest, how many deletions are remembered, and how many entries of a list to delete now. More of them
# are put away where no reader looks, for FORGET_REST. Returns how many events, neutral events and slates there
# were.
DELETE_USER = (
    FORGET
    + NOTE_DELETION
    + """
local user = ARGV[1]
note_deletion(ARGV[2], ARGV[3])
redis.call('SREM', 'jaxrec:states', user)
redis.call('DEL', 'jaxrec:states:' .. user, 'jaxrec:user:' .. user)
local counts = {}
for at, kind in ipairs({'events', 'neutral', 'shown'}) do
    local list, ids = 'jaxrec:' .. kind .. ':' .. user, kind == 'shown' and 'jaxrec:shown_ids' or 'jaxrec:event_ids'
    counts[at] = redis.call('LLEN', list)
    if forget(list, ids, ARGV[4]) > 0 then
        local rest = string.format('jaxrec:deleted:%d', redis.call('INCR', 'jaxrec:revision'))
        redis.call('RENAME', list, rest)
        redis.call('HSET', 'jaxrec:deleted', rest, ids)
    end
end
return counts
"""
)
# ARGV: a list that was put away, the set of its ids, how many entries to delete now. Returns how many are left.
FORGET_REST = (
    FORGET
    + """
return forget(ARGV[1], ARGV[2], ARGV[3])
"""
)
# ARGV: user, and for each event to delete its list, its place in this, its value and its id. Returns how many were
# deleted; -1: a list is another one, and nothing was deleted.
DELETE_EVENTS = (
    BEGIN_ANEW
    + """
for at = 2, #ARGV, 4 do
    if redis.call('LINDEX', ARGV[at], ARGV[at + 1]) ~= ARGV[at + 2] then
        return -1
    end
end
local lists = {}
for at = 2, #ARGV, 4 do
    redis.call('LSET', ARGV[at], ARGV[at + 1], '')
    redis.call('SREM', 'jaxrec:event_ids', ARGV[at + 3])
    lists[ARGV[at]] = true
end
for list in pairs(lists) do
    redis.call('LREM', list, 0, '')
end
begin_anew(ARGV[1])
return (#ARGV - 1) / 4
"""
)
# ARGV: a list of slates, a time, how many to look at, and from which place of the list on. Deletes those from
# before the time, with what was shown of them; returns how many it looked at, and how many it deleted.
PRUNE_SLATES = """
local part, old = redis.call('LRANGE', ARGV[1], ARGV[4], ARGV[4] + ARGV[3] - 1), 0
for at, text in ipairs(part) do
    local slate = cjson.decode(text)
    if slate[7] < tonumber(ARGV[2]) then
        redis.call('SREM', 'jaxrec:shown_ids', slate[1])
        redis.call('UNLINK', 'jaxrec:shown_items:' .. slate[1])
        redis.call('LSET', ARGV[1], ARGV[4] + at - 1, '')
        old = old + 1
    end
end
if old > 0 then
    redis.call('LREM', ARGV[1], old, '')
end
return {#part, old}
"""
# ARGV: a hash of items that were shown, their recommendation, and a time. Deletes those that were recorded before the
# time, unless the recommendation is logged.
PRUNE_SHOWN = """
if redis.call('SISMEMBER', 'jaxrec:shown_ids', ARGV[2]) == 1 then
    return
end
local fields = redis.call('HGETALL', ARGV[1])
for at = 1, #fields, 2 do
    if cjson.decode(fields[at + 1])[3] < tonumber(ARGV[3]) then
        redis.call('HDEL', ARGV[1], fields[at])
    end
end
"""
# ARGV: for each item that was shown the hash of its recommendation, the item and its value. Returns how many are new.
RECORD_SHOWN = """
local new = 0
for at = 1, #ARGV, 3 do
    new = new + redis.call('HSETNX', ARGV[at], ARGV[at + 1], ARGV[at + 2])
end
return new
"""
# ARGV: source, target, digest of the source, how many deletions are remembered, how many entries may be moved, and
# among how many of the target's last events and of its last slates the source's are merged. Events are merged by
# revision and slates by time, since readers look at the last ones only. All is read and merged before the first
# write. Returns how many events, neutral events and slates the source had, and whether they were moved (1) or are
# too many (0).
MERGE_USERS = (
    NOTE_DELETION
    + BEGIN_ANEW
    + """
local source, target = ARGV[1], ARGV[2]
local kinds, counts = {'events', 'neutral', 'shown'}, {}
for at, kind in ipairs(kinds) do
    counts[at] = redis.call('LLEN', 'jaxrec:' .. kind .. ':' .. source)
end
if counts[1] + counts[2] + counts[3] > tonumber(ARGV[5]) then
    counts[4] = 0
    return counts
end

local function keyed(list, kind)
    local entries = {}
    for at, text in ipairs(list) do
        local key = kind == 'shown' and cjson.decode(text)[7] or tonumber(string.match(text, '^%d+'))
        entries[at] = {key, text}
    end
    return entries
end

local function merged(one, other)
    local all, first, second = {}, 1, 1
    while first <= #one or second <= #other do
        if second > #other or (first <= #one and one[first][1] <= other[second][1]) then
            all[#all + 1], first = one[first][2], first + 1
        else
            all[#all + 1], second = other[second][2], second + 1
        end
    end
    return all
end

local lists = {}
for at, kind in ipairs(kinds) do
    if counts[at] > 0 then
        local window = kind == 'shown' and ARGV[7] or ARGV[6]
        local own = redis.call('LRANGE', 'jaxrec:' .. kind .. ':' .. target, -window, -1)
        local new = redis.call('LRANGE', 'jaxrec:' .. kind .. ':' .. source, 0, -1)
        lists[kind] = {#own, merged(keyed(own, kind), keyed(new, kind))}
    end
end
for kind, list in pairs(lists) do
    local to = 'jaxrec:' .. kind .. ':' .. target
    if list[1] == redis.call('LLEN', to) then
        redis.call('DEL', to)
    else
        redis.call('LTRIM', to, 0, -list[1] - 1)
    end
    for first = 1, #list[2], 1000 do
        redis.call('RPUSH', to, unpack(list[2], first, math.min(first + 999, #list[2])))
    end
    redis.call('DEL', 'jaxrec:' .. kind .. ':' .. source)
end
begin_anew(source)
if counts[1] + counts[2] > 0 then
    begin_anew(target)
end
note_deletion(ARGV[3], ARGV[4])
counts[4] = 1
return counts
"""
)
