-- Usage of an API key: two buckets that refill within a minute, and leases of running sessions.
--
-- KEYS: bucket hash, sorted set of sessions by the time at which their lease ends
-- ARGV: requests per minute, tokens per minute, most sessions (0 each: no limit), tokens, lease in ms, 'take', 'join' or
--       'settle', session names
-- take: all or nothing; tokens are taken in advance. Returns {'' or the limit that refuses, requests left, tokens left,
--       ms until it would be granted, ms until requests are full again, ms until tokens are}
-- join: as take, for a request that was counted before: only the limit of sessions applies.
-- settle: returns tokens (a negative number takes more, into debt) and ends the sessions' leases.
local MINUTE = 60000
local per_request, per_token, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local tokens, lease, act = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local state = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local passed = math.max(0, now - (tonumber(state[3]) or now))

local function level(stored, limit)
  return math.min(limit, (tonumber(stored) or limit) + passed * limit / MINUTE)
end

local function full_in(left, limit)
  return limit > 0 and math.ceil((limit - left) * MINUTE / limit) or 0
end

local requests_left, tokens_left = level(state[1], per_request), level(state[2], per_token)

local function keep()
  local longest = math.max(full_in(requests_left, per_request), full_in(tokens_left, per_token))
  -- A bucket without a limit now may get one later, and is then full.
  redis.call('HSET', KEYS[1], 'requests', per_request > 0 and requests_left or '',
             'tokens', per_token > 0 and tokens_left or '', 'at', now)
  redis.call('PEXPIRE', KEYS[1], longest + 1000)
end

if act == 'settle' then
  tokens_left = math.min(per_token, tokens_left + tokens)
  keep()
  redis.call('ZREM', KEYS[2], unpack(ARGV, 7))
  return {'', 0, 0, 0, 0, 0}
end

redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local refused, wait = '', 0
local sessions = redis.call('ZCARD', KEYS[2])
for i = 7, #ARGV do
  if not redis.call('ZSCORE', KEYS[2], ARGV[i]) then sessions = sessions + 1 end
end
if most > 0 and sessions > most then
  refused = 'sessions'
elseif act == 'join' then
  tokens = 0
elseif per_token > 0 and tokens > per_token then
  refused = 'size'
else
  if per_request > 0 and requests_left < 1 then
    refused, wait = 'requests', math.ceil((1 - requests_left) * MINUTE / per_request)
  end
  local until_tokens = per_token > 0 and math.ceil((tokens - tokens_left) * MINUTE / per_token) or 0
  if until_tokens > wait then
    refused, wait = 'tokens', until_tokens
  end
end
if refused == '' then
  requests_left, tokens_left = requests_left - (act == 'take' and 1 or 0), tokens_left - tokens
  keep()
  for i = 7, #ARGV do
    redis.call('ZADD', KEYS[2], now + lease, ARGV[i])
  end
  redis.call('PEXPIRE', KEYS[2], lease)
end
return {refused, math.floor(requests_left), math.floor(tokens_left), wait,
        full_in(requests_left, per_request), full_in(tokens_left, per_token)}
