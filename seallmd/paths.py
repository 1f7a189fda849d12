"""Where things lie: the control socket, at which the daemon and its command line meet, and the state.

Owns the default paths and the check that its directory cannot be another user's. Must not know what is said
over the socket. Imports the standard library alone: `seallmctl` has to start fast.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from seallmd.errors import ConfigError, ControlError

SYSTEM_CONTROL_SOCKET = Path("/run/seallmd/control.sock")


def default_control_socket() -> Path:
    """The socket of a daemon that this user starts: /run for root, else the user's own runtime directory."""
    if os.getuid() == 0:
        return SYSTEM_CONTROL_SOCKET
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime) / "seallmd" / "control.sock"
    return Path("/tmp") / f"seallmd-{os.getuid()}" / "control.sock"


def default_state_directory() -> Path:
    """Where what must outlive the daemon is kept: as systemd says, else the user's own place for that.

    Raises ConfigError for a user without a home directory.
    """
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if os.path.isabs(given):
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if os.path.isabs(home) else _home("[batches] directory") / ".local/state") / "seallmd"


def default_cache_directory() -> Path:
    """Where downloaded and converted models are kept. Raises as `default_state_directory`."""
    return _home("[devices] cache") / ".cache" / "seallmd"


def _home(instead: str) -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a container's user, say, that nobody has heard of
        raise ConfigError(f"this user has no home directory: set {instead}") from None


def find_control_socket() -> Path:
    """The socket that this user's command means: the user's own daemon if it is there, or the system's."""
    own = default_control_socket()
    try:
        if not own.exists() and SYSTEM_CONTROL_SOCKET.exists():
            return SYSTEM_CONTROL_SOCKET
    except PermissionError:
        pass  # a directory that we may not search: connecting will say so in the caller's terms
    return own


def check_owner(directory: Path) -> None:
    """Refuse a directory that another user could have put there (in /tmp anyone can). Raises ControlError."""
    entry = directory.lstat()
    if not stat.S_ISDIR(entry.st_mode):
        raise ControlError(f"{directory} is not a directory")
    if entry.st_uid not in (0, os.getuid()):
        raise ControlError(f"{directory} belongs to another user")


def make_socket_directory(directory: Path) -> None:
    """Create the directory for this user alone, or take the one that is there. Raises ControlError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(directory)
    except OSError as error:
        raise ControlError(f"{directory} cannot be used: {error.strerror}") from error
