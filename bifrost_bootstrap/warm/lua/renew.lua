-- Renews the TTL of all staged entries. KEYS: stage prefix, plan. ARGV: seconds.
for start = 0, redis.call('LLEN', KEYS[2]) - 1, 3000 do
  local part = redis.call('LRANGE', KEYS[2], start, start + 2999)
  for i = 1, #part, 3 do
    if part[i] == 'set' then redis.call('EXPIRE', KEYS[1] .. part[i + 1], ARGV[1]) end
  end
end
