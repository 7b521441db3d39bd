-- KEYS and ARGV: as in states.lua. Returns the SHA-1 of the tails, each on a line, which is cheaper to compare than they are; or
-- '' where an entry is off the policy.
local prefix, paths = KEYS[1], ARGV
local least, most = tonumber(paths[1]), tonumber(paths[2])
local tails = {}
for i = 3, #paths do
  local key = prefix .. paths[i]
  local left = call('PTTL', key)
  if left < least or left > most then return '' end
  tails[i - 2] = tail_of(key)
end
return redis.sha1hex(table.concat(tails, '\n'))
