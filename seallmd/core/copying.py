"""What a worker is told to copy: from the host image into the blocks that a replica was given.

Owns that arithmetic. Must not decide anything.
"""

from __future__ import annotations

from seallmd.core.messages import CopyIn, Extent, Group
from seallmd.core.service import Replica, Service


def copy_in(service: Service, replica: Replica, rank: int, block_bytes: int) -> CopyIn:
    """The message for the device of one rank; the image holds every rank's part, one after the other."""
    assert service.shape is not None
    size = len(replica.devices)
    image_at, extents = rank * sum(service.segments), list[Extent]()
    for start, bytes_ in zip(replica.starts[rank], service.segments, strict=True):
        extents.append(Extent(image_at, bytes_, start * block_bytes))
        image_at += bytes_
    return CopyIn(
        service.name,
        service.directory,
        service.shape.dtype,
        service.shape.context,
        service.image_path,
        tuple(extents),
        replica.copy,
        Group(replica.copy, rank, size) if size > 1 else None,
    )
