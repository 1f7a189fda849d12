"""Unix sockets in the file system: taking a path over from a daemon that is dead.

Owns that decision alone. Must not know what is served on the socket.
"""

from __future__ import annotations

import socket
import stat
from pathlib import Path

from seallmd.errors import ControlError


def claim_socket_path(path: Path) -> None:
    """Make way for a new socket: a stale one is removed. Raises ControlError if it is alive or no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    # connect() refuses a plain file with the same error as a dead socket: it must not be removed.
    if not stat.S_ISSOCK(mode):
        raise ControlError(f"{path} is in the way: it is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a daemon that is too busy to accept is alive
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise ControlError(f"{path} cannot be used: {error.strerror or error}") from error
    raise ControlError(f"another seallmd answers on {path}")
