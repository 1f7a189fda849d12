"""What the report says of single requests and services."""

from __future__ import annotations

from seallmd.core.report import request_statuses, service_detail
from seallmd.core.status import RequestStatus
from tests.core.helpers import BLOCK, Recorder, shape, world


def requests_of(recorder: Recorder) -> dict[int, RequestStatus]:
    found = request_statuses(recorder.world.node.state, recorder.world.now)
    assert [status.request for status in found] == sorted(status.request for status in found)
    return {status.request: status for status in found}


def test_running_and_waiting() -> None:
    """Who runs says where; who waits has a place and a reason, and the reason follows what happens."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(40,), max_rows=1)
    for request in (1, 2, 3):
        recorder.arrive(request, "a", (request, 1), 30)
    before = requests_of(recorder)
    assert [(s.state, s.place) for s in before.values()] == [("waiting", 1), ("waiting", 2), ("waiting", 3)]
    assert all("its model is being" in status.reason for status in before.values()), before
    recorder.world.run(until=recorder.world.now + 0.5)
    running = [status for status in requests_of(recorder).values() if status.state == "running"]
    assert running
    assert all((s.device, s.place, s.reason) == (0, 0, "") for s in running)
    assert all(s.output_tokens > 0 and s.age_seconds > 0 and s.prompt_tokens == 2 for s in running)
    recorder.world.run()
    assert requests_of(recorder) == {}


def test_everyone_who_waits_knows_why() -> None:
    """At no moment of a crowded run does a waiting request lack its reason or its place."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(21,), min_residency_swaps=2.0)
    for request in range(1, 13):
        recorder.arrive(request, "ab"[request % 2], (request, 1, 2), 20)
    reasons = set()
    while recorder.prompts.keys() - recorder.finished.keys():
        recorder.world.run(until=recorder.world.now + 0.002)
        waiting = [status for status in requests_of(recorder).values() if status.state == "waiting"]
        assert all(status.reason and status.place and status.device is None for status in waiting)
        reasons |= {status.reason for status in waiting}
    assert len(reasons) > 2, reasons


def test_detail() -> None:
    """Places and learnt costs come with what the status tells already."""
    recorder = world({"a": shape()}, arenas=(40,))
    recorder.arrive(1, "a", (1, 2), 10)
    recorder.world.run()
    node = recorder.world.node
    (status,) = node.status(recorder.world.now).services
    detail = service_detail(node.state, status, recorder.world.now)
    assert detail.shape == shape()
    assert detail.kv_bytes_per_token == 64
    (place,) = detail.places
    assert (place.device, place.state, place.weights_bytes) == (0, "resident", 4 * BLOCK)
    assert detail.profile is not None
    assert detail.profile.costs.steps > 0
