"""A scoring server's metrics in Prometheus' format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Upper bounds of the histogram's buckets."""
CONTENT_TYPE = CONTENT_TYPE_LATEST


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("distill_requests", "Requests answered.", ["route", "status"], registry=self._registry)
        self._tokens = Counter(
            "distill_tokens", "Tokens of the sequences in batches.", ["kind"], registry=self._registry
        )
        self._batches = Histogram(
            "distill_batch_seconds", "Seconds from giving a batch to an engine to its answer.", ["kind"],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Declare a gauge that calls `value` when it is read."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, status).inc()

    def batch(self, kind: str, *, seconds: float, num_tokens: int) -> None:
        """Record a batch; `kind` is `score` or `sample`."""
        self._tokens.labels(kind).inc(num_tokens)
        self._batches.labels(kind).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
