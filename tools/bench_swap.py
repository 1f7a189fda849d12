"""Swapping, through the real host and worker processes: how fast, and what another resident notices.

    python -m tools.bench_swap models/smollm2-135m-instruct

The model is served twice. One service decodes all the time; the other is swapped in, with nothing else to do
and then beside the first. Beside it in the same run: a plain copy of as many bytes between resident pages,
with as many threads; KV to host memory and back; and the gaps between tokens of the resident service, with
and without a swap under way. A swap is over when all weights have been copied; how soon the service serves,
out of its host image, is a figure of its own. Every other figure stands there twice: by the clock, and in CPU
time of the process that did it, which is what it would be if nobody else wanted the cores (with one thread).
Gaps are those between answers, so the bench's own delays are in them.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.multiprocessing as mp

from seallmd.core import messages as msg
from seallmd.core.framing import Unframer, frame
from seallmd.worker import host
from seallmd.worker import main as worker

_PROMPT_TOKENS = 32
_GREEDY = msg.Sampling(temperature=0.0)
_FENCE = msg.Step(0, "nobody", (), ())  # must fail: its answer says that all before it is done


class Process:
    """A spawned child and our end of its socket."""

    def __init__(self, entry: Callable[..., None], settings: msg.WorkerSettings, speaks: object) -> None:
        self._sock, theirs = socket.socketpair()
        self._child = mp.get_context("spawn").Process(
            target=entry, args=(msgspec.json.encode(settings), theirs), daemon=True
        )
        self._child.start()
        theirs.close()
        self._messages = self._receive(Unframer(speaks))
        self._clock = _cpu_clock(self.hear(msg.Hello).pid)

    def _receive(self, unframer: Unframer) -> Iterator[Any]:
        while data := self._sock.recv(1 << 16):
            yield from unframer.feed(data)

    def say(self, *messages: msg.Message) -> None:
        """Send."""
        self._sock.sendall(b"".join(map(frame, messages)))

    def hear(self, *kinds: type) -> Any:
        """The next message of one of these kinds; anything else ends the run.

        Of progress only the end of a copy counts, and that where it is asked for.
        """
        said = next(
            m
            for m in self._messages
            if not isinstance(m, msg.JobProgress)
            or (msg.JobProgress in kinds and (m.stage, m.done) == ("copy", m.total))
        )
        if not isinstance(said, kinds):
            raise SystemExit(f"bench_swap: {said}")
        return said

    def now(self) -> Instant:
        """The clock, and the CPU time that the process has used."""
        return Instant(time.perf_counter(), time.clock_gettime(self._clock))


class Instant(NamedTuple):
    """Seconds, by the clock and of CPU time; also of something that took a while."""

    clock: float
    cpu: float

    def since(self, begun: Instant) -> Instant:
        """What passed."""
        return Instant(self.clock - begun.clock, self.cpu - begun.cpu)


def _cpu_clock(pid: int) -> int:
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        raise SystemExit("bench_swap: the CPU time of a child cannot be read")
    return clock.value


class Bench:
    """A worker with one resident service and one that comes and goes."""

    def __init__(self, options: argparse.Namespace, cache: str) -> None:
        self._block = options.block_kib << 10
        fields: dict[str, Any] = {"device": "cpu", "block_bytes": self._block, "threads": options.threads}
        self._keeper = Process(host.run, msg.WorkerSettings("host", cache=cache, **fields), msg.FromHost)
        self._probed: dict[str, msg.Probed] = {}
        self._images: dict[str, str] = {}
        for service in ("resident", "swapped"):
            self._keeper.say(msg.Probe(service, str(options.model), options.dtype, 0))
            self._probed[service] = self._keeper.hear(msg.Probed)
            self._keeper.say(msg.BuildImage(service))
            self._images[service] = self._keeper.hear(msg.ImageReady).path
        self._extents, first = {}, 0
        for service in self._images:
            self._extents[service], first = self._place(service, first)
        self.shape = self._probed["resident"].shape
        tokens = _PROMPT_TOKENS + options.gaps + 4096  # plenty: swaps last as long as they last
        page = self._block // self.shape.kv_bytes_per_token
        self._table = tuple(range(first, first + -(-tokens // page)))
        self._kv = tuple(
            range(self._table[-1] + 1, self._table[-1] + 1 + options.kv_mib * 1024 // options.block_kib)
        )
        self.worker = Process(
            worker.run,
            msg.WorkerSettings(
                "worker",
                arena_bytes=(self._kv[-1] + 1) * self._block,
                host_kv_bytes=len(self._kv) * self._block,
                cache=cache,
                **fields,
            ),
            msg.FromWorker,
        )
        self._steps = self._run = 0
        self.kv_bytes = len(self._kv) * self._block

    def _place(self, service: str, first: int) -> tuple[tuple[msg.Extent, ...], int]:
        extents, at = [], 0
        for size in self._probed[service].shape.segments:
            extents.append(msg.Extent(at, size, first * self._block))
            first, at = first + -(-size // self._block), at + size
        return tuple(extents), first

    def _copy_in(self, service: str) -> msg.CopyIn:
        told, extents = self._probed[service], self._extents[service]
        shape, image = told.shape, self._images[service]
        return msg.CopyIn(service, told.directory, shape.dtype, shape.context, image, extents)

    def swap_in(self, service: str = "swapped") -> tuple[Instant, Instant]:
        """How long it took, alone, until the service could serve, and until all had been copied."""
        begun = self.worker.now()
        self.worker.say(self._copy_in(service))
        took: dict[type, Instant] = {}
        while len(took) < 2:  # in any order
            said = self.worker.hear(msg.CopyDone, msg.JobProgress)
            took[type(said)] = self.worker.now().since(begun)
        return took[msg.CopyDone], max(took.values())

    def drop(self) -> None:
        """The service that comes and goes goes."""
        self.worker.say(msg.DropWeights("swapped"), _FENCE)
        self.worker.hear(msg.StepFailed)

    def move_kv(self, message: type[msg.SaveBlocks] | type[msg.RestoreBlocks]) -> Instant:
        """How long it took. Blocks alternate, so that none are neighbours."""
        blocks = self._kv[::2] + self._kv[1::2]
        slots = tuple(range(len(blocks)))
        save = message is msg.SaveBlocks
        begun = self.worker.now()
        self.worker.say(message(*(blocks, slots) if save else (slots, blocks)), _FENCE)
        self.worker.hear(msg.StepFailed)
        return self.worker.now().since(begun)

    def start_decoding(self) -> None:
        """Bring the resident's request to its first token."""
        prompt = tuple(range(100, 100 + _PROMPT_TOKENS))
        admit = msg.Admit(1, prompt, _PROMPT_TOKENS, _GREEDY)
        row = msg.Row(1, 0, _PROMPT_TOKENS, True, self._table)
        self._steps, self._run = 1, _PROMPT_TOKENS
        self.worker.say(msg.Step(1, "resident", (admit,), (row,)))
        self.worker.hear(msg.StepDone)

    def _ask(self) -> None:
        self._steps += 1
        self.worker.say(msg.Step(self._steps, "resident", (), (msg.Row(1, self._run, 1, True),)))
        self._run += 1

    def gaps(self, count: int) -> list[Instant]:
        """Gaps between tokens, two steps on their way as in service."""
        self._ask()
        self._ask()
        self.worker.hear(msg.StepDone)
        found, last = [], self.worker.now()
        for _ in range(count):
            self._ask()
            self.worker.hear(msg.StepDone)
            now = self.worker.now()
            found.append(now.since(last))
            last = now
        self.worker.hear(msg.StepDone)
        return found

    def gaps_during_swap(self) -> tuple[list[Instant], Instant]:
        """The same while the other service comes in, and how long that took."""
        self._ask()
        self._ask()
        self.worker.hear(msg.StepDone)
        found = []
        begun = last = self.worker.now()
        self.worker.say(self._copy_in("swapped"))
        self._ask()
        left: set[type] = {msg.CopyDone, msg.JobProgress}
        while left:
            said = self.worker.hear(msg.StepDone, *left)
            now = self.worker.now()
            if isinstance(said, msg.StepDone):
                found.append(now.since(last))
                last = now
                self._ask()
            else:
                left.remove(type(said))
        took = now.since(begun)
        for _ in range(2):  # the gap in which the copy ended, and the step on its way
            self.worker.hear(msg.StepDone)
            now = self.worker.now()
            found.append(now.since(last))
            last = now
        return found, took


