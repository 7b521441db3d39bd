"""Stand-in for the platform's API and worker: it imports a module from the cache or fails, then it stays."""

import importlib
import os
import signal

import redis

from tests.virtual_import import imports_from

with redis.Redis.from_url(os.environ["BIFROST_REDIS_URL"]) as client, imports_from(client):
    module = importlib.import_module("compose_probe")
    print(f"imported {module.__file__} from the cache: {module.GREETING}", flush=True)
    signal.pause()
