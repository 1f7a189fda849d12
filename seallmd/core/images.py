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
        """Have the image built, unless that is under way, failed just now for a replica more, or has no room.

        Those who want it ask again whenever something happens.
        """
        paused = service.replicas and self._state.now < service.image_retry_at
        if service.image is Image.BUILDING or not self._state.host_up or paused:
            return
        assert service.shape is not None
        if not self._make_room(service.image_bytes):
            return
        service.image, service.image_ranks = Image.BUILDING, service.ranks
        shape = service.shape
        message = BuildImage(service.name, service.directory, shape.dtype, shape.context, service.ranks)
        self._state.actions.append(ToHostProcess(message))

    def built(self, service: Service, path: str) -> None:
        """It is there; one for another number of ranks than the service has by now is of no use."""
        service.image, service.image_path, service.progress = Image.READY, path, None
        service.image_used, service.image_retry_at = self._state.now, 0.0
        if service.image_ranks != service.ranks:
            self.drop(service)

    def drop(self, service: Service) -> None:
        """Give its memory back."""
        service.image = Image.NONE
        self._state.actions.append(ToHostProcess(DropImage(service.name)))
        for device in self._state.devices.values():
            if device.arena is not None:
                self._state.send(device.index, DropImage(service.name))

    def _make_room(self, coming_bytes: int) -> bool:
        """Drop the images that were used longest ago until `coming_bytes` more are within the limit.

        False, and nothing is dropped, where that would not do because of images in use: these become
        droppable. Where nothing is in use, the limit is less than this one image, which is then built.
        """
        limit = self._state.settings.host_bytes
        held = [s for s in self._state.services.values() if s.image is not Image.NONE]
        idle = sorted((s for s in held if not _is_used(s)), key=lambda s: s.image_used)
        total = coming_bytes + sum(service.image_bytes for service in held)
        if len(idle) < len(held) and total - sum(service.image_bytes for service in idle) > limit:
            return False
        for service in idle:
            if total <= limit:
                break
            total -= service.image_bytes
            self.drop(service)
        return True


def _is_used(service: Service) -> bool:
    """Whether an image is being built, copied, or about to be: dropping it would have it built again."""
    absent = bool(service.waiting or service.load_tickets) and not service.replicas
    copying = any(replica.stage is Stage.COPYING for replica in service.replicas)
    return service.image is Image.BUILDING or copying or absent