class PlainCopy:
    """As many bytes between pages that are there."""

    def __init__(self, bytes_: int) -> None:
        self._source, self._target = _pages(bytes_), _pages(bytes_)

    def __call__(self) -> Instant:
        begun = time.perf_counter(), time.process_time()
        self._target.copy_(self._source)
        return Instant(time.perf_counter() - begun[0], time.process_time() - begun[1])


def _pages(bytes_: int) -> torch.Tensor:
    memory = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def run(options: argparse.Namespace, cache: str) -> None:
    """Measure and print."""
    bench = Bench(options, cache)
    bytes_ = bench.shape.weights_bytes
    plain = PlainCopy(bytes_)
    bench.swap_in("resident")
    bench.start_decoding()
    bench.gaps(20)
    gaps, first = bench.gaps_during_swap()
    bench.drop()
    print(
        f"{bytes_ >> 20} MiB of weights; first swap-in (image mapped, module tree imported and built):"
        f" {first.clock:.2f} s, longest gap of the resident {max(gap.clock for gap in gaps) * 1e3:.0f} ms"
    )
    plain()
    found: dict[str, list[Instant]] = {"plain copy": [], "swap-in": [], "KV to host": [], "KV from host": []}
    serving = []
    for _ in range(options.turns):
        found["plain copy"].append(plain())
        served, arrived = bench.swap_in()
        serving.append(served.clock)
        found["swap-in"].append(arrived)
        bench.drop()
        found["KV to host"].append(bench.move_kv(msg.SaveBlocks))
        found["KV from host"].append(bench.move_kv(msg.RestoreBlocks))
    _print_rates(found, {"KV to host": bench.kv_bytes, "KV from host": bench.kv_bytes}, bytes_)
    print(f"a service that comes back can serve after {statistics.median(serving) * 1e3:.1f} ms (median)")
    alone, beside, swaps = list[Instant](), list[Instant](), list[Instant]()
    while len(beside) < options.gaps:
        alone += bench.gaps(options.gaps // 10)
        gaps, took = bench.gaps_during_swap()
        bench.drop()
        beside += gaps
        swaps.append(took)
    took_ms = statistics.median(s.clock for s in swaps) * 1e3
    print(f"{len(swaps)} swaps beside a resident that decodes, {took_ms:.0f} ms each (median, by the clock)")
    for name, kind in (("by the clock", 0), ("CPU time", 1)):
        before, during = ([gap[kind] for gap in gaps] for gaps in (alone, beside))
        text = f"gaps, {name:12}"
        for label, share in (("P50", 0.5), ("P90", 0.9), ("P99", 0.99), ("most", 1.0)):
            one, two = _quantile(before, share), _quantile(during, share)
            text += f"   {label} {one * 1e3:6.1f} -> {two * 1e3:6.1f} ms ({two / one:4.2f})"
        print(text)


def _print_rates(found: dict[str, list[Instant]], sizes: dict[str, int], bytes_: int) -> None:
    print(f"{'':14}{'GB/s (median)':>15} {'of plain':>9} {'best':>7}   {'GB per CPU s':>13} {'of plain':>9}")
    base = [statistics.median(t[kind] for t in found["plain copy"]) / bytes_ for kind in (0, 1)]
    for name, times in found.items():
        size = sizes.get(name, bytes_)
        clock, cpu = (statistics.median(t[kind] for t in times) / size for kind in (0, 1))
        best = min(t.clock for t in times) / size
        print(
            f"{name:14}{1e-9 / clock:15.2f} {base[0] / clock:9.2f} {1e-9 / best:7.2f}"
            f"   {1e-9 / cpu:13.2f} {base[1] / cpu:9.2f}"
        )


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="swapping through the real processes")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--gaps", type=int, default=200, help="gaps to see during swaps")
    parser.add_argument("--block-kib", type=int, default=2048)
    parser.add_argument("--kv-mib", type=int, default=256, help="MiB of KV that go to the host and back")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as cache:
        run(options, cache)


if __name__ == "__main__":
    main()
