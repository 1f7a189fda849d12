"""/v1/batches with the official client, over the stand-in: from the input to both files of results."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from openai import APIStatusError

from seallmd.core.events import Finish
from tests.api.batch.conftest import Serve, jsonl, line
from tests.api.engine_double import FakeEngine, view


async def test_every_line_is_answered_as_over_http(serve: Serve, engine: FakeEngine) -> None:
    """Protects the whole way: the body of each line's answer is what the endpoint itself would have said."""
    async with serve() as served:
        batch = await served.begin(
            line("a"), line("b", max_tokens=2), line("c", max_tokens=-1), metadata={"for": "me"}
        )
        assert (batch.status, batch.metadata) == ("validating", {"for": "me"})
        batch = await served.ended(batch)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        output = await served.lines(batch.output_file_id)
        direct = await served.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "a"}], max_tokens=4
        )
        assert [each["custom_id"] for each in output] == ["a", "b"]
        first = output[0]["response"]
        assert first["status_code"] == 200
        assert first["body"]["choices"] == direct.model_dump(exclude_unset=True)["choices"]
        (error,) = await served.lines(batch.error_file_id)
        assert (error["custom_id"], error["response"]["status_code"]) == ("c", 400)
        assert error["response"]["body"]["error"]["param"] == "max_tokens"
        assert {g.tier for g in engine.submitted[:2]} == {"batch"}
        assert batch.expires_at == batch.created_at + 86400
        assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        file = await served.client.files.retrieve(str(batch.output_file_id))
        assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/v1/completions", {"prompt": "hi"}), ("/v1/responses", {"input": "hi", "max_tokens": None})],
)
async def test_other_endpoints(serve: Serve, endpoint: str, body: dict[str, object]) -> None:
    """Protects the table of endpoints."""
    async with serve() as served:
        lines = [line(name, url=endpoint, **body) for name in "xy"]
        for each in lines:
            each["body"] = {key: value for key, value in each["body"].items() if value is not None}
        batch = await served.ended(await served.begin(*lines, endpoint=endpoint))
        assert [each["custom_id"] for each in await served.lines(batch.output_file_id)] == ["x", "y"]
        assert batch.error_file_id is None


async def test_embeddings(serve: Serve, engine: FakeEngine, model: Path) -> None:
    """Protects the vectors' way through a batch: the same numbers as over HTTP, and at the batch tier."""
    engine.views["e"] = view("e", model, pooling="mean")
    url = "/v1/embeddings"
    inputs = {
        name: {"custom_id": name, "method": "POST", "url": url, "body": {"model": "e", "input": name}}
        for name in "xy"
    }
    async with serve() as served:
        batch = await served.ended(await served.begin(*inputs.values(), endpoint=url))
        assert {g.tier for g in engine.submitted} == {"batch"}
        for each in await served.lines(batch.output_file_id):
            direct = await served.client.embeddings.create(
                model="e", input=each["custom_id"], encoding_format="float"
            )
            assert each["response"]["body"]["data"][0]["embedding"] == direct.data[0].embedding
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 2


@pytest.mark.parametrize(
    ("data", "code", "number", "text"),
    [
        (jsonl(line("a")) + b'{"custom_id": \n', "invalid_json_line", 2, "valid JSON"),
        (jsonl(line("a"), line("b"), line("a")), "duplicate_custom_id", 3, "line 1"),
        (jsonl(line("a", url="/v1/completions", prompt="x")), "mismatched_url", 1, "/v1/completions"),
        (jsonl(line("a"), line("b", model="nobody")), "model_not_found", 2, "nobody"),
        (jsonl({**line("a"), "method": "GET"}), "invalid_method", 1, "POST"),
        (jsonl({**line("a"), "body": 7}), "invalid_body", 1, "body"),
        (jsonl({"custom_id": "a"}), "missing_required_parameter", 1, "method"),
        (jsonl({**line("a"), "custom_id": ""}), "invalid_custom_id", 1, "custom_id"),
        (jsonl(line("a", user="x" * 3000)), "line_too_long", 1, "2000"),
        (jsonl(*(line(f"{n}") for n in range(6))), "too_many_lines", 6, "5 lines"),
        (b"\n\n", "empty_file", None, "no requests"),
        (b"\xff\xfe\n", "invalid_json_line", 1, "JSON"),
    ],
)
async def test_a_wrong_input_is_refused_as_a_whole(
    serve: Serve, engine: FakeEngine, data: bytes, code: str, number: int | None, text: str
) -> None:
    """Protects clients from half a run: nothing is asked, and the error says which line and why."""
    async with serve(max_line_bytes=2000, max_lines=5) as served:
        file = await served.upload(data)
        batch = await served.client.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )
        batch = await served.ended(batch)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        (error,) = batch.errors.data
        assert (error.code, error.line) == (code, number)
        assert text in str(error.message)
        assert not engine.submitted
        assert batch.output_file_id is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"input_file_id": "file-0"}, "file_id"),
    ],
)
async def test_a_wrong_batch_is_not_begun(serve: Serve, fields: dict[str, object], param: str) -> None:
    """Protects: what can be seen at once is refused at once."""
    async with serve() as served:
        wanted = {"input_file_id": await served.upload(jsonl(line("a"))), "endpoint": "/v1/chat/completions"}
        with pytest.raises(APIStatusError) as caught:
            await served.client.batches.create(**{**wanted, "completion_window": "1h", **fields})
        assert caught.value.body["param"].startswith(param)  # type: ignore[index]


