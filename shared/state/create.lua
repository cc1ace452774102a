-- Create: writes a new session, unless it was created or cancelled before.
--
-- KEYS: session hash, tokens string, deadlines
-- ARGV: session id, TTL in seconds, packed prompt, milliseconds since the request arrived, time to the first token in ms
--       ('' without an SLO), then names and values of the session's fields
-- Returns whether the session is active: 0 if it was cancelled before.
--
-- A creation can be delayed, or executed twice when its answer was lost. It must not revive a session whose gateway has
-- given it up meanwhile, nor reset one.
local status = redis.call('HGET', KEYS[1], 'status')
if status then
  return status == 'active' and 1 or 0
end
local now = redis.call('TIME')
local start_ms = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[4]
redis.call('HSET', KEYS[1], 'status', 'active', 'start_ms', string.format('%.0f', start_ms), unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[2])
redis.call('ZADD', KEYS[3], ARGV[5] == '' and 'inf' or start_ms + ARGV[5], ARGV[1])
return 1
