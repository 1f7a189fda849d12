"""seallmctl doctor: looks for what keeps seallmd from running, and says how to cure it.

Owns the checks. Needs no daemon, and changes nothing. Must not know terminals. Whether a configuration is
right is asked of `seallmd --check`: it is the one that reads it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seallmd.ctl import client, http
from seallmd.errors import ControlError, Unreachable

CHECK_SECONDS = 60.0
CONFIGURATIONS = (Path("seallmd.toml"), Path("/etc/seallmd/seallmd.toml"))
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*$")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_WEIGHTS = ("*.safetensors", "*.gguf")

Table = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What one check found. level: ok, warn (works, but not as meant) or bad (does not work)."""

    check: str
    level: str
    text: str
    remedy: str = ""


def examine(control: Path, configuration: Path | None) -> list[Finding]:
    """All checks, in the order in which one would go about it. configuration: None = look for it."""
    found, config, base = _configuration(configuration)
    report, daemon = _daemon(control)
    findings = [found, daemon]
    findings += _devices(report, config, _gpus())
    if report is None:
        findings += _memory(config, _available_bytes()) + _ports(config)
    else:
        findings += _http(report)
    return findings + _models(config, base)


# ------------------------------------------------------------------------------------- configuration


def _configuration(given: Path | None) -> tuple[Finding, Table, Path]:
    """The finding, the file as plain tables (empty when it cannot be read) and its directory."""
    path = given or next((path for path in CONFIGURATIONS if path.exists()), None)
    if path is None:
        text = f"none found ({' and '.join(str(path) for path in CONFIGURATIONS)})"
        remedy = "write one after seallmd.toml of the repository, or name it with --config"
        return Finding("configuration", "warn", text, remedy), {}, Path()
    wrong = _what_is_wrong(path)
    if wrong:
        return Finding("configuration", "bad", wrong, f"correct {path}"), _tables(path), path.parent
    return Finding("configuration", "ok", str(path)), _tables(path), path.parent


def _what_is_wrong(path: Path) -> str:
    command = [sys.executable, "-m", "seallmd", "--check", "--config", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "the check did not end in time"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1].removeprefix("seallmd: ") if lines else f"the check exited with {done.returncode}"


