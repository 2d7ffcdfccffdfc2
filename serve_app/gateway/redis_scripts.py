"""The Lua scripts of the shared counters, which a Redis or Valkey server runs one after another.

KEYS are the sorted set of the ingresses by the end of their leases, and the counters. Reservations are in a hash for
each ingress; each is JSON: `k` the names of its counters, `b` their kind (1 for a bucket), `l` their limits, `a` the
amounts, and `u` how much of each was used when the lease was renewed. All numbers are whole numbers below 2^53, which
Lua's numbers hold exactly. The arithmetic is that of `counters.py`. The clock is that of the server.
"""

from __future__ import annotations

_COMMON = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local PARTS = 60000

local function parts_of(key, limit)
  local found = redis.call('HMGET', key, 'parts', 'at')
  local full = limit * PARTS
  if not found[1] then return full end
  return math.min(full, tonumber(found[1]) + math.max(0, now - tonumber(found[2])) * limit)
end

local function put_parts(key, limit, parts)
  redis.call('HSET', key, 'parts', string.format('%.0f', parts), 'at', string.format('%.0f', now))
  redis.call('PEXPIRE', key, math.ceil((limit * PARTS - parts) / limit) + 1000)  -- it is full again by then
end

-- Use an amount of a counter, or give a negative amount back.
local function take(key, bucket, limit, amount)
  if bucket == 1 then
    put_parts(key, limit, math.min(limit * PARTS, parts_of(key, limit) - amount * PARTS))
  elseif redis.call('EXISTS', key) == 1 then
    redis.call('INCRBY', key, string.format('%.0f', amount))
  end
end

local function renew(ingress, lease)
  redis.call('ZADD', KEYS[1], now + lease, ingress)
end
"""

# ARGV: the id, the ingress, its lease in ms, the beginning of the names of the hashes, the number n of counters, n
# amounts; then for each counter 1 for a bucket or 0, its limit, its first value, and the instant of its removal in s.
# Returns 1 if all amounts are reserved, else 0; then the values of the counters.
RESERVE = (
    _COMMON
    + """
local function give_back(held)
  local entries = redis.call('HVALS', held)
  for _, entry in ipairs(entries) do
    local one = cjson.decode(entry)
    for i, key in ipairs(one.k) do take(key, one.b[i], one.l[i], one.u[i] - one.a[i]) end
  end
  redis.call('DEL', held)
end

local dead = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
for _, ingress in ipairs(dead) do
  give_back(ARGV[4] .. ingress)
  redis.call('ZREM', KEYS[1], ingress)
end

local n = tonumber(ARGV[5])
local values, granted = {}, redis.call('EXISTS', ARGV[4] .. 'ended:' .. ARGV[1]) == 0
local one = {k = {}, b = {}, l = {}, a = {}, u = {}}
for i = 1, n do
  local key, at = KEYS[i + 1], 5 + n + 4 * (i - 1)
  local amount, bucket, limit = tonumber(ARGV[5 + i]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  one.k[i], one.b[i], one.l[i], one.a[i], one.u[i] = key, bucket, limit, amount, 0
  if bucket == 1 then
    values[i] = parts_of(key, limit)
    granted = granted and values[i] >= amount * PARTS
  else
    values[i] = tonumber(redis.call('GET', key) or ARGV[at + 3])
    granted = granted and values[i] + amount <= limit
  end
end
if granted then
  for i = 1, n do
    local key, at = one.k[i], 5 + n + 4 * (i - 1)
    if one.b[i] == 1 then
      values[i] = values[i] - one.a[i] * PARTS
      put_parts(key, one.l[i], values[i])
    else
      values[i] = values[i] + one.a[i]
      redis.call('SET', key, string.format('%.0f', values[i]), 'EXAT', ARGV[at + 4])
    end
  end
  redis.call('HSET', ARGV[4] .. ARGV[2], ARGV[1], cjson.encode(one))
  renew(ARGV[2], tonumber(ARGV[3]))
end
return {granted and 1 or 0, unpack(values)}
"""
)

# ARGV: as RESERVE, with n used amounts after the n amounts. An id that was ended is remembered for 10 minutes: a second
# call does nothing, and a RESERVE that arrives later reserves nothing.
SETTLE = (
    _COMMON
    + """
if not redis.call('SET', ARGV[4] .. 'ended:' .. ARGV[1], '', 'NX', 'PX', 600000) then return 0 end
local n, held = tonumber(ARGV[5]), ARGV[4] .. ARGV[2]
local is_held = redis.call('HDEL', held, ARGV[1]) == 1
for i = 1, n do
  local at = 5 + 2 * n + 4 * (i - 1)
  local amount, used = tonumber(ARGV[5 + i]), tonumber(ARGV[5 + n + i])
  if not is_held then amount = 0 end  -- the lease has expired, and all of it was given back
  if used ~= amount then take(KEYS[i + 1], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), used - amount) end
end
return 1
"""
)

# ARGV: the ingress, its lease in ms, the beginning of the names of the hashes, and JSON: pairs of an id and what its
# reservation has used.
RENEW = (
    _COMMON
    + """
renew(ARGV[1], tonumber(ARGV[2]))
local held = ARGV[3] .. ARGV[1]
for _, pair in ipairs(cjson.decode(ARGV[4])) do
  local found = redis.call('HGET', held, pair[1])
  if found then
    local one = cjson.decode(found)
    one.u = pair[2]
    redis.call('HSET', held, pair[1], cjson.encode(one))
  end
end
return 1
"""
)
