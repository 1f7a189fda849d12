"""schemathesis makes requests of /openapi.json, right ones and wrong ones, and judges the answers by it.

Three thousand of them, hence of a made-up model of a few layers: what it says does not matter here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.engine_double import write_model
from tests.e2e.clients.conftest import SCRIPTS, program, run
from tests.e2e.conftest import running
from tests.e2e.daemon import Daemon, service
from tests.worker.helpers import save_tiny

NAME = "tiny"
CHECKS = (
    *("honest_errors", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method"),
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon of its own: its model is unloaded and kept as schemathesis pleases."""
    model = save_tiny(tmp_path_factory.mktemp("model"), vocab_size=320)
    write_model(model)
    config = '[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "64 MiB"\nblock = "64 KiB"\n'
    config += service(NAME, str(model), preload=True, pooling="mean")
    yield from running(Daemon(tmp_path_factory.mktemp("target"), config))


@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
def test_answers_are_as_described(target: Daemon, tmp_path: Path, phase: str) -> None:
    """No 5xx but an honest 503; nothing that is not described; what breaks the schema is refused. The daemon
    serves on."""
    run(
        [
            *(program("others", "schemathesis"), "run", f"{target.url}/openapi.json"),
            *("--phases", phase, "--checks", ",".join(CHECKS), "--continue-on-failure"),
            *("--max-examples", "10", "--seed", "1", "--suppress-health-check", "all"),
            *("--generation-database", "none", "--request-timeout", "60", "--no-color"),
        ],
        cwd=tmp_path,
        PYTHONPATH=str(SCRIPTS),
        SCHEMATHESIS_HOOKS="schemathesis_hooks",
        MODELS=NAME,
        TMPDIR=str(tmp_path),
    )
    assert [device["state"] for device in target.status()["devices"]] == ["up"]
    with target.client() as client:
        assert client.completions.create(model=NAME, prompt="x", max_tokens=2).usage.completion_tokens
