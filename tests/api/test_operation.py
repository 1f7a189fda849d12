"""What monitoring sees: metrics, readiness, version."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import openai
import pytest
from msgspec.structs import replace
from openai import AsyncOpenAI
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from seallmd import __version__
from seallmd.api.metrics import SERVICE_STATES, Metrics
from seallmd.api.settings import TierSettings
from seallmd.core.events import Finish
from seallmd.core.messages import Sampling
from seallmd.core.status import NodeStatus
from seallmd.runtime.face import Generation, TokenStream
from tests.api.engine_double import FakeEngine, view

WAITS = ("capacity", "deferred")
GENERATION = Generation("m", (1, 2, 3), 10, Sampling())


def parse(page: bytes) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page.decode())}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    """The one sample of this name whose labels are these and perhaps more."""
    found = [
        entry.value
        for family in families.values()
        for entry in family.samples
        if entry.name == sample and labels.items() <= entry.labels.items()
    ]
    assert len(found) == 1, (sample, labels, found)
    return found[0]


async def scrape(url: str) -> dict[str, Metric]:
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        return parse(await response.read())


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_report_as_metrics(url: str, engine: FakeEngine) -> None:
    """vLLM's names for what vLLM knows, ours for devices and swaps; arena bytes add up to the arena."""
    engine.states["m"] = {"running": 5, "waiting": 6, "cost_error": 0.25}
    page = await scrape(url)
    for sample, expected in (
        ("vllm:num_requests_running", 5),
        ("vllm:num_requests_waiting", 6),
        ("vllm:kv_cache_usage_perc", 0.25),
        ("vllm:num_preemptions_total", 3),
        ("vllm:prompt_tokens_total", 11),
        ("vllm:generation_tokens_total", 22),
        ("seallmd_swaps_total", 4),
        ("seallmd_last_swap_seconds", 0.5),
        ("seallmd_cost_error_ratio", 0.25),
    ):
        assert value(page, sample, model_name="m") == expected
    kinds = {e.labels["kind"]: e.value for e in page["seallmd_arena_bytes"].samples}
    assert kinds == {"weights": 0, "kv": 1 << 18, "cached": 1 << 16, "free": (3 << 18) - (1 << 16)}
    assert sum(kinds.values()) == 1 << 20
    assert value(page, "seallmd_device_up", device="0") == 1
    assert value(page, "seallmd_steps_total", device="0") == 7
    assert value(page, "seallmd_info", policy="round-robin", version=__version__) == 1
    states = {s: value(page, "seallmd_service_state", model_name="gone", state=s) for s in SERVICE_STATES}
    assert states == {**dict.fromkeys(SERVICE_STATES, 0), "refused": 1}


async def test_requests_are_counted(client: AsyncOpenAI, engine: FakeEngine, url: str) -> None:
    """Each end under its own name; a stop string is an end, not an abort, though the engine is cancelled."""
    await client.completions.create(model="m", prompt=[3, 4], max_tokens=100)
    await client.completions.create(model="m", prompt=[3, 4], max_tokens=5)
    stream = await client.completions.create(
        model="m", prompt=[3, 4], max_tokens=100, stop="wörld", stream=True
    )
    assert [part async for part in stream]
    engine.failing = Finish(0, "failed", "no", "overloaded", 503)
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model="m", prompt="x")
    page = await scrape(url)
    ends = {e.labels["finished_reason"]: e.value for e in page["vllm:request_success"].samples}
    assert ends == {"stop": 2, "length": 1, "error": 1}
    assert value(page, "vllm:request_prompt_tokens_sum", model_name="m") == 6
    assert value(page, "vllm:e2e_request_latency_seconds_count", model_name="m") == 3
    assert value(page, "vllm:time_to_first_token_seconds_count", model_name="m") == 3


