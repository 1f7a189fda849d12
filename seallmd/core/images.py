"""Host images: which services' weights lie in host memory, ready to be copied to a device.

Owns when one is built and which go when host memory runs short. Must not know devices' memory (`residency`).
"""

from __future__ import annotations

from seallmd.core.events import ToHostProcess
from seallmd.core.messages import BuildImage, DropImage
from seallmd.core.service import Image, Service, Stage
from seallmd.core.state import NodeState


class Images:
    """Builds and drops host images on the shared state."""

    def __init__(self, state: NodeState) -> None:
        self._state = state

    def want(self, service: Service) -> None:
        """Have the image built, unless that is under way."""
        if service.image is Image.BUILDING or not self._state.host_up:
            return
        assert service.shape is not None
        self._trim(service.image_bytes)
        service.image, service.image_ranks = Image.BUILDING, service.ranks
        shape = service.shape
        message = BuildImage(service.name, service.directory, shape.dtype, shape.context, service.ranks)
        self._state.actions.append(ToHostProcess(message))

    def built(self, service: Service, path: str) -> None:
        """It is there; one for another number of ranks than the service has by now is of no use."""
        service.image, service.image_path, service.progress = Image.READY, path, None
        service.image_used = self._state.now
        if service.image_ranks != service.ranks:
            self.drop(service)

    def drop(self, service: Service) -> None:
        """Give its memory back."""
        service.image = Image.NONE
        self._state.actions.append(ToHostProcess(DropImage(service.name)))
        for device in self._state.devices.values():
            if device.arena is not None:
                self._state.send(device.index, DropImage(service.name))

    def _trim(self, coming_bytes: int) -> None:
        """Drop the images that were used longest ago until `coming_bytes` more are within the limit."""
        held = [s for s in self._state.services.values() if s.image is not Image.NONE]
        total = coming_bytes + sum(service.image_bytes for service in held)
        for service in sorted(held, key=lambda s: s.image_used):
            if total <= self._state.settings.host_bytes:
                return
            copying = any(r.stage is Stage.COPYING for r in service.replicas)
            if service.image is Image.READY and not copying:
                total -= service.image_bytes
                self.drop(service)
