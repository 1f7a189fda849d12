"""schemathesis makes requests of /openapi.json, right ones and wrong ones, and judges the answers by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.clients.conftest import SCRIPTS, program, run
from tests.e2e.conftest import running
from tests.e2e.daemon import SMOL, Daemon, service

CHECKS = (
    *("honest_errors", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method"),
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon of its own: its model is unloaded and kept as schemathesis pleases."""
    config = '[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "1 GiB"\n'
    config += service(SMOL, SMOL, preload=True, pooling="mean")
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
        PYTHONPATH=str(SCRIPTS),
        SCHEMATHESIS_HOOKS="schemathesis_hooks",
        MODELS=SMOL,
        TMPDIR=str(tmp_path),
    )
    assert [device["state"] for device in target.status()["devices"]] == ["up"]
    assert target.client().completions.create(model=SMOL, prompt="x", max_tokens=2).usage.completion_tokens