def test_times_of_a_request() -> None:
    """First token from arrival, then gap by gap, whatever the reader does; tokens that come late count."""
    now = 0.0
    metrics = Metrics(lambda: FakeEngine([], []).status(), lambda: now)
    stream = TokenStream(1)
    stream.watch(metrics.request(GENERATION))
    for at, tokens in ((2.0, (5,)), (2.5, (6, 7)), (3.5, (8,))):
        now = at
        stream.push(tokens)
    now = 4.0
    stream.end(Finish(1, "cancelled"))
    page = parse(metrics.page())
    for name, total, count in (
        ("time_to_first_token_seconds", 2.0, 1),
        ("inter_token_latency_seconds", 1.5, 2),
        ("e2e_request_latency_seconds", 4.0, 1),
        ("request_generation_tokens", 4, 1),
        ("request_prompt_tokens", 3, 1),
    ):
        assert value(page, f"vllm:{name}_sum") == total
        assert value(page, f"vllm:{name}_count") == count
    assert value(page, "vllm:request_success_total", finished_reason="abort") == 1


def test_refused_before_it_was_watched() -> None:
    """The node may refuse a request while it is submitted: it is counted all the same, without a latency."""
    metrics = Metrics(lambda: FakeEngine([], []).status())
    stream = TokenStream(1)
    stream.end(Finish(1, "failed", "too many wait"))
    stream.watch(metrics.request(GENERATION))
    page = parse(metrics.page())
    assert value(page, "vllm:request_success_total", finished_reason="error") == 1
    assert not page["vllm:e2e_request_latency_seconds"].samples


async def test_ready(url: str, engine: FakeEngine, model: Path) -> None:
    """Not before every preloaded service has come in; then always, though one makes room; not in a drain."""
    engine.views = {name: view(name, model, preload=name != "c") for name in "abc"}
    never = {"state": "reading", "swaps_in": 0}
    engine.states = {"b": never, "c": never}
    status, text = await get(url + "/ready")
    assert (status, "b is reading" in text, "c is" in text) == (503, True, False)
    engine.states = {"c": never}
    assert (await get(url + "/ready"))[0] == 200
    engine.states = {"b": {"state": "absent"}}
    assert (await get(url + "/ready"))[0] == 200
    engine.draining = True
    assert (await get(url + "/ready"))[0] == 503


async def test_version(url: str) -> None:
    """Clients and dashboards ask."""
    assert await get(url + "/version") == (200, f'{{"version":"{__version__}"}}')


def test_targets_of_tiers_are_measured() -> None:
    """Met, missed, failed; a client that leaves says nothing about us, a tier without targets neither."""
    now = [0.0]
    targets = [TierSettings(name="priority", first_token_seconds=1.0, next_token_seconds=0.5)]
    metrics = Metrics(lambda: NodeStatus("budget", False, 1, (), ()), lambda: now[0], targets)

    def request(first: float, each: float, reason: str, tier: str = "priority") -> None:
        meter = metrics.request(replace(GENERATION, tier=tier))
        for pause in (first, each, each):
            now[0] += pause
            meter.pushed(1)
        meter.ended(Finish(1, reason, code="worker_lost" if reason == "failed" else ""))

    request(0.9, 0.4, "stop")
    request(1.1, 0.4, "stop")
    request(0.9, 0.6, "length")
    request(0.1, 0.1, "failed")
    request(9.0, 9.0, "cancelled")
    request(9.0, 9.0, "stop", tier="flex")
    page = parse(metrics.page())
    assert value(page, "seallmd_slo_requests_total", tier="priority", met="true") == 1
    assert value(page, "seallmd_slo_requests_total", tier="priority", met="false") == 3
    assert value(page, "seallmd_request_failures_total", code="worker_lost") == 1
    assert value(page, "vllm:request_time_per_output_token_seconds_count") == 5
    # The window measures requests of other tiers by its own targets.
    figures = metrics.window.by_service()["m"]
    assert (figures.met, figures.ended, figures.failed) == (1, 4, 1)


async def test_why_requests_wait(url: str, engine: FakeEngine) -> None:
    """vLLM's two reasons; prefix cache and swaps as counters."""
    engine.states["m"] = {"waiting": 6, "state": "copying", "cached_tokens": 7, "swap_seconds": 2.5}
    page = await scrape(url)
    reasons = {r: value(page, "vllm:num_requests_waiting_by_reason", model_name="m", reason=r) for r in WAITS}
    assert reasons == {"capacity": 0, "deferred": 6}
    assert value(page, "vllm:prefix_cache_queries_total", model_name="m") == 11
    assert value(page, "vllm:prefix_cache_hits_total", model_name="m") == 7
    assert value(page, "seallmd_swap_seconds_total", model_name="m") == 2.5
