"""Counters of a server in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unigen.serving.jobs import Event, Finished, JobEngine, Part

BUCKET_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of the requests that a server answers, and gauges of its model's process.

    Args:
        engine: whose state the gauges read.
    """

    def __init__(self, engine: JobEngine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("unigen_requests", "Requests answered", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "unigen_request_seconds",
            "From request to the end of the answer",
            ["route"],
            buckets=BUCKET_SECONDS,
            registry=registry,
        )
        self.first_part_seconds = Histogram(
            "unigen_first_part_seconds",
            "From request to the first text or picture",
            buckets=BUCKET_SECONDS,
            registry=registry,
        )
        self.open_requests = Gauge("unigen_requests_open", "Requests being answered", registry=registry)
        self.tokens = Counter("unigen_tokens", "Ids read and written", ["kind"], registry=registry)
        self.images = Counter("unigen_images", "Pictures made", registry=registry)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "unigen_jobs_running": ("Answers in the batch", lambda: engine.stats.num_running),
            "unigen_jobs_waiting": ("Answers that wait for slots", lambda: engine.stats.num_waiting),
            "unigen_batch_sequences": (
                "Sequences in the batch, one for each branch of guidance",
                lambda: engine.stats.num_sequences,
            ),
            "unigen_cache_positions": ("Positions of the cache in use", lambda: engine.stats.num_cached_tokens),
            "unigen_steps_total": ("Steps of the model since it was started", lambda: engine.stats.num_steps),
            "unigen_step_seconds_total": ("Seconds in these steps", lambda: engine.stats.step_seconds),
            "unigen_engine_starts": ("How often the model's process was started", lambda: engine.num_starts),
            "unigen_ready": ("Is the model there?", lambda: int(engine.ready.is_set())),
        }
        for name, (help, get_value) in gauges.items():
            Gauge(name, help, registry=registry).set_function(get_value)

    def count(self, event: Event) -> None:
        """Count the image that an event carries, or the tokens of an answer that has finished."""
        if isinstance(event, Finished):
            counts = {"prompt": event.prompt_tokens, "text": event.text_tokens, "image": event.image_tokens}
            for kind, count in counts.items():
                self.tokens.labels(kind).inc(count or 0)
        elif isinstance(event, Part) and not isinstance(event.content, str):
            self.images.inc()

    def render(self) -> bytes:
        """Return all counters as Prometheus reads them."""
        return generate_latest(self.registry)
