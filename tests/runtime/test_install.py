"""`make install` without effects on the machine, and systemd's own opinion of the units where it is there."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from seallmd import config

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("seallmd.service", "seallmd.socket", "seallmd-control.socket")
HIGHEST_EXPOSURE = 25  # of 100, in tenths of what `systemd-analyze security` prints

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd is not installed, nor could `make test` install it",
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever comes of it."""
    return subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def make(target: str, destination: Path, prefix: Path | str) -> None:
    """Run make; fails with what it said."""
    done = run("make", "-s", target, f"DESTDIR={destination}", f"PREFIX={prefix}")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The installed units, for a prefix where something executable lies."""
    python = tmp_path / "opt/lib/seallmd/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    make("install-files", tmp_path / "root", tmp_path / "opt")
    return tmp_path / "root" / (tmp_path / "opt/lib/systemd/system").relative_to("/")


def test_install_and_uninstall(tmp_path: Path) -> None:
    """Everything lies below DESTDIR, names PREFIX, and goes again; an operator's configuration stays."""
    make("install-files", tmp_path, "/opt/seallmd")
    unit = (tmp_path / "opt/seallmd/lib/systemd/system/seallmd.service").read_text()
    assert "ExecStart=/opt/seallmd/lib/seallmd/bin/python -m seallmd " in unit
    assert "/usr/local" not in unit
    command = tmp_path / "opt/seallmd/bin/seallmctl"
    assert (
        command.read_text()
        == '#!/bin/sh\nexec /opt/seallmd/lib/seallmd/bin/python -m seallmd.ctl.main "$@"\n'
    )
    assert command.stat().st_mode & stat.S_IXOTH
    settings = tmp_path / "etc/seallmd/seallmd.toml"
    assert stat.S_IMODE(settings.stat().st_mode) == 0o640
    assert stat.S_IMODE(settings.parent.stat().st_mode) == 0o750
    settings.write_text("# mine\n")
    make("install-files", tmp_path, "/opt/seallmd")
    make("uninstall", tmp_path, "/opt/seallmd")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [settings]
    assert settings.read_text() == "# mine\n"


def test_the_installed_configuration_is_right() -> None:
    """Or the first start would fail; and the control socket is where the unit opens it."""
    found = config.load(ROOT / "systemd/seallmd.toml")
    assert f"ListenStream={found.control.socket}" in (ROOT / "systemd/seallmd-control.socket").read_text()
    assert f"SocketGroup={found.control.group}" in (ROOT / "systemd/seallmd-control.socket").read_text()


@needs_systemd
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to another user")
def test_the_user_and_its_directories(tmp_path: Path) -> None:
    """What `make install` has systemd make, made in a root of the test's own: whose it is, and for whom."""
    make("install-files", tmp_path, "/usr/local")
    for tool, *more in (("systemd-sysusers",), ("systemd-tmpfiles", "--create")):
        done = run(tool, *more, f"--root={tmp_path}", "seallmd.conf")
        assert done.returncode == 0, done.stderr
    name, _, uid, gid, _, home, shell = (tmp_path / "etc/passwd").read_text().strip().split(":")
    assert (name, home, shell) == ("seallmd", "/var/lib/seallmd", "/usr/sbin/nologin")
    for directory, mode in (
        ("run/seallmd", 0o755),
        ("var/lib/seallmd", 0o750),
        ("var/lib/seallmd/models", 0o750),
    ):
        found = (tmp_path / directory).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, int(uid), int(gid)), (
            directory
        )


@needs_systemd
def test_systemd_finds_nothing_wrong(units: Path) -> None:
    """Misspelt settings are ignored at start, with a warning that nobody reads."""
    done = run("systemd-analyze", "verify", *(units / name for name in UNITS))
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_the_service_is_locked_in(units: Path) -> None:
    """A choice that is dropped from the unit shows here."""
    done = run(
        *("systemd-analyze", "security", "--offline=true", f"--threshold={HIGHEST_EXPOSURE}"),
        units / "seallmd.service",
    )
    assert done.returncode == 0, done.stdout
