"""Metrics, as Prometheus reads them. Counts and times are noted as they come; what is held is looked up when asked."""

import time
from collections import Counter as Count

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from minillm.server.snapshots import EVENTS

PREFIX = "minillm:"
TIMES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were read",
    "prompt_tokens_cache": "Tokens of prompts that were taken from snapshots",
    "tokens_predicted": "Tokens that were generated",
    "prompt_seconds": "Seconds that prompts were read for",
    "tokens_predicted_seconds": "Seconds that tokens were generated for",
    "cancelled": "Requests whose client has gone",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token",
    "inter_token_latency_seconds": "From one token of an answer to the next",
    "queue_seconds": "From a request's arrival to the beginning of its reading",
    "e2e_request_latency_seconds": "From a request's arrival to the end of its answer",
}


class Metrics:
    """Of one Server."""

    def __init__(self, server):
        self.server, self.registry = server, CollectorRegistry()
        make = {"registry": self.registry}
        self.counters = {name: Counter(PREFIX + name, text, **make) for name, text in COUNTERS.items()}
        self.times = {name: Histogram(PREFIX + name, text, buckets=TIMES, **make) for name, text in HISTOGRAMS.items()}
        self.requests = Counter(PREFIX + "requests", "Requests that were answered", ["route", "status"], **make)
        self.registry.register(self)

    def text(self):
        """-> (bytes, media type)"""
        with self.server.llm.engine.alone():
            return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def collect(self):
        """What prometheus_client asks of a collector: the metrics that are looked up."""
        for name, (text, value) in self._now().items():
            if not isinstance(value, dict):
                yield GaugeMetricFamily(PREFIX + name, text, value)
                continue
            family = GaugeMetricFamily(PREFIX + name, text, labels=["state"])
            for state, amount in value.items():
                family.add_metric([state], amount)
            yield family
        events = CounterMetricFamily(PREFIX + "snapshots", "What became of snapshots of prefixes", labels=["event"])
        for event in EVENTS:
            events.add_metric([event], self.server.snapshots.events[event])
        yield events

    def _now(self):
        """name -> (text, value, or state -> value)"""
        llm, places, disk = self.server.llm, self.server.places, self.server.snapshots.disk
        states = Count(request.state for request in llm.engine.scheduler.requests)
        caches = [cache for pool in llm.pools.values() for cache in list(pool.caches) if cache.seen]
        in_use, idle = sum(pool.bytes_in_use for pool in llm.pools.values()), self.server.snapshots.bytes_in_use
        promised = sum(n * pool.page_bytes for pool in llm.pools.values() for n in list(pool.promises.values()))
        return {
            "requests_processing": ("Requests that have a place", places.taken),
            "requests_deferred": ("Requests that wait for a place", len(places.waiting)),
            "batch_size": ("Sequences that generate now", states["generating"]),
            "kv_bytes": ("Bytes of the pages in use", {"running": in_use - idle, "idle": idle}),
            "kv_bytes_full": ("Bytes that full caches of the same tokens would take", _sum(caches, "full_bytes")),
            "kv_bytes_promised": ("Bytes that requests may come to hold", promised),
            "kv_bytes_limit": ("Bytes that caches may take", llm.cache_limit or float("inf")),
            "disk_bytes": ("Bytes of snapshots in files", disk.bytes_in_use if disk else 0),
            "kv_entries": ("Entries of all sequences", _sum(caches, "entries")),
            "kv_tokens_seen": ("Tokens that all sequences have read", _sum(caches, "seen")),
        }


def _sum(caches, name):
    return sum(getattr(cache, name) for cache in caches)


class Watch:
    """The times of one request, which go to a server's Metrics."""

    def __init__(self, metrics):
        self.metrics, self.arrived, self.last = metrics, time.perf_counter(), {}

    def token(self, index):
        """A token of choice `index` has come."""
        now, times = time.perf_counter(), self.metrics.times
        if index in self.last:
            times["inter_token_latency_seconds"].observe(now - self.last[index])
        elif not self.last:
            times["time_to_first_token_seconds"].observe(now - self.arrived)
        self.last[index] = now

    def end(self, readings, answers, gone):
        """It is over. readings: Requests that read the prompts, answers: Timings of the answers that began. gone:
        whether the client had gone before."""
        counters, times = self.metrics.counters, self.metrics.times
        for request in readings:
            if request.admitted is not None:
                times["queue_seconds"].observe(request.admitted - self.arrived)
            if request.timings.prompt_seconds:  # it was read to its end
                counters["prompt_tokens"].inc(request.timings.prompt_tokens)
                counters["prompt_tokens_cache"].inc(request.timings.cached_tokens)
                counters["prompt_seconds"].inc(request.timings.prompt_seconds)
        for timings in answers:
            counters["tokens_predicted"].inc(timings.generated_tokens)
            counters["tokens_predicted_seconds"].inc(timings.generation_seconds)
        times["e2e_request_latency_seconds"].observe(time.perf_counter() - self.arrived)
        if gone:
            counters["cancelled"].inc()


class Counted:
    """ASGI middleware: counts requests by route and status."""

    def __init__(self, app, metrics, routes):
        self.app, self.requests, self.routes = app, metrics.requests, set(routes)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"].removeprefix("/v1")
        route = route if route in self.routes else "other"  # so many there are, whatever people ask

        async def counted(message):
            if message["type"] == "http.response.start":
                self.requests.labels(route, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)
