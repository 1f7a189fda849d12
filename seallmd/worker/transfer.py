"""Small numbers on their way to the device, without waiting for it.

`torch.tensor(..., device=)` waits until everything that was enqueued on a GPU is done, so that no step could
be prepared beside the one that runs. (That a copy from ordinary memory returns early is CUDA's promise;
unmeasured.) Must not know what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """As `torch.tensor(numbers, dtype=dtype, device=device)`."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
