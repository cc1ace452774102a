-- Cancel: a session accepts no more tokens. A finished one stays finished.
--
-- KEYS: session hash, deadlines
-- ARGV: session id, gateway ('' for any), seconds that the mark of a nonexistent session stays
-- Returns 0, and changes nothing, if another gateway collects the session; else 1.
--
-- A session that does not exist is marked as cancelled too: its creation may still be on the way.
local status, collector = unpack(redis.call('HMGET', KEYS[1], 'status', 'gateway'))
if ARGV[2] ~= '' and collector and collector ~= ARGV[2] then
  return 0
end
if not status then
  redis.call('HSET', KEYS[1], 'status', 'cancelled')
  redis.call('EXPIRE', KEYS[1], ARGV[3])
elseif status == 'active' then
  redis.call('HSET', KEYS[1], 'status', 'cancelled')
end
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
