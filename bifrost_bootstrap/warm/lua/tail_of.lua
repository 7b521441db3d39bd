-- A key of another type has no tail that a row could have; any other error is raised, by the second call with its line.
-- Numbers as strings: otherwise Redis formats each number again.
local call, pcall = redis.call, redis.pcall
local function tail_of(key)
  local tail = pcall('GETRANGE', key, '-66', '-1')
  if type(tail) ~= 'table' then return tail end
  if tail['err']:find('WRONGTYPE', 1, true) then return '!' end
  return call('GETRANGE', key, '-66', '-1')
end
