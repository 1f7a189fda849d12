"""A Hugging Face id is fetched: only what is wanted, with progress, from a hub that the test plays itself."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"\x00" * 300_000,
    "pytorch_model.bin": b"pickle, never to be fetched",
    "modeling_evil.py": b"raise SystemExit",
}
FETCH = """
import json, sys
from pathlib import Path
from seallmd.worker.resolve import fetch
seen = []
directory = fetch(sys.argv[1], sys.argv[2], lambda stage, done, total: seen.append((stage, done, total)))
print(json.dumps([sorted(p.name for p in Path(directory).iterdir()), seen[-1]]))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as downloads need."""

    fetched: list[str] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            files = [
                {"type": "file", "rfilename": name, "path": name, "size": len(content), "oid": COMMIT}
                for name, content in FILES.items()
            ]
            listing = {"id": "org/tiny", "sha": COMMIT, "siblings": files, "private": False, "tags": []}
            self._send(json.dumps(files if "/tree/" in path else listing).encode(), "application/json", body)
        elif path.startswith("/org/tiny/resolve/") and path.rsplit("/", 1)[1] in FILES:
            name = path.rsplit("/", 1)[1]
            if body:
                self.fetched.append(name)
            self._send(FILES[name], "application/octet-stream", body)
        else:
            self.send_error(404)

    def _send(self, content: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The hub's address."""
    Hub.fetched = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def run_fetch(hub: str, model: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read when the library is imported."""
    settings = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", FETCH, model, str(cache)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_model_is_fetched_without_what_could_run(hub: str, tmp_path: Path) -> None:
    """Weights, configuration and tokenizer come; pickles and code do not; the second time nothing does."""
    result = run_fetch(hub, "org/tiny", tmp_path)
    assert result.returncode == 0, result.stderr
    names, last = json.loads(result.stdout.splitlines()[-1])
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(Hub.fetched) == names
    assert last[0] == "download"
    assert last[1] > 0
    Hub.fetched.clear()
    assert run_fetch(hub, "org/tiny", tmp_path).returncode == 0
    assert Hub.fetched == []


def test_an_unknown_model_is_one_line(hub: str, tmp_path: Path) -> None:
    """The reason that `status` shows."""
    result = run_fetch(hub, "org/none", tmp_path)
    assert result.returncode != 0
    assert "cannot be downloaded" in result.stderr.splitlines()[-1]
