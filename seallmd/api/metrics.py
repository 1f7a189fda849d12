"""Metrics for Prometheus: vLLM's names where they fit, so that its dashboards work, and our own.

Owns names, labels and buckets, and the timing of requests. Must not know HTTP, nor decide anything. Counters
and gauges of services and devices are read from the report when somebody asks; only what the report cannot
tell (latencies, lengths, ends of requests) is counted as it happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from seallmd import __version__
from seallmd.api.latency_window import LatencyWindow, Targets
from seallmd.api.settings import TierSettings
from seallmd.core.events import Finish
from seallmd.core.status import DeviceStatus, NodeStatus, ServiceStatus
from seallmd.runtime.face import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SERVICE_STATES = ("probing", "refused", "absent", "reading", "copying", "resident", "draining")
_MODEL = ("model_name",)

# Buckets are vLLM's (vllm/v1/metrics/loggers.py): dashboards compute quantiles over both.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_ENDS = {"stop": "stop", "length": "length", "cancelled": "abort"}  # vLLM's words; all else is "error"


class Metrics:
    """All metrics of one server."""

    def __init__(
        self,
        status: Callable[[], NodeStatus],
        clock: Callable[[], float] = time.monotonic,
        tiers: Sequence[TierSettings] = (),
    ) -> None:
        """status: the report of this moment. clock: seconds. tiers: the targets that are measured by."""
        # A gauge with the moment of creation for every series would double the page.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.clock = clock
        self._targets: dict[str, Targets] = {
            tier.name: Targets(tier.first_token_seconds, tier.next_token_seconds) for tier in tiers
        }
        self.window = LatencyWindow(clock, self._targets.get("default"))
        self._registry = CollectorRegistry()
        self._registry.register(_Report(status))
        self.ends = Counter(
            "vllm:request_success",
            "Requests that ended, by how: stop, length, abort (client left, or operator), error.",
            (*_MODEL, "finished_reason"),
            registry=self._registry,
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_SECONDS
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", _BETWEEN_TOKENS_SECONDS
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_SECONDS
        )
        self.each_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean of a request's tokens after its first.",
            _BETWEEN_TOKENS_SECONDS,
        )
        self.failures = Counter(
            "seallmd_request_failures",
            "Requests that failed or were refused by the node, by error code.",
            (*_MODEL, "code"),
            registry=self._registry,
        )
        self.slo = Counter(
            "seallmd_slo_requests",
            "Requests of tiers that have targets, by whether they were met; failed ones were not.",
            (*_MODEL, "tier", "met"),
            registry=self._registry,
        )
        self.batch_lines = Counter(
            "seallmd_batch_lines",
            "Lines of batches that ended, by how: completed, failed, expired, cancelled.",
            ("outcome",),
            registry=self._registry,
        )
        texts = {
            "requests": "Requests of a key.",
            "tokens": "Tokens of a key's prompts and outputs.",
            "limited": "Requests of a key that were over its limits.",
        }
        self.keys = {
            what: Counter(f"seallmd_key_{what}", text, ("key",), registry=self._registry)
            for what, text in texts.items()
        }
        self.prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self.output = self._histogram("request_generation_tokens", "Tokens of a request's output.", _TOKENS)

    def request(self, generation: Generation) -> RequestMeter:
        """Begin to time a request that arrives now."""
        return RequestMeter(self, generation)

    def has_targets(self, tier: str) -> bool:
        """Whether the configuration says what requests of this tier are to get."""
        return tier in self._targets

    def targets(self, tier: str) -> Targets:
        """What they are to get; where nothing is said, what the window measures by."""
        return self._targets.get(tier, self.window.targets)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, _MODEL, buckets=buckets, registry=self._registry)


class RequestMeter:
    """Times one request; a `StreamWatcher`. Tokens that come together are one iteration, as in vLLM."""

    def __init__(self, metrics: Metrics, generation: Generation) -> None:
        self._metrics = metrics
        self._generation = generation
        # Looked up once: this is done for every token.
        self._first_token = metrics.first_token.labels(generation.service)
        self._between_tokens = metrics.between_tokens.labels(generation.service)
        self._began = self._last = metrics.clock()
        self._first_seconds = float("inf")
        self._tokens = 0
        self._stopped = False
        self._timed = generation.tier != "batch"  # which nobody waits for: its times would hide the others'

    def stop_string(self) -> None:
        """The text has what it was to stop at: the cancellation that follows is an end like any other."""
        self._stopped = True

    def pushed(self, tokens: int) -> None:
        """So many tokens came."""
        now = self._metrics.clock()
        seconds, self._last = now - self._last, now
        if self._timed:
            self._time(seconds)
        self._tokens += tokens

    def _time(self, seconds: float) -> None:
        if self._tokens:
            self._between_tokens.observe(seconds)
            self._metrics.window.next_token(self._generation.service, seconds)
        else:
            self._first_seconds = seconds
            self._first_token.observe(seconds)
            self._metrics.window.first_token(self._generation.service, seconds)

    def ended(self, finish: Finish) -> None:
        """The request is over. Failed ones have no latency: an early refusal would look like speed."""
        metrics, service = self._metrics, self._generation.service
        reason = "stop" if self._stopped else _ENDS.get(finish.reason, "error")
        metrics.ends.labels(service, reason).inc()
        seconds = metrics.clock() - self._began
        if not self._tokens:
            self._first_seconds = seconds  # a vector comes as a whole
        if reason == "error":
            metrics.failures.labels(service, finish.code or "other").inc()
            if self._timed:
                metrics.window.failed(service)
        else:
            if self._timed:
                metrics.whole.labels(service).observe(seconds)
            metrics.prompt.labels(service).observe(len(self._generation.prompt))
            metrics.output.labels(service).observe(self._tokens)
        if reason != "abort" and self._timed:
            self._judge(failed=reason == "error")

    def _judge(self, *, failed: bool) -> None:
        """Whether the request got what its tier promises; one that failed did not."""
        metrics, service, tier = self._metrics, self._generation.service, self._generation.tier
        later = self._tokens - 1
        each = (self._last - self._began - self._first_seconds) / later if later > 0 else 0.0
        if later > 0:
            metrics.each_token.labels(service).observe(each)
        met = not failed and metrics.targets(tier).met(self._first_seconds, each)
        if not failed:
            metrics.window.ended(service, met=met)
        if metrics.has_targets(tier):
            metrics.slo.labels(service, tier, "true" if met else "false").inc()


class _Report(Collector):
    """The report as metrics, read anew for each page."""

    def __init__(self, status: Callable[[], NodeStatus]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask for a report."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family of the report."""
        status = self._status()
        yield _gauge("seallmd_info", "What runs.", ("version", "policy"), [((__version__, status.policy), 1)])
        yield _gauge("seallmd_draining", "1 when no new requests are taken.", (), [((), status.draining)])
        yield from _of_devices(status.devices)
        yield from _of_services(status)


