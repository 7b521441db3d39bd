-- KEYS: entry prefix. ARGV: least and most milliseconds to live that the policy allows, then paths.
-- Returns the fingerprints, and the numbers of the paths whose entry has another TTL.
local prefix, paths = KEYS[1], ARGV
local least, most = tonumber(paths[1]), tonumber(paths[2])
local fingerprints, off = {}, {}
for i = 3, #paths do
  local key = prefix .. paths[i]
  local left = call('PTTL', key)
  fingerprints[i - 2] = fingerprint_of(key)
  if left ~= -2 and (left < least or left > most) then off[#off + 1] = i - 3 end
end
return {fingerprints, off}
