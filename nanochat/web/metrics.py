"""Prometheus metrics: what finished, how long it took, what waits."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from nanochat.web.worker import Job, Pool, stats

REGISTRY = CollectorRegistry()
FINISHED = Counter("nanochat_answers", "answers that ended, by reason", ["reason"], registry=REGISTRY)
PROMPT = Counter("nanochat_prompt_tokens", "tokens of prompts", registry=REGISTRY)
CACHED = Counter("nanochat_cached_prompt_tokens", "tokens of prompts that were in the cache", registry=REGISTRY)
MADE = Counter("nanochat_generated_tokens", "tokens of answers", registry=REGISTRY)
FIRST = Histogram("nanochat_time_to_first_token_seconds", "from a request to its first token", registry=REGISTRY,
                  buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30))  # fmt: skip
RUNNING = Gauge("nanochat_running", "answers being written", registry=REGISTRY)
WAITING = Gauge("nanochat_waiting", "answers that wait for a slot", registry=REGISTRY)


def ended(job: Job) -> None:
    """Notes a job that is over; called in the worker's thread."""
    FINISHED.labels(job.reason).inc()
    PROMPT.inc(len(job.request.prompt))
    CACHED.inc(job.request.cached)
    MADE.inc(len(job.request.output))
    if job.first_token is not None:
        FIRST.observe(job.first_token)


def response(pool: Pool) -> Response:
    numbers = stats(pool)
    RUNNING.set(numbers["running"])
    WAITING.set(numbers["waiting"])
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
