"""The daemon: reads the configuration, wires the parts, runs until it is told to stop.

Owns the process: arguments, signals, sockets, what systemd is told, exit codes. The only module that knows
all the parts. Must not decide anything about services.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvloop

from seallmd import __version__
from seallmd.api.batch.operator import BatchOperator
from seallmd.api.batch.store import Store
from seallmd.api.control import ControlServer
from seallmd.api.keys import Key, Keyring, locate_keys, read_keys
from seallmd.api.metrics import Metrics
from seallmd.api.server import BATCHES, http_addresses, start_http, tls_context
from seallmd.config import Config, Size, load, reloaded
from seallmd.core.settings import NodeSettings
from seallmd.core.status import NodeStatus
from seallmd.errors import ConfigError, SeallmdError
from seallmd.paths import default_control_socket, default_state_directory
from seallmd.runtime import devices, profiles
from seallmd.runtime.engine import PROFILES, Engine
from seallmd.runtime.forkserver import ForkServer
from seallmd.runtime.journal import Journal
from seallmd.runtime.log import fields, set_up
from seallmd.runtime.notify import Notifier, take_listeners, take_notifier
from seallmd.runtime.pulse import LoopWatch

log = logging.getLogger("seallmd")

TELL_SECONDS = 5.0  # how often systemd's status line is renewed, unless the watchdog asks for more
EXTENSION_SECONDS = 30.0  # while requests end, from each telling: enough to end children and connections too
LISTENERS = ("http", "control")


def main(forkserver: ForkServer, arguments: list[str] | None = None) -> int:
    """The `seallmd` command. Exit codes: 0 stopped as told, 2 configuration or socket cannot be used.

    forkserver: may have been started already, so that it imports while we do.
    """
    options = _parse(arguments)
    faulthandler.enable()  # systemd's watchdog ends us with SIGABRT: then the log has every thread's stack
    try:
        config = _configure(options)
        if options.check:
            _read_keys(config)
            tls_context(config.http)
            print(f"{options.config}: {len(config.service)} services, nothing wrong")
            return 0
        set_up(config.log, os.environ)
        notifier = take_notifier(os.environ)
        listeners = take_listeners(os.environ, LISTENERS)
        uvloop.run(Daemon(config, options, notifier, listeners, forkserver).run())
    except SeallmdError as error:
        print(f"seallmd: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="seallmd", description="Serve many language models on one machine.")
    parser.add_argument("--config", type=Path, default=Path("seallmd.toml"), help="default: %(default)s")
    parser.add_argument("--host", help="listen on this address instead of the configured one")
    parser.add_argument("--port", type=_port, help="listen on this TCP port instead of the configured one")
    parser.add_argument("--control", metavar="PATH", help="control socket, instead of the configured one")
    parser.add_argument("--journal", metavar="PATH", help="record what happens, for tools/replay.py")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--verbose", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=f"seallmd {__version__}")
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is 0 to 65535")
    return port


def _configure(options: argparse.Namespace) -> Config:
    return _with_options(load(options.config), options)


def _with_options(config: Config, options: argparse.Namespace) -> Config:
    """The configuration with what the command line says instead."""
    replace = msgspec.structs.replace
    http, control, journal = config.http, config.control, config.journal
    if options.host is not None:
        http = replace(http, host=options.host)
    if options.port is not None:
        http = replace(http, port=options.port)
    if options.control is not None:
        control = replace(control, socket=options.control)
    if options.journal is not None:
        journal = replace(journal, path=options.journal)
    if options.verbose:
        config = replace(config, log=replace(config.log, level="debug"))
    return replace(config, http=http, control=control, journal=journal)


def _build_engine(config: Config, forkserver: ForkServer) -> Engine:
    plan = devices.plan(config.devices)
    settings = NodeSettings(
        services=config.service,
        devices=len(plan.workers),
        block_bytes=plan.block_bytes,
        host_bytes=plan.host_bytes,
        policy=config.policy,
        replacement=config.replacement,
        roofline=plan.roofline,
        host_kv_bytes=plan.host_kv_bytes,
        kv_layout=config.devices.kv_layout,
        groups=config.group,
        threads=plan.threads,
        profiles=profiles.load(plan.cache / PROFILES, config.service, plan.roofline.name),
    )
    journal = None
    if config.journal.path:
        try:
            journal = Journal(Path(config.journal.path), Size(config.journal.limit).bytes_, settings)
        except OSError as error:
            raise ConfigError(
                f"the journal {config.journal.path} cannot be written: {error.strerror}"
            ) from error
    return Engine(
        settings,
        plan,
        forkserver,
        journal,
        config.hung_seconds,
        config.restart_seconds,
        Size(config.journal.flight).bytes_,
    )


def _read_keys(config: Config) -> tuple[Key, ...]:
    """The API keys that the configuration asks for. Raises ConfigError."""
    return read_keys(locate_keys(config.http.keys, os.environ))


class Daemon:
    """One run, from start to stop. Raises SeallmdError where it cannot start.

    options: the command line, which goes before the file whenever that is read. listeners: sockets that were
    handed over, by name; one that was not is opened as the configuration says.
    """

    def __init__(
        self,
        config: Config,
        options: argparse.Namespace,
        notifier: Notifier,
        listeners: dict[str, list[socket.socket]],
        forkserver: ForkServer,
    ) -> None:
        if len(listeners["control"]) > 1:
            raise ConfigError("more than one control socket was handed over")
        self._config = config
        self._options = options
        self._notifier = notifier
        self._listeners = listeners
        self._keyring = Keyring(_read_keys(config))
        self._engine = _build_engine(config, forkserver)
        self._watch = LoopWatch(config.log.stall_seconds)
        self._stop = asyncio.Event()
        self._telling: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Serve until a signal says stop."""
        self._handle_signals()
        watch = self._watch
        path = Path(self._config.control.socket or default_control_socket())
        listener = next(iter(self._listeners["control"]), None)
        control = ControlServer(self._engine, path, group=self._config.control.group, listener=listener)
        # The control socket first: it tells whether another daemon of this user is running.
        await control.start()
        try:
            settings = self._config.http
            metrics = Metrics(self._engine.status, tiers=self._config.tier)
            batches = self._config.batches
            store = Store(batches, Path(batches.directory or default_state_directory()))
            await store.open()
            http = await start_http(
                self._engine, settings, self._listeners["http"], self._keyring, metrics, store
            )
            control.http = http_addresses(http, tls=bool(settings.tls_certificate))
            control.reload = self._reload
            control.latencies = metrics.window.by_service
            control.batches = BatchOperator(store, http.app[BATCHES])
            try:
                await self._engine.start()
                await http.app[BATCHES].start()
                watch.start()
                self._notifier.ready()
                self._tell()
                log.info("serving %d services on %s", len(self._config.service), ", ".join(control.http))
                await self._stop.wait()
                log.info("stopping")
                self._notifier.stopping()
                self._tell()
            finally:
                await http.app[BATCHES].close()  # nobody waits for their lines: they are run again
                await self._engine.stop(self._config.stop_seconds)
                await http.cleanup()
                await store.close()
        finally:
            await control.close()
            watch.stop()
            if self._telling is not None:
                self._telling.cancel()
        log.info("stopped")

    # --------------------------------------------------------------------------------- systemd

    def _tell(self) -> None:
        """Tell systemd how things are, and again before it grows impatient."""
        if self._telling is not None:
            self._telling.cancel()
        if not self._engine.stuck:
            self._notifier.alive()
        stopping = self._stop.is_set()
        if stopping and self._engine.in_flight:
            self._notifier.extend(EXTENSION_SECONDS)
        self._notifier.status(summary(self._engine.status(), self._engine.in_flight, stopping=stopping))
        pause = min(self._notifier.watchdog_seconds / 2 or TELL_SECONDS, TELL_SECONDS)
        self._telling = asyncio.get_running_loop().call_later(pause, self._tell)

    # --------------------------------------------------------------------------------- signals

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, number)
        # In a terminal a hang-up is what it says; to a daemon it is the word for reading its file again.
        if sys.stderr.isatty():
            loop.add_signal_handler(signal.SIGHUP, self._on_stop, signal.SIGHUP)
        else:
            loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        loop.add_signal_handler(signal.SIGUSR1, self._on_report)

    def _on_stop(self, number: signal.Signals) -> None:
        """Stop; a second signal ends the process at once."""
        if self._stop.is_set():
            # The children die with their parent (PR_SET_PDEATHSIG), so nothing stays behind.
            sys.stderr.write("seallmd: second signal, ending at once\n")
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._stop.set()

    def _on_reload(self) -> None:
        """SIGHUP: nobody is told but the log."""
        with contextlib.suppress(ConfigError):  # it is in the log
            self._reload()

    def _reload(self) -> tuple[list[str], list[str]]:
        """Read the configuration again; what has changed with that, and what waits for a restart.

        Raises ConfigError for one that is wrong, and has then changed nothing.
        """
        self._notifier.reloading()
        try:
            new = _configure(self._options)
            keys = _read_keys(new)
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error)
            raise
        else:
            return self._adopt(new, keys)
        finally:
            self._notifier.ready()

    def _adopt(self, new: Config, keys: tuple[Key, ...]) -> tuple[list[str], list[str]]:
        self._config, changed, waiting = reloaded(self._config, new)
        config = self._config
        set_up(config.log, os.environ)
        self._keyring.replace(keys)
        self._engine.set_hung_seconds(config.hung_seconds)
        self._engine.reconfigure(config.service, config.group, config.policy, config.replacement)
        said = f"configuration read again, changed: {', '.join(changed) or 'nothing'}"
        log.info("%s", said)
        self._engine.feed.tell("configuration", "", said)
        if waiting:
            log.warning("these changes need a restart: %s", ", ".join(waiting))
        return changed, waiting

    def _on_report(self) -> None:
        """Write the status to the log, and the last minutes to a file."""
        status = self._engine.status()
        log.info("status: %s", summary(status, self._engine.in_flight, stopping=self._stop.is_set()))
        for device in status.devices:
            log.info("status of a device", extra=fields(**msgspec.structs.asdict(device)))
        for service in status.services:
            log.info("status of a service", extra=fields(**msgspec.structs.asdict(service)))
        for request in self._engine.requests():
            log.info("status of a request", extra=fields(**msgspec.structs.asdict(request)))
        loop = fields(tasks=len(asyncio.all_tasks()), longest_lag_seconds=self._watch.longest_lag)
        log.info("status of the event loop", extra=loop)
        log.info("status of invariants: %s", self._engine.broken_invariant() or "all hold")
        self._engine.dump_flight()


def summary(status: NodeStatus, requests: int, *, stopping: bool) -> str:
    """How things are, in a sentence."""
    services, devices = status.services, status.devices
    parts = [
        f"{sum(s.state == 'resident' for s in services)} of {len(services)} services resident",
        f"{requests} requests ({sum(s.waiting for s in services)} waiting)",
    ]
    if down := [f"{d.device} ({d.state})" for d in devices if d.state != "up"]:
        parts.append("devices not up: " + " ".join(down))
    if refused := [s.name for s in services if s.state == "refused"]:
        parts.append("refused: " + " ".join(refused))
    return ("stopping, " if stopping else "") + ", ".join(parts)
