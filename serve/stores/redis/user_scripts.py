"""What runs within Redis on all that is stored of a user; see `serve.stores.redis.scripts`."""

# Remembers that a user is deleted, as of now.
NOTE_DELETION = """
local function note_deletion(digest, kept)
    local time = redis.call('TIME')
    local now = time[1] + time[2] / 1e6
    redis.call('ZREMRANGEBYSCORE', 'jaxrec:deletions', '-inf', now - kept)
    redis.call('ZADD', 'jaxrec:deletions', string.format('%.6f', now), digest)
end
"""
# Gives the history of a user a revision above all that were before, as of which it is read as a whole.
BEGIN_ANEW = """
local function begin_anew(user)
    redis.call('SREM', 'jaxrec:states', user)
    redis.call('DEL', 'jaxrec:states:' .. user, 'jaxrec:user:' .. user)
    if redis.call('EXISTS', 'jaxrec:events:' .. user) == 1 then
        local revision = redis.call('INCR', 'jaxrec:revision')
        redis.call('HSET', 'jaxrec:user:' .. user, 'first', revision, 'last', revision)
    end
end
"""
# Takes so many entries from the head of a list, and their ids from the set of all; returns how many are left.
FORGET = """
local function forget(list, ids, most)
    local part = redis.call('LRANGE', list, 0, most - 1)
    for _, text in ipairs(part) do
        local value = cjson.decode(string.sub(text, (string.find(text, '[', 1, true))))
        redis.call('SREM', ids, value[1])
    end
    redis.call('LTRIM', list, #part, -1)
    return redis.call('LLEN', list)
end
"""
# ARGV: user, its digest, for how many seconds that is kept, and how many entries of a list to delete now. More of them
# are put away where no reader looks, for FORGET_REST. Returns how many events and impressions there were.
DELETE_USER = (
    FORGET
    + NOTE_DELETION
    + """
local user = ARGV[1]
redis.call('UNLINK', 'jaxrec:shown_items:' .. user)
note_deletion(ARGV[2], ARGV[3])
redis.call('SREM', 'jaxrec:states', user)
redis.call('DEL', 'jaxrec:states:' .. user, 'jaxrec:user:' .. user)
local counts = {}
for at, kind in ipairs({'events', 'shown'}) do
    local list, ids = 'jaxrec:' .. kind .. ':' .. user, ({'jaxrec:event_ids', 'jaxrec:shown_ids'})[at]
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
# ARGV: user, and for each event to delete its place in the user's list, its value and its id. Returns how many were
# deleted; -1: the list is another one, and nothing was deleted.
DELETE_EVENTS = (
    BEGIN_ANEW
    + """
local list = 'jaxrec:events:' .. ARGV[1]
for at = 2, #ARGV, 3 do
    if redis.call('LINDEX', list, ARGV[at]) ~= ARGV[at + 1] then
        return -1
    end
end
for at = 2, #ARGV, 3 do
    redis.call('LSET', list, ARGV[at], '')
    redis.call('SREM', 'jaxrec:event_ids', ARGV[at + 2])
end
redis.call('LREM', list, 0, '')
begin_anew(ARGV[1])
return (#ARGV - 1) / 3
"""
)
# ARGV: a list of impressions, a time, and how many to look at from the head on. Deletes those from before the time, up
# to the first that is not; returns how many these were.
PRUNE_SLATES = """
local old = 0
for _, text in ipairs(redis.call('LRANGE', ARGV[1], 0, ARGV[3] - 1)) do
    local impression = cjson.decode(text)
    if impression[7] >= tonumber(ARGV[2]) then
        break
    end
    redis.call('SREM', 'jaxrec:shown_ids', impression[1])
    old = old + 1
end
redis.call('LTRIM', ARGV[1], old, -1)
return old
"""
# ARGV: for each item that was shown the hash of its user, its field and its value. Returns how many are new.
RECORD_SHOWN = """
local new = 0
for at = 1, #ARGV, 3 do
    new = new + redis.call('HSETNX', ARGV[at], ARGV[at + 1], ARGV[at + 2])
end
return new
"""
# ARGV: source, target, digest of the source, for how many seconds that is kept, and how many entries may be moved.
# Returns how many events and impressions were moved; -1: there are more.
MERGE_USERS = (
    NOTE_DELETION
    + BEGIN_ANEW
    + """
local source, target = ARGV[1], ARGV[2]
local counts = {}
for at, kind in ipairs({'events', 'shown'}) do
    counts[at] = redis.call('LLEN', 'jaxrec:' .. kind .. ':' .. source)
end
if counts[1] + counts[2] > tonumber(ARGV[5]) then
    return {-1, -1}
end
for at, kind in ipairs({'events', 'shown'}) do
    local from, to = 'jaxrec:' .. kind .. ':' .. source, 'jaxrec:' .. kind .. ':' .. target
    for first = 0, counts[at] - 1, 1000 do
        redis.call('RPUSH', to, unpack(redis.call('LRANGE', from, first, first + 999)))
    end
    redis.call('DEL', from)
end
local from, to = 'jaxrec:shown_items:' .. source, 'jaxrec:shown_items:' .. target
local fields = redis.call('HGETALL', from)
for at = 1, #fields, 2 do
    redis.call('HSETNX', to, fields[at], fields[at + 1])
end
redis.call('UNLINK', from)
begin_anew(source)
if counts[1] > 0 then
    begin_anew(target)
end
note_deletion(ARGV[3], ARGV[4])
return counts
"""
)
