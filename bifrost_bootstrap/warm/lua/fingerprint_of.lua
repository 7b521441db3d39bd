-- The fingerprint of an entry. A key of another type gets one that no row has. The second call raises any other error
-- with the number of this line, by which the refused command is named.
-- Numbers as strings: otherwise Redis formats each number again.
local call, pcall = redis.call, redis.pcall
local function fingerprint_of(key)
  local fingerprint = pcall('GETRANGE', key, '-66', '-1')
  if type(fingerprint) ~= 'table' then return fingerprint end
  if fingerprint['err']:find('WRONGTYPE', 1, true) then return '!' end
  return call('GETRANGE', key, '-66', '-1')
end
