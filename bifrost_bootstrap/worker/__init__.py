"""The bootstrap worker: Celery tasks, the parts that make Celery's worker ours, the watch over the module cache."""
