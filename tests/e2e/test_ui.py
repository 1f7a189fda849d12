"""The page's feed from the real daemon: maps and figures are those of the engine, not of a stand-in."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx

from tests.e2e.daemon import SMOL, Daemon


def first_frame(daemon: Daemon) -> dict[str, Any]:
    with httpx.stream("GET", f"{daemon.url}/ui/feed", timeout=30) as response:
        line = next(response.iter_lines())
    return dict(json.loads(line.removeprefix("data: ")))


def test_feed(daemon: Daemon) -> None:
    """After a request, its model lies on the map, and its latencies are in the window."""
    body = {"model": SMOL, "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
    assert httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=120).status_code == 200
    frame = first_frame(daemon)
    (card,) = [card for card in frame["services"] if card["status"]["name"] == SMOL]
    assert card["figures"]["ended"] >= 1
    assert card["figures"]["first_token"][0] > 0
    assert frame["samples"]
    shown = [device for device in frame["devices"] if [h for h in device["holdings"] if h["service"] == SMOL]]
    assert shown
    for device in shown:
        status, unit = device["status"], frame["block_bytes"]
        assert sum(cells for _, _, cells in device["cells"]) == device["cell_count"]
        assert ("weights", SMOL) in {(kind, service) for kind, service, _ in device["cells"]}
        assert sum(held["weights"] for held in device["holdings"]) * unit == status["weights_bytes"]
        assert sum(held["kv"] + held["promised"] for held in device["holdings"]) * unit == status["kv_bytes"]
