"""Installs the service under a real systemd and walks through its life, as an operator would.

    sudo .venv/bin/python -m tests.systemd

Owns what is looked at, and one line of result for each; ends with 1 at the first that is wrong. Needs what
`machine` needs, the models of `make models`, port 8000, and 3 GiB of memory. A few minutes.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx

from tests.systemd.machine import TREE, Failed, Machine

ROOT = Path(__file__).parents[2]
PORT = 8000
URL = f"http://127.0.0.1:{PORT}"
CONFIG = "/etc/seallmd/seallmd.toml"
SERVICES = """
[devices]
cache = "/var/cache/seallmd"
memory = "1280 MiB"
threads = 1

[control]
socket = "/run/seallmd/control.sock"
group = "seallmd"

[[service]]
name = "smol"
model = "/var/lib/seallmd/models/smollm2-135m-instruct"
context = 2048
preload = true

[[service]]
name = "gemma"
model = "/var/lib/seallmd/models/gemma-3-270m"
context = 2048
"""


def expect(condition: object, what: str) -> None:
    """Raise Failed unless it is true."""
    if not condition:
        raise Failed(what)


def complete(model: str, tokens: int = 3, **more: object) -> str:
    """The text of a completion."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0, **more}
    answer = httpx.post(f"{URL}/v1/completions", json=body, timeout=120)
    expect(answer.status_code == 200, f"{answer.status_code}: {answer.text}")
    return str(answer.json()["choices"][0]["text"])


def write(machine: Machine, text: str) -> None:
    """The configuration."""
    machine.run(f"cat > {CONFIG} <<'END'\n{text}\nEND")


def main_pid(machine: Machine) -> int:
    """Of the daemon; 0 when there is none."""
    return int(machine.systemctl("show", "seallmd", "-p", "MainPID", "--value") or 0)


def log(machine: Machine) -> str:
    """What the service has said."""
    return machine.run("journalctl --no-pager -o cat -u seallmd", check=False)


def processes(machine: Machine) -> list[str]:
    """Numbers of the service's processes."""
    return machine.run("pgrep -u seallmd", check=False).split()


# ------------------------------------------------------------------------------------- what is looked at


def check_install(machine: Machine) -> str:
    """`make install` makes the program, the user and the units."""
    machine.run("git config --global --add safe.directory '*'")
    machine.run(f"git clone -q --no-local {TREE} /root/seallmd")
    machine.run("make -C /root/seallmd install", seconds=1800)
    machine.run(f"cp -r {TREE}/models /var/lib/seallmd/")
    write(machine, SERVICES)
    return machine.run(f"seallmd --check --config {CONFIG}")


def check_start(machine: Machine) -> str:
    """It is active as soon as its sockets accept, and systemd is told how many services are resident."""
    machine.run("systemctl enable --now seallmd.socket seallmd-control.socket seallmd.service")
    status = "1 of 2 services resident"
    seconds = machine.until(lambda: status in machine.systemctl("status", "seallmd"), status)
    return f"the first model was there {seconds:.1f} s later"


def check_requests(machine: Machine) -> str:
    """Both models answer, and the doctor finds nothing."""
    expect(complete("smol") and complete("gemma"), "an empty answer")
    return machine.run("seallmctl doctor").splitlines()[1]


def check_rights(machine: Machine) -> str:
    """seallmctl is for root and for the group."""
    machine.run("useradd -m somebody")
    said = machine.run("seallmctl list", user="somebody", check=False)
    expect("permission denied" in said, f"somebody was told {said!r}")
    machine.run("usermod -aG seallmd somebody")
    machine.run("seallmctl list", user="somebody")
    return said


def check_reload(machine: Machine) -> str:
    """`systemctl reload` takes changes up; a wrong file changes nothing and is told of with its line."""
    write(machine, SERVICES.replace('name = "gemma"', 'name = "other"'))
    machine.run("systemctl reload seallmd && seallmctl show other")
    write(machine, f"{SERVICES}\nnonsense = 1")
    machine.run("systemctl reload seallmd && seallmctl show other")
    write(machine, SERVICES)
    machine.run("systemctl reload seallmd && seallmctl show gemma")
    return next(line for line in log(machine).splitlines() if "nonsense" in line)


