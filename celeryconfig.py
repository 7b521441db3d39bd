"""
Celery's settings, each with its reason.

Values come from the settings of `bifrost_bootstrap`. The app loads this file by its place beside the package,
so a `celeryconfig.py` in the working folder changes nothing.
"""

from __future__ import annotations

from bifrost_bootstrap.celery import lasting_queue
from bifrost_bootstrap.migrate.tree import QUEUE
from bifrost_bootstrap.servers.redis_server import celery_url
from bifrost_bootstrap.settings import load
from bifrost_bootstrap.urls import amqp_tls

_settings = load(needs=("redis", "rabbitmq"))
assert _settings.rabbitmq_url

broker_url, broker_use_ssl = amqp_tls(_settings.rabbitmq_url)
result_backend = celery_url(_settings.redis)

# Only JSON is accepted, from the broker and from the result backend.
task_serializer = result_serializer = "json"
accept_content = result_accept_content = ["json"]

# Calls by hand. Never change an argument of a queue under its name: the broker answers 406 to the other release.
task_default_queue = QUEUE
task_queues = [lasting_queue(QUEUE)]
# A queue that Celery made up itself would lack the arguments with which the workers declare it.
task_create_missing_queues = False

# A message accepted by the broker is on its disk; without confirms 113 of 388 were lost with a killed broker.
# The timeouts (seconds) are for a broker that is frozen, and for a line that was cut.
broker_transport_options = {"confirm_publish": True, "confirm_timeout": 5.0, "read_timeout": 5.0, "write_timeout": 5.0}
broker_connection_timeout = 4.0
# A worker whose connection was cut silently notices after three and a half heartbeats (measured). With Celery's own
# 120 s that is minutes. RabbitMQ advises 5 to 20.
broker_heartbeat = 6
# The queue of the answers to `celery inspect`: a thread of Flower asks over one connection and over the next, which an
# exclusive one would lock. Durable, as RabbitMQ 4 wants it then. (The worker's own: `failover.py`.)
control_queue_exclusive, control_queue_durable = False, True
broker_connection_retry_on_startup = True
# What the broker says of a queue may pass too: 404 while its node is down.
broker_channel_error_retry = True
# A worker outlives any outage of the broker; the supervisor would only start it again.
broker_connection_max_retries = None
# The hand-over from migrate to warm survives an outage of about a minute.
task_publish_retry_policy = {"max_retries": 20, "interval_start": 0, "interval_step": 0.5, "interval_max": 5}

# Keys of results, beside the cache and apart from it.
result_backend_transport_options = {
    "global_keyprefix": "bifrost:bootstrap:",
    # Without this, publishing blocks for 19 s when Redis is away.
    "retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2},
}
# A connection that went silent must not block a task or a poll for the default two minutes.
redis_socket_timeout = redis_socket_connect_timeout = 5.0
redis_retry_on_timeout = True
# A Unix socket has none.
redis_socket_keepalive = not result_backend.startswith("redis+socket:")
# A result is stored once Redis is back, however long that takes; otherwise it is lost with the outage.
result_backend_always_retry = True
# Seconds that `celery result` and Flower can show a result.
result_expires = 24 * 3600

# Acknowledged on receipt (`worker/program.py`): late acknowledgement runs migrations twice after a broker restart,
# repeats poison for ever, and dies of the broker's consumer timeout. What a lost worker held, init enqueues again.
task_acks_late = False
# One at a time: the lock would make a second migration wait, and two warms do the same work twice.
worker_concurrency = 1
worker_prefetch_multiplier = 1
# Never kill and redo a running migration because the broker was away.
worker_cancel_long_running_tasks_on_connection_loss = False
worker_consumer = "bifrost_bootstrap.worker.program:Consumer"
imports = ("bifrost_bootstrap.worker.tasks", "bifrost_bootstrap.worker.program")

# Flower shows nothing without events.
task_track_started = True
task_send_sent_event = True
worker_send_task_events = True
result_extended = True
# Our own log set-up stays; Celery's would replace it.
worker_hijack_root_logger = False
worker_redirect_stdouts = False
