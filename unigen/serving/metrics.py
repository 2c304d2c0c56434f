"""Counters of a server, as Prometheus reads them."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unigen.serving.jobs import Event, Finished, Part

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """engine: anything with `load` (of `jobs.Stats`), `starts` and `ready`."""

    def __init__(self, engine: Any) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("unigen_requests", "Requests answered", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "unigen_request_seconds",
            "From request to the end of the answer",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first = Histogram(
            "unigen_first_part_seconds", "From request to the first text or picture", buckets=SECONDS, registry=registry
        )
        self.open = Gauge("unigen_requests_open", "Requests being answered", registry=registry)
        self.tokens = Counter("unigen_tokens", "Ids read and written", ["kind"], registry=registry)
        self.images = Counter("unigen_images", "Pictures made", registry=registry)
        gauges = {
            "unigen_jobs_running": ("Answers in the batch", lambda: engine.load.running),
            "unigen_jobs_waiting": ("Answers that wait for slots", lambda: engine.load.waiting),
            "unigen_batch_sequences": (
                "Sequences in the batch, one for each branch of guidance",
                lambda: engine.load.rows,
            ),
            "unigen_cache_positions": ("Positions of the cache in use", lambda: engine.load.positions),
            "unigen_steps_total": ("Steps of the model since it was started", lambda: engine.load.steps),
            "unigen_step_seconds_total": ("Seconds in these steps", lambda: engine.load.seconds),
            "unigen_engine_starts": ("How often the model's process was started", lambda: engine.starts),
            "unigen_ready": ("Is the model there?", lambda: int(engine.ready.is_set())),
        }
        for name, (help, get_value) in gauges.items():
            Gauge(name, help, registry=registry).set_function(get_value)

    def count(self, event: Event) -> None:
        """A picture when it is made, and what an answer took when it has ended."""
        if isinstance(event, Finished):
            for kind in ("prompt", "text", "image"):
                self.tokens.labels(kind).inc(getattr(event, kind) or 0)
        elif isinstance(event, Part) and not isinstance(event.part, str):
            self.images.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
