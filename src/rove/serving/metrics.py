"""What a server counts, in the text form of Prometheus."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

_QUANTILES = (0.5, 0.9, 0.99)
_RECENT = 4096
"""Number of latest requests of which percentiles are taken."""


class Metrics:
    """Counts of one server: requests, their latency, batches, and what the queue holds now."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        """`gauges` are further numbers, read when they are asked for: name -> (help, function)."""
        self._registry, self._gauges = CollectorRegistry(), gauges
        self._latencies: deque[float] = deque(maxlen=_RECENT)
        self._total, self._count = 0.0, 0
        self._requests = Counter(
            "rove_requests",
            "Messages of clients, by what became of them",
            ["outcome"],
            registry=self._registry,
        )
        self._batches = Histogram(
            "rove_batch_size", "Observations in a forward pass", buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "rove_forward_seconds", "Seconds of a forward pass", registry=self._registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )  # fmt: skip
        self._registry.register(self)  # pyright: ignore[reportArgumentType]

    def answered(self, seconds: float) -> None:
        """Count a request that was answered, and the seconds from its arrival to its answer."""
        self._requests.labels("answered").inc()
        self._latencies.append(seconds)
        self._total, self._count = self._total + seconds, self._count + 1

    def refused(self) -> None:
        """Count a message that was answered with an error."""
        self._requests.labels("refused").inc()

    def batch(self, size: int, seconds: float) -> None:
        """Count a forward pass."""
        self._batches.observe(size)
        self._seconds.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The latency's percentiles over the latest requests, and the gauges; Prometheus' client calls it."""
        latency = Metric("rove_latency_seconds", "Seconds from a message's arrival to its answer", "summary")
        recent = np.array(self._latencies)
        for quantile in _QUANTILES if len(recent) else ():
            value = float(np.quantile(recent, quantile))
            latency.add_sample("rove_latency_seconds", {"quantile": str(quantile)}, value)
        latency.add_sample("rove_latency_seconds_sum", {}, self._total)
        latency.add_sample("rove_latency_seconds_count", {}, self._count)
        yield latency
        for name, (text, read) in self._gauges.items():
            yield GaugeMetricFamily(name, text, value=read())

    def text(self) -> str:
        """All of it, as /metrics answers."""
        return generate_latest(self._registry).decode()