async def test_cancel_keeps_what_was_answered(serve: Serve, engine: FakeEngine) -> None:
    """Protects: each line of a cancelled batch is in one of the two files, and what ran stops at once."""
    async with serve(in_flight=2) as served:
        first = await served.begin(*(line(f"{n}", max_tokens=1) for n in range(3)), line("slow"))
        await served.ended(first)
        engine.pause()
        batch = await served.begin(*(line(f"{n}") for n in range(5)))
        await served.asked(len(engine.submitted) + 2)
        cancelled = await served.client.batches.cancel(batch.id)
        assert cancelled.status in ("cancelling", "cancelled")
        batch = await served.ended(batch)
        assert (batch.status, engine.live) == ("cancelled", set())
        errors = await served.lines(batch.error_file_id)
        assert [each["custom_id"] for each in errors] == ["0", "1", "2", "3", "4"]
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
        with pytest.raises(APIStatusError, match="cannot be cancelled") as caught:
            await served.client.batches.cancel(first.id)
        assert caught.value.status_code == 409


async def test_the_deadline_ends_a_batch_with_partial_output(serve: Serve, engine: FakeEngine) -> None:
    """Protects the completion window: what was answered until then is there, the rest says why not."""
    async with serve(in_flight=1) as served:
        batch = await served.begin(line("a"), line("b", max_tokens=100), line("c"), window="1s")
        await served.asked(2)
        engine.pause()
        batch = await served.ended(batch)
        assert (batch.status, engine.live) == ("expired", set())
        assert [each["custom_id"] for each in await served.lines(batch.output_file_id)] == ["a"]
        errors = await served.lines(batch.error_file_id)
        assert [each["custom_id"] for each in errors] == ["b", "c"]
        assert {each["error"]["code"] for each in errors} == {"batch_expired"}


async def test_lines_in_flight_are_bounded(serve: Serve, engine: FakeEngine) -> None:
    """Protects the node's queue: a batch of many lines has no more than `in_flight` of them there."""
    async with serve(in_flight=3) as served:
        engine.pause()
        batch = await served.begin(*(line(f"{n}", max_tokens=1) for n in range(20)))
        await served.asked(3)
        await served.client.batches.retrieve(batch.id)  # a turn of everything
        assert len(engine.submitted) == 3
        engine.resume()
        assert (await served.ended(batch)).request_counts.completed == 20


async def test_what_fails_in_passing_is_tried_again(serve: Serve, engine: FakeEngine) -> None:
    """Protects: a model that comes in, or a daemon that is drained, costs no line its answer."""
    async with serve() as served:
        engine.failing = Finish(0, "failed", "the server takes no new requests", "draining", 503, 0.01)
        batch = await served.begin(line("a"))
        await served.asked(7)
        engine.failing = None
        assert (await served.ended(batch)).request_counts.completed == 1


async def test_what_fails_for_good_is_the_answer(serve: Serve, engine: FakeEngine) -> None:
    """Protects: a line that ends every step with it does not hold its batch up for ever."""
    async with serve() as served:
        engine.failing = Finish(0, "failed", "not enough memory", "out_of_memory", 503, 0.01)
        batch = await served.ended(await served.begin(line("a")))
        (error,) = await served.lines(batch.error_file_id)
        assert error["response"]["body"]["error"]["code"] == "out_of_memory"
        assert len(engine.submitted) == 5


async def test_a_line_that_streams_is_refused(serve: Serve) -> None:
    """Protects: a batch has no connection that a stream could go to."""
    async with serve() as served:
        batch = await served.ended(await served.begin(line("a", stream=True), line("b")))
        (error,) = await served.lines(batch.error_file_id)
        assert error["response"]["body"]["error"]["param"] == "stream"


async def test_a_restart_goes_on_where_it_was(serve: Serve, engine: FakeEngine) -> None:
    """Protects: lines that were answered before are kept and not run again; those in flight are."""
    async with serve(in_flight=2) as served:
        batch, done = await served.begin(*(line(f"{n}", max_tokens=3) for n in range(8))), 0
        await served.asked(4)
        engine.pause()
        async with asyncio.timeout(30):  # an answer on its way is kept, or run again: either is right
            while len(engine.submitted) - len(engine.live) > done:
                done = await served.completed(batch)
    engine.resume()
    async with serve() as served:
        batch = await served.ended(batch)
        assert (batch.status, batch.request_counts.completed) == ("completed", 8)
        output = await served.lines(batch.output_file_id)
        assert [each["custom_id"] for each in output] == [f"{n}" for n in range(8)]
        assert len(engine.submitted) == 8 + len(engine.cancelled)
        assert done >= 2


async def test_pages_of_batches(serve: Serve) -> None:
    """Protects the client's own iteration over pages."""
    async with serve() as served:
        ids = [(await served.ended(await served.begin(line("a")))).id for _ in range(5)]
        assert [batch.id async for batch in served.client.batches.list(limit=2)] == ids[::-1]
