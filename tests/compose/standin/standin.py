"""Plays the platform's API and worker: imports a module from the cache, fails without it, then stays."""

import importlib
import os
import signal

import redis

from tests.virtual_import import imports_from

with redis.Redis.from_url(os.environ["BIFROST_REDIS_URL"]) as client, imports_from(client):
    module = importlib.import_module("compose_probe")
    print(f"imported {module.__file__} from the cache: {module.GREETING}", flush=True)
    signal.pause()
