"""Small numbers on their way to the device, without waiting for it.

`torch.tensor(..., device=)` waits until everything that was enqueued on a GPU is done, so that no step could
be prepared beside the one that runs. A copy from ordinary memory returns early while it is small (CUDA
promises nothing; 64 KB is what drivers are said to take), so many numbers go by page-locked memory, which
torch keeps until the copy is over. Unmeasured. Must not know what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_SMALL_BYTES = 32 << 10


def to_device(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """As `torch.tensor(numbers, dtype=dtype, device=device)`."""
    tensor = torch.tensor(numbers, dtype=dtype)
    if device.type == "cuda" and tensor.nbytes > _SMALL_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