def check_stop(machine: Machine) -> str:
    """`systemctl stop` lets a stream end, and nothing of the service is left."""
    seen: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = {"model": "smol", "prompt": "On and on", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                seen.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(60)
    began, there = time.monotonic(), len(seen)
    machine.run("systemctl stop seallmd.service")
    reader.join()
    expect("data: [DONE]" in seen, "the stream was cut off")
    expect("Result=success" in machine.systemctl("show", "seallmd", "-p", "Result"), "it did not end well")
    expect(not processes(machine), "processes are left")
    return f"after {time.monotonic() - began:.1f} s and {len(seen) - there} more lines"


def check_socket(_machine: Machine) -> str:
    """A request finds systemd's socket, and starts the daemon."""
    began = time.monotonic()
    expect(httpx.get(f"{URL}/v1/models", timeout=60).status_code == 200, "no list of models")
    seconds = time.monotonic() - began
    complete("smol")
    return f"answered after {seconds:.1f} s"


def check_killed_daemon(machine: Machine) -> str:
    """kill -9: systemd starts it again, who comes meanwhile waits, and no process of the old one stays."""
    before = processes(machine)
    machine.run(f"kill -9 {main_pid(machine)}")
    began = time.monotonic()
    complete("smol")
    expect(not set(before) & set(processes(machine)), "an orphan")
    return f"answered after {time.monotonic() - began:.1f} s"


def check_killed_worker(machine: Machine) -> str:
    """kill -9 of a worker: the daemon stays, and the device comes back."""
    daemon, device = main_pid(machine), json.loads(machine.run("seallmctl --json status"))["devices"][0]
    machine.run(f"kill -9 {device['pid']}")
    complete("smol")

    def is_back() -> bool:
        now = json.loads(machine.run("seallmctl --json status"))["devices"][0]
        return bool(now["state"] == "up" and now["pid"] != device["pid"])

    seconds = machine.until(is_back, "the device")
    expect(main_pid(machine) == daemon, "the daemon went too")
    return f"back after {seconds:.1f} s"


def check_sandbox(machine: Machine) -> str:
    """It can write nothing but its own, sees nobody's home, and has no rights."""
    pid = main_pid(machine)
    inside = f"nsenter -t {pid} -m -- "
    for path in ("/etc/x", "/usr/x", "/boot/x"):
        said = machine.run(f"{inside} touch {path}", check=False)
        expect("Read-only file system" in said or "No such file" in said, f"{path} could be written: {said}")
    homes = machine.run(f"{inside} ls -A /home /root").split()
    expect(set(homes) == {"/home:", "/root:"}, f"it sees homes: {homes}")
    machine.run(f"{inside} touch /var/cache/seallmd/x /var/lib/seallmd/x /run/seallmd/x")
    status = machine.run(f"grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/{pid}/status").split()
    expect(status[1::2] == ["0" * 16, "1", "2"], f"it has {status}")
    return machine.run("systemd-analyze security seallmd.service --no-pager | tail -1", check=False)


def check_watchdog(machine: Machine) -> str:
    """A daemon that stands still is ended and started again; who asks meanwhile is answered."""
    pid = main_pid(machine)
    machine.run(f"kill -STOP {pid}")
    seconds = machine.until(lambda: main_pid(machine) not in (0, pid), "another daemon", 120)
    complete("smol")
    return f"another one after {seconds:.0f} s"


def check_uninstall(machine: Machine) -> str:
    """`make uninstall` stops it and takes everything away but configuration, models, cache and user."""
    machine.run("make -C /root/seallmd uninstall")
    expect(not processes(machine), "processes are left")
    expect("seallmd" not in machine.systemctl("list-unit-files"), "units are left")
    return machine.run("ls -d /etc/seallmd/* /usr/local/bin/seallm* 2>&1", check=False)


CHECKS: tuple[Callable[[Machine], str], ...] = (
    check_install,
    check_start,
    check_requests,
    check_rights,
    check_reload,
    check_stop,
    check_socket,
    check_killed_daemon,
    check_killed_worker,
    check_sandbox,
    check_watchdog,
    check_uninstall,
)


def main() -> int:
    """The command."""
    try:
        socket.create_server(("127.0.0.1", PORT)).close()
    except OSError as error:
        print(f"port {PORT}: {error.strerror}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch, Machine(ROOT, Path(scratch)) as machine:
        print(machine.run("systemctl --version").splitlines()[0], flush=True)
        for check in CHECKS:
            try:
                said = check(machine).strip().splitlines()
            except (Failed, httpx.HTTPError) as error:
                print(f"FAILED {check.__doc__}\n       {error}\n{log(machine)[-3000:]}")
                return 1
            print(f"ok     {check.__doc__}\n       {said[-1] if said else ''}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
