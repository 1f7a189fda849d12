"""Which devices there are, and what each worker process is started with.

Owns the detection of GPUs (NVML, no CUDA context in the daemon) and the defaults of CPU devices. Must not
start anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pynvml

from seallmd import cgroup
from seallmd.config import DeviceSettings, Size
from seallmd.core.cost import ROOFLINES, Roofline
from seallmd.core.host_kv import default_bytes
from seallmd.core.messages import WorkerSettings
from seallmd.errors import ConfigError
from seallmd.paths import default_cache_directory
from seallmd.runtime import rendezvous

MIB = 1 << 20


@dataclass(frozen=True)
class DevicePlan:
    """What to start: one worker per device, one host process; the unit of every arena; the kind of device.

    host_kv_bytes: host memory for KV of each device. cache: directory for what may be lost: converted models,
    profiles of services. rendezvous: directory for tensor-parallel groups. threads: math threads of a CPU
    device, if it lends them; else 0.
    """

    workers: tuple[WorkerSettings, ...]
    host: WorkerSettings
    block_bytes: int
    host_bytes: int
    host_kv_bytes: int
    cache: Path
    rendezvous: Path
    roofline: Roofline
    threads: int = 0


def plan(settings: DeviceSettings) -> DevicePlan:
    """Decide from the configuration and the machine.

    Raises ConfigError when GPUs are asked for in vain, or an arena would have no block.
    """
    gpus = [] if settings.kind == "cpu" else _gpu_names()
    if settings.kind == "cuda" and not gpus:
        raise ConfigError('[devices] kind = "cuda", but this machine shows no NVIDIA GPU')
    if gpus and not _torch_has_cuda():
        raise ConfigError(
            "this machine has NVIDIA GPUs, but the torch that is installed knows no CUDA: install a build of "
            'torch with CUDA, or set [devices] kind = "cpu"'
        )
    block = Size(settings.block).bytes_ or (2 * MIB if gpus else MIB // 2)
    memory = machine_bytes()
    cache = settings.cache or str(default_cache_directory())
    workers = _gpu_workers(settings, gpus, block) if gpus else _cpu_workers(settings, block, memory)
    host_kv = default_bytes(workers[0].arena_bytes, gpu=bool(gpus))
    if settings.host_kv:  # "0 B" is a choice too
        host_kv = Size(settings.host_kv).bytes_
    meeting = rendezvous.directory_of(Path(cache))
    common = {
        "host_kv_bytes": host_kv,
        "kv_layout": settings.kv_layout,
        "cache": cache,  # without it a CPU device runs on plain torch
        "rendezvous": str(meeting),
    }
    workers = tuple(msgspec.structs.replace(worker, **common) for worker in workers)
    return DevicePlan(
        workers=workers,
        host=WorkerSettings(
            "host",
            "cuda" if gpus else "cpu",
            block_bytes=block,
            threads=1,
            cache=cache,
            image_cache_bytes=Size(settings.image_cache).bytes_,
        ),
        block_bytes=block,
        host_bytes=Size(settings.host_memory).bytes_ if settings.host_memory else memory // 2,
        host_kv_bytes=host_kv,
        cache=Path(cache),
        rendezvous=meeting,
        roofline=_roofline(gpus[0]) if gpus else ROOFLINES["cpu"],
        threads=workers[0].threads if settings.lend_threads and not gpus else 0,
    )


def _roofline(gpu: str) -> Roofline:
    """The one whose name the GPU's contains; of unknown ones nothing is known, and the A100's is a start."""
    name = gpu.lower()
    return next((r for r in ROOFLINES.values() if r.name.split("-")[0] in name), ROOFLINES["a100-80g"])


def _gpu_workers(settings: DeviceSettings, gpus: list[str], block: int) -> tuple[WorkerSettings, ...]:
    graphs = Size(settings.graphs).bytes_
    common = WorkerSettings(
        "gpu",
        "cuda",
        reserve_bytes=Size(settings.reserve).bytes_ + graphs,
        block_bytes=block,
        kernels=settings.kernels == "triton",
        graph_bytes=graphs,
    )
    return tuple(
        msgspec.structs.replace(common, name=f"gpu{i}", device=f"cuda:{i}") for i in range(len(gpus))
    )


def _cpu_workers(settings: DeviceSettings, block: int, memory: int) -> tuple[WorkerSettings, ...]:
    count = settings.cpu_workers
    arena = Size(settings.memory).bytes_ if settings.memory else min(memory // 4 // count, 4096 * MIB)
    if arena < block:
        raise ConfigError(
            f"[devices] memory: {arena >> 10} KiB do not hold a single block of {block >> 10} KiB"
        )
    threads = settings.threads or max(1, machine_cores() // count)
    return tuple(
        WorkerSettings(f"cpu{i}", "cpu", arena_bytes=arena, block_bytes=block, threads=threads)
        for i in range(count)
    )


def machine_bytes() -> int:
    """Memory of the machine, or of the control group if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup.memory_limit()
    return total if limit is None else min(total, limit)


def machine_cores() -> int:
    """Cores that this process may run on, or as many as the control group has time for."""
    cores, limit = len(os.sched_getaffinity(0)), cgroup.cores()
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def _gpu_names() -> list[str]:
    """Of the GPUs that workers will see, in CUDA's order."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # no driver: no GPU to speak of
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in _visible(handles)]
    finally:
        pynvml.nvmlShutdown()


def _torch_has_cuda() -> bool:
    """Whether workers can use a GPU: they would end at their start, again and again. To import torch takes
    seconds, and it is not needed here; what is not found here may be elsewhere."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    libraries = Path(spec.origin).parent / "lib"
    return not libraries.is_dir() or any(libraries.glob("libtorch_cuda*"))


def _visible(handles: list[Any]) -> list[Any]:
    """What CUDA_VISIBLE_DEVICES leaves of all GPUs: those that it names, by number or UUID, up to the first
    name that means none. NVML's numbers are CUDA's where that counts by bus (`forkserver`)."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return handles
    found = []
    for name in map(str.strip, names.split(",")):
        if name.isdecimal():
            named = handles[int(name) :][:1]
        else:
            named = [h for h in handles if name and str(pynvml.nvmlDeviceGetUUID(h)).startswith(name)][:1]
            if name.startswith("MIG-"):  # a part of a GPU; CUDA shows a process one of them at most
                with contextlib.suppress(pynvml.NVMLError):
                    named = [pynvml.nvmlDeviceGetHandleByUUID(name)]
        if not named:
            break
        found += named
    return found
