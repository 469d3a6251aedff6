"""What `serve.stores.redis.store` runs within Redis: each script is one step, of which no reader sees a half.

What depends on the length of a list is limited, or done in parts, so that no script takes longer than a client waits.
"""

from serve.model.trend import COUNTED_S

# A counter is a text: its reference, and its counts, each as exactly as a number is.
COUNTERS = """
local half_lives = {HALF_LIVES}

-- False: the text cannot be decoded.
local function numbers_of(text)
    local numbers = {}
    for word in string.gmatch(text, '%S+') do
        local number = tonumber(word)
        -- Counts are from 0 on; NaN is not less than infinity.
        if not number or not (math.abs(number) < math.huge) or (#numbers > 0 and number < 0) then
            return false
        end
        numbers[#numbers + 1] = number
    end
    -- One less: a server of before, which counted no last hour, has written it.
    return (#numbers == 1 + #half_lives or #numbers == #half_lives) and numbers
end

-- Empty: there is none yet. False: it cannot be decoded.
local function counter_of(item)
    local text = redis.call('HGET', 'jaxrec:trend', item)
    return not text and {} or numbers_of(text)
end

local function add(counter, time, counts)
    local seconds = time - (counter[1] or time)
    for at, half_life in ipairs(half_lives) do
        local before, new = counter[at + 1] or 0, counts[at]
        if seconds > 0 then
            counter[at + 1] = before * 0.5 ^ (seconds / half_life) + new
        else
            counter[at + 1] = before + new * 0.5 ^ (-seconds / half_life)
        end
    end
    counter[1] = math.max(time, counter[1] or time)
end

local function write(item, counter, revision)
    local numbers = {}
    for at, number in ipairs(counter) do
        numbers[at] = string.format('%.17g', number)
    end
    redis.call('HSET', 'jaxrec:trend', item, table.concat(numbers, ' '))
    redis.call('ZADD', 'jaxrec:trend_changed', string.format('%d', revision), item)
end
""".replace("HALF_LIVES", ", ".join(map(str, COUNTED_S)))
# ARGV: the time now, and for each event its id, user, value, item, time and the sign of its weight (1, 0 or -1).
# Returns for each event whether it is new (1) or not (0), and the items whose counters cannot be decoded. Scripts get
# keys in ARGV, not in KEYS: there is no cluster, see `serve.stores.redis.store`.
RECORD = (
    COUNTERS
    + """
local one_event = {}
for at = 1, #half_lives do
    one_event[at] = 1
end
local now = tonumber(ARGV[1])
-- Nothing is counted before a seed. Read first, since a script that fails keeps what it has written.
local counted_until = tonumber(redis.call('GET', 'jaxrec:trend_until') or 'inf')
local counters, damaged = {}, {}
for at = 5, #ARGV, 6 do
    local item = ARGV[at]
    if counters[item] == nil and ARGV[at + 2] == '1' and tonumber(ARGV[at + 1]) > counted_until then
        counters[item] = counter_of(item)
        if not counters[item] then
            damaged[#damaged + 1] = item
        end
    end
end
local new, changed, items = {}, {}, {}
for at = 2, #ARGV, 6 do
    local user, item, time = ARGV[at + 1], ARGV[at + 3], tonumber(ARGV[at + 4])
    local is_new = redis.call('SADD', 'jaxrec:event_ids', ARGV[at])
    if is_new == 1 then
        local revision = redis.call('INCR', 'jaxrec:revision')
        redis.call('HSETNX', 'jaxrec:user:' .. user, 'first', revision)
        redis.call('HSET', 'jaxrec:user:' .. user, 'last', revision)
        local list = ARGV[at + 5] == '0' and 'jaxrec:neutral:' or 'jaxrec:events:'
        redis.call('RPUSH', list .. user, string.format('%d', revision) .. ' ' .. ARGV[at + 2])
        if ARGV[at + 5] == '1' and time > counted_until and counters[item] then
            -- A clock that is ahead must not hide what comes before.
            add(counters[item], math.min(time, now), one_event)
            if not changed[item] then
                items[#items + 1] = item
            end
            changed[item] = revision
        end
    end
    new[#new + 1] = is_new
end
for _, item in ipairs(items) do
    write(item, counters[item], changed[item])
end
return {new, damaged}
"""
)
# ARGV: a revision, and how many counters to read now. Returns item, revision and text of each counter that changed
# after that revision, in the order of revisions.
READ_COUNTS = """
local found = redis.call(
    'ZRANGEBYSCORE', 'jaxrec:trend_changed', '(' .. ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local rows = {}
for at = 1, #found, 2 do
    rows[#rows + 1] = {found[at], found[at + 1], redis.call('HGET', 'jaxrec:trend', found[at]) or ''}
end
return rows
"""
STAGED = """
local function stage(list, length)
    if redis.call('LLEN', list) ~= tonumber(length) then
        return redis.error_reply('ERR the seed has expired before it was whole')
    end
    if redis.call('EXISTS', list) == 1 then
        redis.call('RENAME', list, 'jaxrec:trend_seed')
        redis.call('PERSIST', 'jaxrec:trend_seed')
    end
end
"""
# ARGV: a list of a model's counters (item, counter, ...), its length, and until when they have all events. The first
# call begins the seed: these counters are to be added, and later events are counted when they are recorded. The events
# that are stored by now are left to SEED_EVENTS. Other calls change nothing.
SEED = (
    STAGED
    + """
if redis.call('EXISTS', 'jaxrec:trend_until') == 1 then
    redis.call('UNLINK', ARGV[1])
    return
end
local failed = stage(ARGV[1], ARGV[2])
if failed then
    return failed
end
redis.call('SET', 'jaxrec:trend_until', ARGV[3])
redis.call('SET', 'jaxrec:trend_held', redis.call('GET', 'jaxrec:revision') or '0')
"""
)
# ARGV: a list of the counters of the events up to revision `trend_held`, and its length. The first call has them added
# to the counters; the list of SEED must be empty by then. Other calls change nothing.
SEED_EVENTS = (
    STAGED
    + """
if redis.call('EXISTS', 'jaxrec:trend_held') == 0 then
    redis.call('UNLINK', ARGV[1])
    return
end
local failed = stage(ARGV[1], ARGV[2])
if failed then
    return failed
end
redis.call('DEL', 'jaxrec:trend_held')
"""
)
# ARGV: how many counters of the seed to add now. Each gets a revision of its own, as if an event had changed it.
# Returns how many entries are left, and the items whose counters cannot be decoded.
ADD_SEED = (
    COUNTERS
    + """
local part, damaged = redis.call('LRANGE', 'jaxrec:trend_seed', 0, 2 * ARGV[1] - 1), {}
for at = 1, #part, 2 do
    local counter, seed = counter_of(part[at]), numbers_of(part[at + 1])
    if counter and seed then
        add(counter, table.remove(seed, 1), seed)
        write(part[at], counter, redis.call('INCR', 'jaxrec:revision'))
    else
        damaged[#damaged + 1] = part[at]
    end
    redis.call('LTRIM', 'jaxrec:trend_seed', 2, -1)
end
return {redis.call('LLEN', 'jaxrec:trend_seed'), damaged}
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
# ARGV: list, id and value of a slate, the number of the last deletion that was known when its request began, and
# the digest of its user ('': no user). Only once, and not if the user was deleted since.
LOG_SLATE = """
local deleted = redis.call('HGET', 'jaxrec:deletion_numbers', ARGV[5])
if deleted and tonumber(ARGV[4]) < tonumber(deleted) then
    return
end
if redis.call('SADD', 'jaxrec:shown_ids', ARGV[2]) == 1 then
    redis.call('RPUSH', ARGV[1], ARGV[3])
end
"""
# ARGV: a list of slates of version 1, which has no ids and may have some twice; how many to look at.
# They go from the head of the list to its tail, those that were seen before do not; what is left to do is kept in
# `update`, so that this can be broken off, and done by two at once. Returns whether there is more to do.
UPDATE_SLATES = """
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