def _of_devices(devices: tuple[DeviceStatus, ...]) -> Iterator[Metric]:
    def samples(read: Callable[[DeviceStatus], float]) -> list[tuple[tuple[str, ...], float]]:
        return [((str(device.device),), read(device)) for device in devices]

    kinds = ("weights", "kv", "cached", "free")
    arena = [
        ((str(device.device), kind), bytes_)
        for device in devices
        for kind, bytes_ in zip(kinds, _arena(device), strict=True)
    ]
    label = ("device",)
    yield _gauge("seallmd_device_up", "1 when its worker is up.", label, samples(lambda d: d.state == "up"))
    yield _gauge(
        "seallmd_arena_bytes",
        "Bytes of a device's arena by kind; they add up. cached: free, but with reusable prefixes.",
        ("device", "kind"),
        arena,
    )
    yield _gauge("seallmd_device_drained", "1 when it is to be empty.", label, samples(lambda d: d.drained))
    yield _gauge(
        "seallmd_host_kv_bytes", "Preempted KV in host memory.", label, samples(lambda d: d.host_kv_bytes)
    )
    yield _counter("seallmd_steps", "Forward passes.", label, samples(lambda d: d.steps))


def _arena(device: DeviceStatus) -> tuple[int, int, int, int]:
    free = device.free_bytes - device.cached_bytes
    return device.weights_bytes, device.kv_bytes, device.cached_bytes, free


