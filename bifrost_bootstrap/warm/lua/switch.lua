-- KEYS: entry prefix, index, marker, stage prefix, plan. ARGV: marker, milliseconds to live (0: none), entries planned,
-- marker that was read before the entries.
-- The plan is a list of triples: operation, path, and the fingerprint that the path's entry must have.
-- Returns {0, what is missing} if something staged is gone and nothing was written. Otherwise returns {1, paths left
-- alone, 1 if no other warm has switched since the entries were read}.
--
-- A marker with "settled" confirms the cache as it was read. If another warm has switched since, the script writes
-- nothing: only the marker of that other warm can confirm the cache.
--
-- A script has no rollback, so it checks everything before its first write. The first write is a SET: if Redis is out of
-- memory, cannot persist, or is a replica, it refuses this one, and nothing after it. A user may lack the right to a later
-- command, so each command is tried first, on a key that no path can have (PostgreSQL allows no NUL).
local prefix, index, marker, stage, plan = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ttl, planned = tonumber(ARGV[2]), tonumber(ARGV[3])
local kind = call('TYPE', index)['ok']
if kind ~= 'set' and kind ~= 'none' then return redis.error_reply('the index is a ' .. kind .. ', not a set') end
if call('LLEN', plan) ~= 3 * planned then return {0, {plan}} end
local function settled(marker) return marker:find('"settled": true', 1, true) ~= nil end
local now = call('GET', marker) or ''
local no_other_warm = now == ARGV[4]
if settled(ARGV[1]) and not no_other_warm then
  call('DEL', plan)
  return {1, {}, planned == 0 and settled(now) and 1 or 0}
end
local parts, alone = {}, {}
for start = 0, 3 * planned - 1, 3000 do
  local part = call('LRANGE', plan, start, start + 2999)
  local staged = {}
  for i = 1, #part, 3 do
    local path = part[i + 1]
    local key = prefix .. path
    if part[i] == 'set' then
      part[i] = stage .. path
      staged[#staged + 1] = part[i]
    end
    if fingerprint_of(key) ~= part[i + 2] then
      alone[#alone + 1] = path
      part[i] = false
    end
    part[i + 2] = key
  end
  -- One call for all of them: one call each would take a fifth of the time of a switch.
  if #staged > 0 and call('EXISTS', unpack(staged)) ~= #staged then
    for _, key in ipairs(staged) do
      if call('EXISTS', key) == 0 then return {0, {key}} end
    end
  end
  parts[#parts + 1] = part
end
if planned > 0 then
  local probe = prefix .. '\0'
  call('SET', probe, '', 'PX', '1000')
  call('PEXPIRE', probe, '1000')
  call('RENAME', probe, probe)
  call('DEL', probe)
  call('PERSIST', probe)
  call('SREM', probe, '')
  call('SADD', probe, '')
  call('SREM', probe, '')
end
-- A marker does not confirm a cache in which entries were left alone.
local written = #alone == 0 and ARGV[1] or ARGV[1]:gsub('"settled": true', '"settled": false')
-- When a reader of the platform rebuilds the index, it gives the index a TTL.
if call('PTTL', index) >= 0 then call('PERSIST', index) end
call('SET', marker, written)
for _, part in ipairs(parts) do
  local indexed = {}
  for i = 1, #part, 3 do
    local from, path, key = part[i], part[i + 1], part[i + 2]
    if from == 'remove' then
      -- The path `index` would map to the index key itself, so it never has an entry.
      if key ~= index then call('DEL', key) end
      call('SREM', index, path)
    elseif from then
      if from == 'keep' then from = key end
      if ttl > 0 then call('PEXPIRE', from, ttl) else call('PERSIST', from) end
      if from ~= key then call('RENAME', from, key) end
      indexed[#indexed + 1] = path
    end
  end
  if #indexed > 0 then call('SADD', index, unpack(indexed)) end
end
call('DEL', plan)
return {1, alone, no_other_warm and 1 or 0}
