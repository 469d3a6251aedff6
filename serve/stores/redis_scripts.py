"""What `serve.stores.redis` runs within Redis: each script is one step, of which no reader sees a half.

None takes longer than the client waits: what depends on the length of a list is done in parts.
"""

from serve.model.trend import HALF_LIVES_S

# ARGV: for each event its id, user, value, item and time. Returns 1 for each that is new. Arguments, not KEYS: see
# above. A counter is a text: its reference, and its counts, each as exactly as a number is.
RECORD = """
local half_lives = {HALF_LIVES}
local counters, items = {}, {}

local function counter_of(item)
    local counter = counters[item]
    if not counter then
        counter = {}
        for number in string.gmatch(redis.call('HGET', 'jaxrec:trend', item) or '', '%S+') do
            counter[#counter + 1] = tonumber(number)
        end
        counters[item] = counter
        items[#items + 1] = item
    end
    return counter
end

local function count(counter, time)
    local seconds = time - (counter[1] or time)
    for at, half_life in ipairs(half_lives) do
        local before = counter[at + 1] or 0
        if seconds > 0 then
            counter[at + 1] = before * 0.5 ^ (seconds / half_life) + 1
        else
            counter[at + 1] = before + 0.5 ^ (-seconds / half_life)
        end
    end
    counter[1] = math.max(time, counter[1] or time)
end

local new = {}
for at = 1, #ARGV, 5 do
    local user = ARGV[at + 1]
    local is_new = redis.call('SADD', 'jaxrec:event_ids', ARGV[at])
    if is_new == 1 then
        local revision = redis.call('INCR', 'jaxrec:revision')
        redis.call('HSETNX', 'jaxrec:user:' .. user, 'first', revision)
        redis.call('HSET', 'jaxrec:user:' .. user, 'last', revision)
        redis.call('RPUSH', 'jaxrec:events:' .. user, string.format('%d', revision) .. ' ' .. ARGV[at + 2])
        local counter = counter_of(ARGV[at + 3])
        count(counter, tonumber(ARGV[at + 4]))
        counter.changed = revision
    end
    new[#new + 1] = is_new
end
for _, item in ipairs(items) do
    local counter, numbers = counters[item], {}
    for at, number in ipairs(counter) do
        numbers[at] = string.format('%.17g', number)
    end
    redis.call('HSET', 'jaxrec:trend', item, table.concat(numbers, ' '))
    redis.call('ZADD', 'jaxrec:trend_changed', string.format('%d', counter.changed), item)
end
return new
""".replace("HALF_LIVES", ", ".join(map(str, HALF_LIVES_S)))
# Begins all counters anew. Returns the revision up to which events are not in them; -1: the store is seeded.
BEGIN_COUNTS = """
if redis.call('EXISTS', 'jaxrec:trend_seed') == 1 then
    return -1
end
local revision = tonumber(redis.call('GET', 'jaxrec:revision') or '0')
redis.call('UNLINK', 'jaxrec:trend', 'jaxrec:trend_changed')
redis.call('SET', 'jaxrec:trend_begun', string.format('%d', revision))
return revision
"""
# ARGV: what BEGIN_COUNTS returned, and the seed. Only the first one, and of the last beginning.
SEED_COUNTS = """
if redis.call('GET', 'jaxrec:trend_begun') == ARGV[1] then
    redis.call('SETNX', 'jaxrec:trend_seed', ARGV[2])
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
    + """
local user = ARGV[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZREMRANGEBYSCORE', 'jaxrec:deletions', '-inf', now - ARGV[3])
redis.call('ZADD', 'jaxrec:deletions', string.format('%.6f', now), ARGV[2])
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
# ARGV: where to go on (0: at the beginning), of about how many users, and the model versions to keep.
# Returns where to go on (0: all were seen), and how many states were dropped.
DROP_STATES = """
local kept = {}
for at = 3, #ARGV do
    kept[ARGV[at]] = true
end
local found = redis.call('SSCAN', 'jaxrec:states', ARGV[1], 'COUNT', ARGV[2])
local dropped = 0
for _, user in ipairs(found[2]) do
    local states = 'jaxrec:states:' .. user
    for _, version in ipairs(redis.call('HKEYS', states)) do
        if not kept[version] then
            dropped = dropped + redis.call('HDEL', states, version)
        end
    end
    if redis.call('EXISTS', states) == 0 then
        redis.call('SREM', 'jaxrec:states', user)
    end
end
return {found[1], dropped}
"""
# ARGV: list, id and value of an impression, when its request began (seconds, by the server's clock) and
# the digest of its user ('': no user). Only once, and not if the user was deleted since.
LOG_IMPRESSION = """
local deleted = redis.call('ZSCORE', 'jaxrec:deletions', ARGV[5])
if deleted and tonumber(ARGV[4]) <= tonumber(deleted) then
    return
end
if redis.call('SADD', 'jaxrec:shown_ids', ARGV[2]) == 1 then
    redis.call('RPUSH', ARGV[1], ARGV[3])
end
"""
# ARGV: a list of impressions of version 1, which has no ids and may have some twice; how many to look at.
# They go from the head of the list to its tail, those that were seen before do not; what is left to do is kept in
# `update`, so that this can be broken off, and done by two at once. Returns whether there is more to do.
UPDATE_IMPRESSIONS = """
if redis.call('GET', 'jaxrec:version') ~= '1' then
    return 0
end
local list = ARGV[1]
local length = redis.call('LLEN', list)
local left = math.min(length, tonumber(redis.call('HGET', 'jaxrec:update', list) or length))
local part = left > 0 and redis.call('LRANGE', list, 0, math.min(left, ARGV[2]) - 1) or {}
for _, text in ipairs(part) do
    if redis.call('SADD', 'jaxrec:update_ids', cjson.decode(text)[1]) == 1 then
        redis.call('RPUSH', list, text)
    end
end
redis.call('LTRIM', list, #part, -1)
redis.call('HSET', 'jaxrec:update', list, left - #part)
return left > #part and 1 or 0
"""
# ARGV: the version. What an update that was broken off before had found out about ids is void.
END_UPDATE = """
if redis.call('GET', 'jaxrec:version') ~= '1' then
    return
end
redis.call('UNLINK', 'jaxrec:shown_ids', 'jaxrec:update')
if redis.call('EXISTS', 'jaxrec:update_ids') == 1 then
    redis.call('RENAME', 'jaxrec:update_ids', 'jaxrec:shown_ids')
end
redis.call('SET', 'jaxrec:version', ARGV[1])
"""
# ARGV: user, model version, revision, revision and state as bytes. Only for a user that was not deleted since.
SAVE_STATE = """
local first = redis.call('HGET', 'jaxrec:user:' .. ARGV[1], 'first')
if first and tonumber(first) <= tonumber(ARGV[3]) then
    redis.call('HSET', 'jaxrec:states:' .. ARGV[1], ARGV[2], ARGV[4])
    redis.call('SADD', 'jaxrec:states', ARGV[1])
end
"""
