"""Settings of the worker's tests: one thread, so that tests beside each other do not fight for cores."""

import pytest
import torch

from seallmd.worker.process import quiet_libraries


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(1)
    quiet_libraries()
