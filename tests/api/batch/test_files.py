"""/v1/files with the official client: uploads, pages, bounds, and what is left when one fails."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import aiohttp
import pytest
from openai import APIStatusError, NotFoundError

from seallmd.api.batch import files as files_module
from tests.api.batch.conftest import Serve, Served, jsonl, line


async def test_upload_read_delete(serve: Serve) -> None:
    """Protects a file's life, and the bytes in it."""
    async with serve() as served:
        data = bytes(range(256)) * 9000  # more than one chunk
        file = await served.client.files.create(
            file=("x y.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
        )
        assert (file.bytes, file.filename, file.purpose, file.status) == (
            *(len(data), "x y.jsonl", "batch", "processed"),
        )
        assert file.expires_at == file.created_at + 7200
        assert (await served.client.files.content(file.id)).read() == data
        assert await served.client.files.retrieve(file.id) == file
        assert (await served.client.files.delete(file.id)).deleted
        with pytest.raises(NotFoundError):
            await served.client.files.content(file.id)
        assert list((served.directory / "files").iterdir()) == []


async def test_pages_of_files(serve: Serve) -> None:
    """Protects the client's own iteration, in both orders, and the filter by purpose."""
    async with serve() as served:
        ids = [await served.upload(b"%d" % n) for n in range(5)]
        assert [file.id async for file in served.client.files.list(limit=2)] == ids[::-1]
        assert [file.id async for file in served.client.files.list(limit=2, order="asc")] == ids
        assert not (await served.client.files.list(purpose="batch_output")).data


async def refused(served: Served, fields: dict[str, object], status: int) -> dict[str, object]:
    """The error of an upload."""
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        if isinstance(value, bytes):
            form.add_field(name, value, filename="f.jsonl")
        else:
            form.add_field(name, str(value))
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{served.url}/v1/files", data=form) as response,
    ):
        body = await response.json()
    assert response.status == status, body
    return dict(body["error"])


async def test_what_is_no_upload_is_refused(serve: Serve) -> None:
    """Protects: each mistake is named, and leaves nothing behind."""
    async with serve(max_file_bytes=2000, max_files=1) as served:
        assert (await refused(served, {"purpose": "assistants", "file": b"x"}, 400))["param"] == "purpose"
        assert (await refused(served, {"purpose": "batch"}, 400))["param"] == "file"
        assert (await refused(served, {"purpose": "batch", "file": b"x" * 2001}, 413))[
            "code"
        ] == "file_too_large"
        expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}
        error = await refused(served, {"purpose": "batch", "file": b"x", **expiry}, 400)
        assert error["param"] == "expires_after"
        async with aiohttp.ClientSession() as session:
            for headers, data in (
                ({"Content-Type": "application/json"}, b"{}"),
                ({"Content-Type": "multipart/form-data"}, b"x"),
                ({"Content-Type": "multipart/form-data; boundary=b"}, b"no form"),
            ):
                async with session.post(f"{served.url}/v1/files", data=data, headers=headers) as response:
                    assert response.status in (400, 415), await response.text()
        await served.upload(b"x")
        with pytest.raises(APIStatusError, match="delete some"):
            await served.upload(b"y")
        assert len(list((served.directory / "files").iterdir())) == 1


async def test_everybodys_files_together_are_bounded(serve: Serve) -> None:
    """Protects the disk: 507 in OpenAI's shape, and nothing is left of what did not fit."""
    async with serve(max_total_bytes=3000) as served:
        await served.upload(b"x" * 2000)
        with pytest.raises(APIStatusError, match="3000 bytes") as caught:
            await served.upload(b"y" * 2000)
        assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert len(list((served.directory / "files").iterdir())) == 1


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
async def test_a_full_disk_leaves_no_half_file(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Protects: whenever the disk is full, the client is told so and no file, half or whole, is there."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with serve() as served:
        with monkeypatch.context() as patch:
            if where == "write":
                patch.setattr(files_module.Partial, "_put", full)
            elif where == "fsync":
                patch.setattr(files_module.os, "fsync", full)
            else:
                patch.setattr(Path, "rename", full)
            with pytest.raises(APIStatusError) as caught:
                await served.upload(b"x" * (3 << 20))
        assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
        assert list((served.directory / "files").iterdir()) == []
        assert not (await served.client.files.list()).data
        await served.upload(b"x")


async def test_a_file_that_a_batch_needs_stays(serve: Serve) -> None:
    """Protects a batch from losing its input on the way."""
    async with serve() as served:
        served.engine.pause()
        batch = await served.begin(line("a"))
        with pytest.raises(APIStatusError, match="needs this file") as caught:
            await served.client.files.delete(batch.input_file_id)
        assert caught.value.status_code == 409
        served.engine.resume()
        await served.ended(batch)
        assert (await served.client.files.delete(batch.input_file_id)).deleted


async def test_a_second_daemon_keeps_its_hands_off(serve: Serve) -> None:
    """Protects: two daemons on one directory would answer every line twice."""
    async with serve() as first, serve() as second:
        with pytest.raises(APIStatusError, match="cannot be used") as caught:
            await second.upload(jsonl(line("a")))
        assert (caught.value.status_code, caught.value.code) == (503, "batches_unavailable")
        await first.upload(jsonl(line("a")))


async def test_what_was_half_written_is_removed_at_the_start(serve: Serve) -> None:
    """Protects the disk from what a killed daemon has left."""
    async with serve() as served:
        kept = await served.upload(b"x")
        (served.directory / "files" / "partial-0123").write_bytes(b"half")
    async with serve() as served:
        assert [path.name for path in (served.directory / "files").iterdir()] == [kept]


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n{"a": 1}\n\r\n--b--\r\n'
)
PARTS = (
    *(b"\r\n", b"--b", b"--b--", b"A" * 9000, b"Content-Length: 5\r\n", b"Content-Encoding: gzip\r\n"),
    *(b"Content-Type: multipart/mixed; boundary=c\r\n", b"Content-Transfer-Encoding: base64\r\n", b"\xeb"),
)


def spoilt(form: bytes, draw: random.Random) -> bytes:
    """A form with bytes changed, left out and put in."""
    data = bytearray(form)
    for _ in range(draw.randint(1, 6)):
        at, length = draw.randrange(len(data)), draw.randint(1, 20)
        change = draw.choice((draw.randbytes(length), draw.choice(PARTS), b""))
        data[at : at + draw.choice((0, length))] = change
    return bytes(data)


async def test_spoilt_forms(serve: Serve) -> None:
    """Protects: whatever a body is, it is taken or refused, and what was refused leaves nothing behind."""
    draw, kept = random.Random(7), 0
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with serve() as served, aiohttp.ClientSession(headers=headers) as session:
        for data in [spoilt(FORM, draw) for _ in range(400)]:
            async with session.post(f"{served.url}/v1/files", data=data) as response:
                assert response.status in (200, 400, 415), (data, await response.text())
                kept += response.status == 200
        assert 0 < kept < 400
        assert len(list((served.directory / "files").iterdir())) == kept
