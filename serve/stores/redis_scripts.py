"""What `serve.stores.redis` runs within Redis: each script is one step that nobody sees half of.

None takes longer than the client waits: what depends on the length of a list is done in parts.
"""

# ARGV: for each event its id, user and value. Returns 1 for each that is new. Arguments, not KEYS: see above.
RECORD = """
local new = {}
for at = 1, #ARGV, 3 do
    local user = ARGV[at + 1]
    local is_new = redis.call('SADD', 'jaxrec:event_ids', ARGV[at])
    if is_new == 1 then
        local revision = redis.call('INCR', 'jaxrec:revision')
        redis.call('HSETNX', 'jaxrec:user:' .. user, 'first', revision)
        redis.call('HSET', 'jaxrec:user:' .. user, 'last', revision)
        redis.call('RPUSH', 'jaxrec:events:' .. user, string.format('%d', revision) .. ' ' .. ARGV[at + 2])
    end
    new[#new + 1] = is_new
end
return new
"""
# ARGV: user, its digest, for how many seconds that is kept. Returns how many events and shown recommendations it had.
DELETE_USER = """
local user = ARGV[1]
local events = redis.call('LRANGE', 'jaxrec:events:' .. user, 0, -1)
for _, text in ipairs(events) do
    local event = cjson.decode(string.sub(text, string.find(text, ' ') + 1))
    redis.call('SREM', 'jaxrec:event_ids', event[1])
end
local shown = redis.call('LRANGE', 'jaxrec:shown:' .. user, 0, -1)
for _, text in ipairs(shown) do
    redis.call('SREM', 'jaxrec:shown_ids', cjson.decode(text)[1])
end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZREMRANGEBYSCORE', 'jaxrec:deletions', '-inf', now - ARGV[3])
redis.call('ZADD', 'jaxrec:deletions', string.format('%.6f', now), ARGV[2])
redis.call('SREM', 'jaxrec:states', user)
redis.call('DEL', 'jaxrec:events:' .. user, 'jaxrec:shown:' .. user, 'jaxrec:states:' .. user, 'jaxrec:user:' .. user)
return {#events, #shown}
"""
# ARGV: list, id and value of a shown recommendation, when its request was taken in (seconds, by the server's clock) and
# the digest of its user ('' for nobody). Only once, and not if the user was deleted since.
LOG_SHOWN = """
local deleted = redis.call('ZSCORE', 'jaxrec:deletions', ARGV[5])
if deleted and tonumber(ARGV[4]) <= tonumber(deleted) then
    return
end
if redis.call('SADD', 'jaxrec:shown_ids', ARGV[2]) == 1 then
    redis.call('RPUSH', ARGV[1], ARGV[3])
end
"""
# ARGV: a list of shown recommendations of version 1, which has no ids and may have some twice; how many to look at.
# They go from the head of the list to its tail, those that were seen before do not; what is left to do is kept in
# `update`, so that this can be broken off, and done by two at once. Returns whether there is more to do.
UPDATE_SHOWN = """
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