def _of_services(status: NodeStatus) -> Iterator[Metric]:
    services = status.services

    def samples(read: Callable[[ServiceStatus], float]) -> list[tuple[tuple[str, ...], float]]:
        return [((service.name,), read(service)) for service in services]

    def gauge(name: str, text: str, read: Callable[[ServiceStatus], float]) -> Metric:
        return _gauge(name, text, _MODEL, samples(read))

    def counter(name: str, text: str, read: Callable[[ServiceStatus], float]) -> Metric:
        return _counter(name, text, _MODEL, samples(read))

    usage = {device.device: _kv_usage(device) for device in status.devices}
    states = [
        ((service.name, state), service.state == state) for service in services for state in SERVICE_STATES
    ]
    yield gauge("vllm:num_requests_running", "Requests that hold memory.", lambda s: s.running)
    yield gauge("vllm:num_requests_waiting", "Requests that wait.", lambda s: s.waiting)
    yield gauge(
        "vllm:kv_cache_usage_perc",
        "How full the KV memory is that the service can use, 0 to 1; it shares it with its neighbours.",
        lambda s: max((usage[device] for device in s.devices), default=0.0),
    )
    yield _gauge(
        "vllm:num_requests_waiting_by_reason",
        "Requests that wait, for memory or a turn (capacity) or for their model (deferred).",
        (*_MODEL, "reason"),
        [
            ((s.name, reason), s.waiting if (s.state == "resident") == (reason == "capacity") else 0)
            for s in services
            for reason in ("capacity", "deferred")
        ],
    )
    yield counter("vllm:prefix_cache_queries", "Tokens of prompts that arrived.", lambda s: s.prompt_tokens)
    yield counter("vllm:prefix_cache_hits", "Of these, not computed again.", lambda s: s.cached_tokens)
    yield counter("vllm:num_preemptions", "Requests that lost their memory.", lambda s: s.preemptions)
    yield counter("seallmd_kv_saves", "Preemptions whose KV went to host memory.", lambda s: s.saves)
    yield counter("seallmd_migrations", "Running requests that went elsewhere.", lambda s: s.migrations)
    yield counter("vllm:prompt_tokens", "Tokens of prompts.", lambda s: s.prompt_tokens)
    yield counter("vllm:generation_tokens", "Tokens generated.", lambda s: s.output_tokens)
    yield _gauge("seallmd_service_state", "1 for the state it is in.", (*_MODEL, "state"), states)
    yield counter("seallmd_swaps", "Times that it was brought in.", lambda s: s.swaps_in)
    yield counter("seallmd_swap_seconds", "What these took together.", lambda s: s.swap_seconds)
    yield gauge("seallmd_idle_seconds", "Since its last request.", lambda s: s.idle_seconds)
    yield gauge("seallmd_coming_seconds", "Estimated until it is resident.", lambda s: s.coming_seconds)
    yield gauge("seallmd_pinned", "1 when it never leaves for another.", lambda s: s.pinned)
    yield gauge("seallmd_service_drained", "1 when it takes no new requests.", lambda s: s.drained)
    yield gauge("seallmd_last_swap_seconds", "How long the last one took.", lambda s: s.last_swap_seconds)
    yield gauge("seallmd_kv_bytes", "Its KV on devices.", lambda s: s.kv_bytes)
    yield gauge("seallmd_replicas", "Replicas that are there, or on their way.", lambda s: len(s.groups))
    yield gauge("seallmd_cost_error_ratio", "How far predicted step times are off.", lambda s: s.cost_error)


def _kv_usage(device: DeviceStatus) -> float:
    """Cached prefixes do not count: they make room at once."""
    whole = device.kv_bytes + device.free_bytes
    return device.kv_bytes / whole if whole else 0.0


Samples = Sequence[tuple[tuple[str, ...], float]]


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family
