"""Whether every operation of a device computes what it should; `tools/bench_gpu.py` runs this first.

Attention, in plain torch and by each of the device's own ways, against the CPU's in float32 on the same
rounded numbers; the other operations against their references on the device; sampling against the CPU's; KV
there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from seallmd.core import messages as msg
from seallmd.core.shapes import LayerShape
from seallmd.worker.attention import Answerer
from seallmd.worker.device import Device
from seallmd.worker.kv import KvView
from seallmd.worker.ops import reference, trials
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.paged import PagedBatch
from seallmd.worker.sampler import Draw, sample
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import tables_of
from tools.sections import survives

_CPU = torch.device("cpu")


def check_operations(device: torch.device, kernels: Kernels | None) -> bool:
    """Print how far each operation is from its reference; whether all are near enough."""
    good = True
    for name, error in (*_attentions(device, kernels), *_others(device, kernels)):
        good &= survives(name, partial(_is_near, name, error))
    return survives("sampling", partial(_samples_alike, device)) and good


def _is_near(name: str, error: Callable[..., float]) -> bool:
    errors = [error(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fine = errors[0] < 1e-4 and errors[1] < 2e-2
    print(f"{name:44} float32 {errors[0]:.1e}  bfloat16 {errors[1]:.1e}  {verdict(fine)}")
    return fine


def _samples_alike(device: torch.device) -> bool:
    share = sampling_agrees(device)
    print(f"sampling: {share:.1%} of rows draw the same  {verdict(share == 1)}")
    return share == 1


def verdict(fine: bool) -> str:
    """What is printed behind a figure."""
    return "" if fine else "WRONG"


def _attentions(device: torch.device, kernels: Kernels | None) -> Iterator[tuple[str, Callable[..., float]]]:
    """Each kind of attention by each way that there is. FlashAttention leaves float32 and sinks to Triton."""
    ways: dict[str, Kernels | None] = {"plain": None}
    if kernels is not None and kernels.attention is not None:
        ways["Triton"] = replace(kernels, flash=None)
        if kernels.flash is not None:
            ways[kernels.flash.names()] = kernels
    for way, chosen in ways.items():
        for case in trials.CASES:
            yield f"attention, {case.name}, {way}", partial(attention_error, case, device, kernels=chosen)


def _others(device: torch.device, kernels: Kernels | None) -> Iterator[tuple[str, Callable[..., float]]]:
    if kernels is None:
        return
    if kernels.norm is not None:
        for n in (576, 4096):
            yield f"norm of {n}, Triton", partial(trials.norm_error, kernels, device, n=n, offset=1.0)
    if kernels.add_norm is not None:
        for n in (576, 4096):
            for sandwich, name in ((False, "add+norm"), (True, "norm+add+norm")):
                error = partial(trials.add_norm_error, kernels, device, n=n, sandwich=sandwich)
                yield f"{name} of {n}, Triton", error
    if kernels.rotate is not None:
        for width, normed in ((64, False), (48, True)):
            name = f"{'norm, ' if normed else ''}rotation of {width} of 64 and storing, Triton"
            yield name, partial(trials.rotate_error, kernels, device, width=width, normed=normed)
    if kernels.in_blocks is not None:
        for rows in (1, 64):
            error = partial(trials.blocks_error, kernels, device, rows=rows, n=4096, k=4096)
            yield f"int8 linear, {rows} rows, Triton", error
    if kernels.gated is not None:
        for activation in reference.ACTIVATIONS:
            yield f"{activation}, Triton", partial(trials.gated_error, kernels, device, activation=activation)


def attention_error(
    case: trials.Case, device: torch.device, dtype: torch.dtype, kernels: Kernels | None
) -> float:
    """How far attention on `device` in `dtype` is from the CPU's in float32 on the same rounded numbers.

    kernels: None for plain torch.
    """
    here = trials.scene_of(case, device, dtype)
    (_, kv_heads, _, k_dim), v_dim = here.call.key.shape, here.call.value.shape[3]
    shape, page = LayerShape(kv_heads, k_dim, v_dim), here.kv.page
    size = page.tokens * 4 * shape.kv_heads * (shape.k_dim + shape.v_dim)
    blocks = here.kv.views(0)[0].shape[0]
    kv = KvView(torch.zeros(blocks * size, dtype=torch.uint8), size, [shape], torch.float32)
    for mine, theirs in zip(kv.views(0), here.kv.views(0), strict=True):
        mine.copy_(theirs)
    widened = {
        name: t.cpu().float() for name, t in here.call._asdict().items() if isinstance(t, torch.Tensor)
    }
    call = here.call._replace(**widened)
    expected = PagedBatch(kv, here.spans, _CPU).attend(call)
    if kernels is None:
        answerer: Answerer = PagedBatch(here.kv, here.spans, device)
    else:
        answerer = TableBatch(here.kv, tables_of(here.spans, page, device), kernels)
    return trials.difference(answerer.attend(here.call).cpu(), expected)


def sampling_agrees(device: torch.device) -> float:
    """The share of rows that draw on `device` what they draw on the CPU."""
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(5)) * 3
    kinds = (
        msg.Sampling(temperature=0.0),
        msg.Sampling(seed=1),
        msg.Sampling(temperature=0.7, top_p=0.9, seed=2),
        msg.Sampling(temperature=1.3, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=3),
    )
    draws = [Draw(kinds[row % len(kinds)], [row, 7, 9], 1) for row in range(len(logits))]
    same = sample(logits, draws) == sample(logits.to(device), draws).cpu()
    return float(same.float().mean())


def copies_agree(device: Device, block_bytes: int) -> bool:
    """Whether blocks come back from host memory as they went."""
    blocks = device.arena.view(-1, block_bytes)
    before = torch.randint(
        0, 256, blocks[:3].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    blocks[:3].copy_(before)
    device.save([0, 1, 2], [2, 0, 1])
    device.wait_for([(0, 1, 2)])
    blocks[:3].zero_()
    device.restore([2, 0, 1], [0, 1, 2], 0)
    device.wait_for([(0, 1, 2)])
    return torch.equal(blocks[:3].cpu(), before)
