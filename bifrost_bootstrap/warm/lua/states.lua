-- KEYS: entry prefix. ARGV: least and most milliseconds to live that the policy allows, then paths.
-- Returns the tails, and the numbers of the paths whose entry is off the policy.
local prefix, paths = KEYS[1], ARGV
local least, most = tonumber(paths[1]), tonumber(paths[2])
local tails, off = {}, {}
for i = 3, #paths do
  local key = prefix .. paths[i]
  local left = call('PTTL', key)
  tails[i - 2] = tail_of(key)
  if left ~= -2 and (left < least or left > most) then off[#off + 1] = i - 3 end
end
return {tails, off}
