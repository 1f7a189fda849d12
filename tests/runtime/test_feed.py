"""Events for those who look on: bounded, in order, and nobody is held up."""

from __future__ import annotations

import asyncio

from seallmd.runtime.feed import EventFeed, Happening


def feed(kept: int = 3) -> EventFeed:
    return EventFeed(kept, clock=lambda: 5.0)


def test_the_last_ones_are_remembered() -> None:
    """So many, the oldest first."""
    events = feed()
    for number in range(5):
        events.tell("service", "a", f"event {number}")
    assert [happening.text for happening in events.recent(2)] == ["event 3", "event 4"]
    assert [happening.number for happening in events.recent(99)] == [3, 4, 5]
    assert events.recent(0) == []
    assert events.recent(1) == [Happening(5, 5.0, "service", "a", "event 4")]


async def test_followers_see_the_past_and_all_that_comes() -> None:
    """In order, each once; several followers do not disturb one another."""
    events = feed()
    events.tell("service", "", "one")
    events.tell("service", "", "two")
    first, second = events.follow(1), events.follow(0)
    assert (await anext(first)).text == "two"
    coming = asyncio.ensure_future(anext(second))
    await asyncio.sleep(0)
    events.tell("service", "", "three")
    assert (await coming).text == "three"
    assert (await anext(first)).text == "three"
    for follower in (first, second):
        await follower.aclose()


async def test_a_slow_follower_is_told_what_it_missed() -> None:
    """Memory is bounded, and nothing is passed over in silence."""
    events = feed()
    events.tell("service", "", "seen")
    follower = events.follow(1)
    assert (await anext(follower)).text == "seen"
    for number in range(10):
        events.tell("service", "", f"event {number}")
    assert [(await anext(follower)).text for _ in range(4)] == [
        *("7 events were missed", "event 7"),
        *("event 8", "event 9"),
    ]
    await follower.aclose()
