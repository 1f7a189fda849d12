"""A systemd of its own as process 1 of new namespaces, over a copy of this system's files that goes again.

Owns how it is booted, how commands are run in it, and its end. Needs root, Linux with overlayfs and cgroup
v2, systemd installed. The network is this system's own, so that packages can be fetched; everything that it
writes goes to memory. Must not know what is installed there.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

BOOT_SECONDS = 60.0
TREE = "/mnt"  # where this checkout is seen inside, read-only
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KEPT = ("PIP_", "HTTP", "http", "NO_PROXY", "no_proxy", "SSL_")  # for fetching packages

# Nothing of these concerns a test, and some would change the kernel that is shared.
_MASKED = (
    "getty.target systemd-logind.service systemd-udevd.service systemd-udev-trigger.service "
    "systemd-sysctl.service systemd-modules-load.service systemd-networkd.service systemd-binfmt.service "
    "systemd-random-seed.service systemd-remount-fs.service dev-hugepages.mount dev-mqueue.mount "
    "sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount "
    "proc-sys-fs-binfmt_misc.automount"
)

_BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs {scratch}
mkdir {scratch}/upper {scratch}/work {scratch}/root
mount -t overlay overlay -o lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work {scratch}/root
cd {scratch}/root
mount -o bind,ro {tree} mnt
: > etc/fstab
rm -rf etc/systemd/system/*.wants
for unit in {masked}; do ln -sf /dev/null etc/systemd/system/$unit; done
mount -t proc proc proc
mount -o bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --rbind /dev dev
mkdir -p old
pivot_root . old
umount -l /old
export container=test
exec /lib/systemd/systemd --system --unit=multi-user.target
"""


class Failed(Exception):
    """Something did not go as it should."""


class Machine:
    """A booted system; a context manager, which ends it. scratch: an empty directory to mount things on."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        boot = _BOOT.format(tree=tree, scratch=scratch, masked=_MASKED)
        namespaces = ("--mount", "--uts", "--ipc", "--cgroup")
        self._group = _own_cgroup()
        self._outer = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", *namespaces, "bash", "-c", boot],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: (self._group / "cgroup.procs").write_text(str(os.getpid())),
        )

    def __enter__(self) -> Machine:
        try:
            self.until(
                lambda: self.systemctl("is-system-running").strip() in ("running", "degraded"), "the boot"
            )
        except BaseException:  # nobody else ends it: there is no `with` yet
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._outer.poll() is None:
            os.killpg(self._outer.pid, signal.SIGKILL)  # and with process 1 goes all that it started
            self._outer.wait()

    def run(self, command: str, *, user: str = "root", check: bool = True, seconds: float = 600) -> str:
        """What a command says, run by a shell inside. Raises Failed when it fails and `check` is set."""
        inside = f"cd / && exec su -s /bin/bash {user} -c {shlex.quote(command)}"
        environment = {k: v for k, v in os.environ.items() if k.startswith(_KEPT)}
        environment |= {"PATH": _PATH, "LANG": "C.UTF-8"}
        enter = ["nsenter", "-t", str(self._first()), "-m", "-p", "-u", "-i", "-C", "-r"]
        done = subprocess.run(
            [*enter, "bash", "-c", inside],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and done.returncode:
            raise Failed(f"{command!r} ended with {done.returncode}: {done.stdout[-2000:]}")
        return done.stdout

    def systemctl(self, *arguments: str) -> str:
        """What systemctl says, whatever its exit code."""
        try:
            return self.run(f"systemctl --no-pager {' '.join(arguments)}", check=False)
        except Failed:
            return ""

    def until(self, condition: Callable[[], object], what: str, seconds: float = BOOT_SECONDS) -> float:
        """Wait until `condition()` is true; how long it took. Raises Failed when it does not come."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() > began + seconds:
                raise Failed(f"{what} did not come within {seconds:.0f} s")
            if self._outer.poll() is not None:
                raise Failed("the system has ended: is this root, with namespaces, overlayfs and cgroup v2?")
            time.sleep(0.2)  # another system's processes: there is nothing here that could be waited on
        return time.monotonic() - began

    def _first(self) -> int:
        """Process 1 of the system, by its number out here."""
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        if not children:
            raise Failed("not booted")
        return int(children[0])


def _own_cgroup() -> Path:
    """A group of cgroup v2 for all that will run there."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            group = Path(place) / "seallmd-systemd"
            group.mkdir(exist_ok=True)
            return group
    raise Failed("cgroup v2 is not mounted")