def _tables(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _table(config: Table, name: str) -> Table:
    table = config.get(name)
    return table if isinstance(table, dict) else {}


def _services(config: Table) -> list[Table]:
    services = config.get("service")
    return [entry for entry in services if isinstance(entry, dict)] if isinstance(services, list) else []


# -------------------------------------------------------------------------------------- a running daemon


def _daemon(control: Path) -> tuple[client.Reply | None, Finding]:
    try:
        report = client.status(control)
        about = report["daemon"]
    except Unreachable as error:
        remedy = "start it (seallmd --config FILE), or name its socket with --socket"
        return None, Finding("daemon", "warn", str(error), remedy)
    except ControlError as error:
        return None, Finding("daemon", "bad", str(error), "ask as the daemon's user, its group or root")
    except KeyError:
        remedy = "restart the daemon: it is older than this command"
        return None, Finding("daemon", "bad", "the daemon is of another version", remedy)
    text = f"seallmd {about['version']} (pid {about['pid']}) answers on {control}"
    return report, Finding("daemon", "ok", text)


def _http(report: client.Reply) -> list[Finding]:
    findings = []
    for address in report["daemon"]["http"]:
        try:
            status, body = http.get(address, "/health")
        except Unreachable as error:
            remedy = "the log says why; a firewall or another network namespace may be in between"
            findings.append(Finding("http", "bad", str(error), remedy))
            continue
        text = f"{address} answers" if status == 200 else f"{address}: {_message(body)}"
        remedy = "" if status == 200 else "seallmctl status tells which device is not up, the log why"
        findings.append(Finding("http", "bad" if remedy else "ok", text, remedy))
    nowhere = Finding("http", "warn", "HTTP is served nowhere", "set host or socket of [http]")
    return findings or [nowhere]


def _message(body: bytes) -> str:
    return body.decode(errors="replace")[:200]


# ------------------------------------------------------------------------------------------- devices


def _gpus() -> int | None:
    """GPUs that the NVIDIA driver shows; None without a driver."""
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return None


def _devices(report: client.Reply | None, config: Table, gpus: int | None) -> list[Finding]:
    findings = [_gpu_finding(str(_table(config, "devices").get("kind", "auto")), gpus)]
    for device in report["devices"] if report else ():
        text = f"device {device['device']} ({device['label']}) is {device['state']}"
        level = {"up": "ok", "lost": "bad"}.get(device["state"], "warn")
        remedy = "" if level == "ok" else "it is started again by itself; the log says why it went"
        findings.append(Finding("devices", level, text, remedy))
    return findings


def _gpu_finding(kind: str, gpus: int | None) -> Finding:
    if kind == "cpu":
        return Finding("devices", "ok", "CPU workers, as configured")
    if not gpus:
        if kind == "cuda":
            remedy = 'install the NVIDIA driver, or set [devices] kind = "auto"'
            return Finding("devices", "bad", "GPUs are configured, but the driver shows none", remedy)
        return Finding("devices", "ok", "no NVIDIA GPU: workers run on the CPU")
    if not Path("/dev/nvidia-uvm").exists():
        remedy = "load the module as root: nvidia-modprobe -u -c0"
        return Finding("devices", "bad", "/dev/nvidia-uvm is missing: CUDA cannot start", remedy)
    return Finding("devices", "ok", f"{gpus} NVIDIA GPU{'s' if gpus > 1 else ''}")


# ------------------------------------------------------------------------------------ memory and ports


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _memory(config: Table, available: int) -> list[Finding]:
    """What is configured in so many words against what is free; defaults are fitted to the machine anyway."""
    devices = _table(config, "devices")
    workers = devices.get("cpu_workers")
    arenas = _bytes(devices.get("memory")) * (workers if isinstance(workers, int) else 2)
    wanted = _bytes(devices.get("host_memory")) + (0 if devices.get("kind") == "cuda" else arenas)
    text = f"{available / (1 << 30):.1f} GiB available, {wanted / (1 << 30):.1f} GiB configured"
    if wanted <= available:
        return [Finding("memory", "ok", text)]
    return [Finding("memory", "warn", text, "lower [devices] memory or host_memory, or free some")]


def _bytes(size: object) -> int:
    match = _SIZE.match(size) if isinstance(size, str) else None
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def _ports(config: Table) -> list[Finding]:
    table = _table(config, "http")
    host, port = str(table.get("host", "127.0.0.1")), table.get("port", 8000)
    if not host or not isinstance(port, int) or not 0 < port <= 65535:
        return []
    where = f"{host}:{port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        text = f"{where} is in use by another program" if used else f"{where}: {error.strerror or error}"
        return [Finding("port", "bad", text, "choose another [http] host or port")]
    except UnicodeError:
        return [Finding("port", "bad", f"{host!r} is no name of a host", "choose another [http] host")]
    return [Finding("port", "ok", f"{where} is free")]


# -------------------------------------------------------------------------------------------- models


def _models(config: Table, base: Path) -> list[Finding]:
    findings = []
    for service in _services(config):
        name, model = str(service.get("name", "?")), str(service.get("model", ""))
        try:
            findings.append(_model(name, model, base))
        except (OSError, RuntimeError) as error:  # a directory that may not be searched; ~ of nobody
            text = f"{name}: {model[:100]} cannot be looked at: {getattr(error, 'strerror', None) or error}"
            remedy = "correct the path, or give this user the right to read it"
            findings.append(Finding("model", "bad", text, remedy))
    return findings


def _model(name: str, model: str, base: Path) -> Finding:
    """The same reading of `model` as the daemon's: a path where it can be one, else a Hugging Face id."""
    path = base / Path(model).expanduser()
    if path.is_file():
        return Finding("model", *_readable(name, path))
    if not path.is_dir():
        relative = model.startswith((".", "~", "/")) or model.endswith(".gguf") or path.parent.is_dir()
        if relative and "/" in model:
            return Finding("model", "bad", f"{name}: {model} is not there", "fetch it, or correct the path")
        text = f"{name}: {model} is fetched from Hugging Face when it is first needed"
        return Finding("model", "warn", text, "see that this machine may reach it, or name a directory")
    with contextlib.suppress(OSError):
        weights = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
        if not weights:
            remedy = "it needs config.json, tokenizer.json and *.safetensors, or a .gguf file"
            return Finding("model", "bad", f"{name}: {model} has no weights", remedy)
        unreadable = [file for file in weights if not os.access(file, os.R_OK)]
        return Finding("model", *_readable(name, unreadable[0] if unreadable else path))
    return Finding("model", *_readable(name, path))


def _readable(name: str, path: Path) -> tuple[str, str, str]:
    if os.access(path, os.R_OK):
        return "ok", f"{name}: {path}", ""
    return "bad", f"{name}: {path} cannot be read by this user", "give this user the right to read it"
