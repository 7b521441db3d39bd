-- KEYS and ARGV: as in states.lua. Returns the SHA-1 of the fingerprints, each on a line: it is cheaper to send and to
-- compare. Returns '' if an entry has another TTL than the policy allows.
local prefix, paths = KEYS[1], ARGV
local least, most = tonumber(paths[1]), tonumber(paths[2])
local fingerprints = {}
for i = 3, #paths do
  local key = prefix .. paths[i]
  local left = call('PTTL', key)
  if left < least or left > most then return '' end
  fingerprints[i - 2] = fingerprint_of(key)
end
return redis.sha1hex(table.concat(fingerprints, '\n'))
