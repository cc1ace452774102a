-- Commit: appends the tokens of each job of a batch to its session, if the job still fits.
--
-- KEYS: deadlines, the verifier's lease, then per job: session hash, tokens string, log-probabilities string
-- ARGV: verifier, session TTL in seconds, prefix of gateways' keys, lease, arithmetic ('' if unknown),
--       then per job: session id, round, base_len, accepted, finish, cached, tokens, log-probabilities
-- Tokens are packed little-endian int32. Returns nil if the verifier does not hold this lease (0 skips the check), else
-- per job: {outcome, committed length, base, accepted, finish, tokens from base, arithmetics of all commits (lines)}
--
-- A round is committed only if it builds on the committed length. A repeated round gets the tokens committed the first
-- time. Every other round is a conflict and gets the committed tokens from its base on. A job without tokens commits
-- nothing and only reads.
local WIDTH = 4
local FIRST = 6  -- of the jobs' arguments
local verifier, ttl, gateways, lease, arithmetic = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
if lease ~= '0' and redis.call('GET', KEYS[2]) ~= lease then
  return false
end
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local out = {}

-- Return lines with one more, unless it is empty or among them.
local function with_line(lines, line)
  if line == '' or string.find('\n' .. lines .. '\n', '\n' .. line .. '\n', 1, true) then
    return lines
  end
  return lines == '' and line or lines .. '\n' .. line
end

-- Return whether no live gateway has collected the session for longer than its patience.
local function abandoned(session)
  local state = redis.call('HMGET', session, 'gateway', 'patience_ms', 'alone_ms')
  local gateway, patience, alone = state[1], tonumber(state[2]), tonumber(state[3])
  if not gateway or not patience or patience == 0 then
    return false
  end
  if gateway ~= '' and redis.call('EXISTS', gateways .. gateway) == 1 then
    if alone then redis.call('HDEL', session, 'alone_ms') end
    return false
  end
  if not alone then redis.call('HSET', session, 'alone_ms', now_ms) end
  return alone and now_ms - alone >= patience
end

for job = 0, (#ARGV - FIRST + 1) / 8 - 1 do
  local session, tokens, logprobs = KEYS[3 + job * 3], KEYS[4 + job * 3], KEYS[5 + job * 3]
  local id, round, base, accepted, finish, cached, new, records = unpack(ARGV, FIRST + job * 8, FIRST + 7 + job * 8)
  base = tonumber(base)
  local state = redis.call('HMGET', session, 'status', 'length', 'round', 'base', 'accepted', 'finish',
                           'prompt_len', 'first_ms', 'tpot_ms', 'committed_in')
  local status, length, committed_in = state[1], tonumber(state[2]), state[10] or ''
  if status == 'active' and abandoned(session) then
    status = 'cancelled'
    redis.call('HSET', session, 'status', status)
    redis.call('ZREM', KEYS[1], id)
  end
  if not status or not length or redis.call('STRLEN', tokens) ~= length * WIDTH then
    out[job + 1] = {'gone', 0, base, 0, '', '', ''}
  elseif status == 'active' and base == length and #new > 0 then
    local first_ms = state[8]
    if not first_ms then
      first_ms = now_ms
      redis.call('HSET', session, 'first_ms', now_ms)
    end
    redis.call('APPEND', tokens, new)
    length = length + #new / WIDTH
    committed_in = with_line(committed_in, arithmetic)
    redis.call('HSET', session, 'length', length, 'round', round, 'base', base, 'accepted', accepted,
               'finish', finish, 'verifier', verifier, 'cached', cached, 'last_ms', now_ms,
               'committed_in', committed_in)
    if finish ~= '' then
      redis.call('HSET', session, 'status', 'finished')
      redis.call('ZREM', KEYS[1], id)
    elseif state[9] then
      -- As in shared.slo: tokens are due tpot_ms apart, counted from the first one.
      redis.call('ZADD', KEYS[1], first_ms + state[9] * (length - state[7]), id)
    end
    redis.call('EXPIRE', session, ttl)
    redis.call('EXPIRE', tokens, ttl)
    if #records > 0 then
      redis.call('APPEND', logprobs, records)
      redis.call('EXPIRE', logprobs, ttl)
    end
    out[job + 1] = {'committed', length, base, tonumber(accepted), finish, new, committed_in}
  elseif status == 'cancelled' then
    out[job + 1] = {'cancelled', length, base, 0, '', '', ''}
  else
    local outcome = 'conflict'
    local from = math.min(base, length)
    local kept = 0
    if state[3] == round and tonumber(state[4]) == base then
      outcome, kept = 'committed', tonumber(state[5])
    end
    out[job + 1] = {outcome, length, from, kept, state[6] or '', redis.call('GETRANGE', tokens, from * WIDTH, -1),
                    committed_in}
  end
end
return out
