"""How long things take in virtual time.

Owns the two sets of costs: fixed ones for tests of the core, and rooflines of real devices (`core.cost`)
for experiments. Must not know requests or policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from seallmd.core.cost import Roofline, Work
from seallmd.core.profile import ServiceProfile
from seallmd.core.shapes import ModelShape


class Timing(Protocol):
    """What a world asks. All answers in seconds."""

    @property
    def probe(self) -> float:
        """To examine one model."""

    @property
    def start(self) -> float:
        """To start a process."""

    def step(self, device: int, service: str, tokens: int, context: int, rows: int, ranks: int = 1) -> float:
        """One step: tokens of all rows, tokens of KV that they read together, rows that draw a token.

        ranks: devices that share the work.
        """

    def contention(self, device: int) -> float:
        """By how much steps are slower, as a share, for each other device that runs one too."""

    def copy(self, device: int, bytes_: int) -> float:
        """Weights from the host to a device."""

    def reads_host(self, device: int) -> bool:
        """Whether weights serve before all of them have been copied."""

    def read(self, bytes_: int) -> float:
        """Weights from disk into a host image."""


@dataclass(frozen=True)
class Costs:
    """The same costs for every device and service, in seconds; copy_byte and read_byte: per byte.

    early: what `reads_host` answers.
    """

    step_fixed: float = 0.01
    step_token: float = 0.0002
    copy_byte: float = 1e-10
    read_byte: float = 5e-10
    probe: float = 0.2
    start: float = 2.0
    early: bool = False

    def step(
        self, _device: int, _service: str, tokens: int, _context: int, _rows: int, _ranks: int = 1
    ) -> float:
        """A fixed part and a part per token."""
        return self.step_fixed + self.step_token * tokens

    def contention(self, _device: int) -> float:
        """None."""
        return 0.0

    def copy(self, _device: int, bytes_: int) -> float:
        """Proportional to the bytes."""
        return bytes_ * self.copy_byte

    def reads_host(self, _device: int) -> bool:
        """As given."""
        return self.early

    def read(self, bytes_: int) -> float:
        """Proportional to the bytes."""
        return bytes_ * self.read_byte


class RooflineTiming:
    """Each device by its own roofline, each service by its own shape, or by costs that were learnt of it.

    profiles: of services whose steps were measured, on devices of one kind; these count instead of rooflines.
    """

    probe = 0.2
    start = 2.0

    def __init__(
        self,
        devices: Sequence[Roofline],
        shapes: Mapping[str, ModelShape],
        read_bytes_per_second: float = 2e9,
        profiles: Mapping[str, ServiceProfile] = MappingProxyType({}),
    ) -> None:
        self._devices = devices
        self._learnt = {name: profile.costs for name, profile in profiles.items()}
        self._shapes = shapes
        self._work: dict[tuple[str, int], Work] = {}
        self._read_bytes_per_second = read_bytes_per_second

    def step(self, device: int, service: str, tokens: int, context: int, rows: int, ranks: int = 1) -> float:
        """What was learnt, or what the roofline says."""
        if (costs := self._learnt.get(service)) is not None:
            return costs.predict(tokens, context, rows)
        work = self._work.get((service, ranks))
        if work is None:
            work = self._work[service, ranks] = Work.of(self._shapes[service], ranks)
        return self._devices[device].step(work, tokens, context, rows)

    def contention(self, device: int) -> float:
        """As the device's kind."""
        return self._devices[device].contention

    def copy(self, device: int, bytes_: int) -> float:
        """At the rate of the device's link."""
        return self._devices[device].copy(bytes_)

    def reads_host(self, device: int) -> bool:
        """As CPUs do."""
        return self._devices[device].reads_host

    def read(self, bytes_: int) -> float:
        """At the rate of the disk."""
        return bytes_ / self._read_bytes_per_second


def isolated_seconds(roofline: Roofline, work: Work, prompt: int, output: int) -> float:
    """T_iso: a request alone on the device, its prompt in one step, then one step per further token.

    prompt, output: tokens. Decode steps are taken at the mean context: a step of one token is linear in it.
    """
    decode = roofline.step(work, 1, prompt + output // 2, 1)
    return roofline.step(work, prompt, prompt, 1) + (output - 1) * decode
