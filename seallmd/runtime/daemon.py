"""The daemon: reads the configuration, wires the parts, runs until it is told to stop.

Owns the process: arguments, logging, signals, sockets, exit codes. The only module that knows all the
parts. Must not decide anything about services.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

import msgspec
import uvloop
from aiohttp import web

from seallmd import __version__
from seallmd.api.control import ControlServer
from seallmd.api.server import start_http
from seallmd.config import Config, Size, load
from seallmd.core.settings import NodeSettings
from seallmd.errors import SeallmdError
from seallmd.paths import default_control_socket
from seallmd.runtime import devices, profiles
from seallmd.runtime.children import run_host, run_worker
from seallmd.runtime.engine import PROFILES, Engine
from seallmd.runtime.journal import Journal

log = logging.getLogger("seallmd")


def main(arguments: list[str] | None = None) -> int:
    """The `seallmd` command. Exit codes: 0 stopped as told, 2 configuration or socket cannot be used."""
    options = _parse(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        config = _with_options(load(options.config), options)
        if options.check:
            print(f"{options.config}: {len(config.service)} services, nothing wrong")
            return 0
        uvloop.run(_serve(config))
    except SeallmdError as error:
        print(f"seallmd: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="seallmd", description="Serve many language models on one machine.")
    parser.add_argument("--config", type=Path, default=Path("seallmd.toml"), help="default: %(default)s")
    parser.add_argument("--host", help="listen on this address instead of the configured one")
    parser.add_argument("--port", type=int, help="listen on this TCP port instead of the configured one")
    parser.add_argument("--control", metavar="PATH", help="control socket, instead of the configured one")
    parser.add_argument("--journal", metavar="PATH", help="record what happens, for tools/replay.py")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--verbose", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=f"seallmd {__version__}")
    return parser.parse_args(arguments)


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
    return replace(config, http=http, control=control, journal=journal)


def _build_engine(config: Config) -> Engine:
    plan = devices.plan(config.devices)
    settings = NodeSettings(
        services=config.service,
        devices=len(plan.workers),
        block_bytes=plan.block_bytes,
        host_bytes=plan.host_bytes,
        scheduler=config.scheduler,
        roofline=plan.roofline,
        profiles=profiles.load(plan.cache / PROFILES, config.service, plan.roofline.name),
    )
    journal = None
    if config.journal.path:
        journal = Journal(Path(config.journal.path), Size(config.journal.limit).bytes_, settings)
    return Engine(settings, plan, run_worker, run_host, journal)


async def _serve(config: Config) -> None:
    stop = _stop_event()
    engine = _build_engine(config)
    path = Path(config.control.socket or default_control_socket())
    control = ControlServer(engine, path, group=config.control.group)
    # The control socket first: it tells whether another daemon of this user is running.
    await control.start()
    try:
        http = await start_http(engine, config.http)
        try:
            await engine.start()
            log.info("serving %d services on %s", len(config.service), _addresses(http))
            await stop.wait()
            log.info("stopping")
        finally:
            await engine.stop(config.stop_seconds)
            await http.cleanup()
    finally:
        await control.close()
    log.info("stopped")


def _addresses(http: web.AppRunner) -> str:
    """Where HTTP is served, for people."""
    return ", ".join(
        address if isinstance(address, str) else f"http://{address[0]}:{address[1]}"
        for address in http.addresses
    )


def _stop_event() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; a second signal ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            # The children die with their parent (PR_SET_PDEATHSIG), so nothing stays behind.
            sys.stderr.write("seallmd: second signal, ending at once\n")
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
