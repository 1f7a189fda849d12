"""Settings of the worker's tests: one thread, so that tests beside each other do not fight for cores."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seallmd.worker import ops
from seallmd.worker.ops.native import Native
from seallmd.worker.process import quiet_libraries


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(1)
    quiet_libraries()


@pytest.fixture(scope="session")
def operations_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the operations are compiled to, once per session."""
    return tmp_path_factory.mktemp("operations")


@pytest.fixture
def native(operations_cache: Path, _quiet: None) -> Iterator[Native]:
    """The compiled operations, in use while the test runs."""
    line = ops.start(operations_cache, lambda _: None)
    compiled = ops.compiled()
    if compiled is None:
        pytest.skip(line)
    yield compiled
    ops.stop()
