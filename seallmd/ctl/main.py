"""seallmctl: the operator's command line.

Owns arguments and exit codes (docs/exit-codes.md): 0 done, 1 doctor or bench found something bad, 2 wrong
name, state or usage, 3 no daemon answers, 130 interrupted. Must not know the daemon beyond its control socket
and its HTTP side. What draws or connects is imported only by the verbs that do: the others start faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seallmd import __version__
from seallmd.ctl import client
from seallmd.errors import ControlError, Unreachable
from seallmd.paths import find_control_socket

EXIT_BAD = 1
EXIT_REFUSED = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

_EPILOG = (
    "exit codes: 0 done, 1 doctor or bench found something bad, 2 wrong name, state or usage, "
    "3 no daemon answers"
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Words of a prompt may stand behind options, too: argparse looks for them before the first one alone."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (getattr(arguments, "prompt", None) != [] or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.prompt = rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    arguments = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without an emoji is no reason to end
    path = getattr(arguments, "socket", None) or find_control_socket()
    try:
        code = _VERBS[arguments.verb](path, arguments)
        sys.stdout.flush()
    except ControlError as error:
        return _fail(arguments, str(error), EXIT_REFUSED)
    except Unreachable as error:
        return _fail(arguments, str(error), EXIT_UNREACHABLE)
    except KeyError as error:
        return _fail(arguments, f"the daemon is of another version: it tells no {error}", EXIT_UNREACHABLE)
    except BrokenPipeError:  # `seallmctl status | head -1` is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    else:
        return code or 0
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The arguments of every verb."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--socket", type=Path, metavar="PATH", help="control socket of the daemon")
    common.add_argument("--json", action="store_true", help="one JSON document instead of text")
    parser = argparse.ArgumentParser(
        prog="seallmctl", description="Look at and steer seallmd.", parents=[common], epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"seallmctl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, parents=[common], help=text, epilog=_EPILOG)

    verb("status", "devices and services")
    listing = verb("list", "services and their models")
    listing.add_argument("--quiet", action="store_true", help="names alone")
    verb("show", "all about one service").add_argument("service", metavar="NAME")
    top = verb("top", "the status, drawn again and again; q quits")
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="default: 1")
    verb("plan", "where services are, where they would be better, and when they move")
    verb("requests", "what runs and waits, and why")
    verb("cancel", "end a request").add_argument("request", type=int, metavar="ID")
    batches = verb("batches", "batches of /v1/batches, and how far they are")
    batches.add_argument("--cancel", metavar="ID", default="", help="end this one; what is answered is kept")
    load = verb("load", "bring a service in and wait until it is resident")
    load.add_argument("service", metavar="NAME")
    load.add_argument(
        "--device",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="on this device, beside other replicas; again for each rank of a split service",
    )
    evict = verb("evict", "take a service out once its work is done")
    evict.add_argument("service", metavar="NAME")
    evict.add_argument("--now", action="store_true", help="end its requests")
    verb("pin", "keep a service from leaving; brings it in").add_argument("service", metavar="NAME")
    verb("unpin", "let it leave again").add_argument("service", metavar="NAME")
    _add_target(verb("drain", "take no new requests, finish those there are, and wait for their end"))
    _add_target(verb("undrain", "take a drain back"))
    events = verb("events", "what happened last")
    events.add_argument("--follow", action="store_true", help="and what happens from now on")
    events.add_argument("--last", type=_count, default=20, metavar="N", help="default: 20")
    verb("reload", "read the configuration again; a wrong one changes nothing")
    _add_bench(verb("bench", "a quick load test, and its report"))
    _add_chat(verb("chat", "talk to a service"))
    doctor = verb("doctor", "look for what keeps seallmd from running; needs no daemon")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="configuration to examine")
    completion = verb("completion", 'completion for a shell: eval "$(seallmctl completion bash)"')
    completion.add_argument("shell", choices=["bash", "zsh"])
    return parser


def _add_target(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("service", nargs="?", metavar="NAME", help="a service; without any: the whole daemon")
    verb.add_argument("--device", type=int, metavar="N", help="a device: everything leaves it, pinned or not")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("services", nargs="*", metavar="NAME", help="services in turn; default: all")
    bench.add_argument("--requests", type=_count, default=32, metavar="N", help="default: 32")
    bench.add_argument("--clients", type=_count, default=4, metavar="N", help="at the same time; default: 4")
    bench.add_argument("--prompt-tokens", type=_count, default=128, metavar="N", help="default: 128")
    bench.add_argument("--output-tokens", type=_count, default=64, metavar="N", help="default: 64")
    bench.add_argument("--url", default="", help="HTTP address, http://HOST:PORT or unix:PATH")


def _add_chat(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("service", metavar="NAME")
    chat.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="ask this and exit; without a terminal: stdin"
    )
    chat.add_argument("--url", default="", help="HTTP address, http://HOST:PORT or unix:PATH")
    chat.add_argument("--system", default="", metavar="TEXT", help="system message")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    chat.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("0.1 to 3600 seconds")
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 100000:
        raise argparse.ArgumentTypeError("1 to 100000")
    return count


def _as_json(arguments: argparse.Namespace) -> bool:
    return getattr(arguments, "json", False)


# --------------------------------------------------------------------------------------------- verbs


def _status(path: Path, arguments: argparse.Namespace) -> None:
    report = client.status(path)
    if _as_json(arguments):
        print(json.dumps(report))
        return
    from seallmd.ctl import view

    view.show_status(view.console(), report)


def _list(path: Path, arguments: argparse.Namespace) -> None:
    services = client.status(path)["services"]
    if _as_json(arguments):
        print(json.dumps(services))
    elif arguments.quiet:
        print("\n".join(service["name"] for service in services))
    else:
        from seallmd.ctl import details, view

        details.show_list(view.console(), services)


def _show(path: Path, arguments: argparse.Namespace) -> None:
    detail = client.show(path, arguments.service)
    if _as_json(arguments):
        print(json.dumps(detail))
        return
    from seallmd.ctl import details, view

    details.show_service(view.console(), detail)


def _top(path: Path, arguments: argparse.Namespace) -> None:
    if _as_json(arguments):
        report, picture = client.status(path), client.picture(path, 64)
        print(json.dumps({**report, "maps": picture["maps"], "latencies": picture["latencies"]}))
        return
    from seallmd.ctl import top, view

    def ask(cells: int) -> tuple[client.Reply, client.Reply]:
        return client.status(path), client.picture(path, cells)

    top.run(view.console(), ask, arguments.interval)


def _plan(path: Path, arguments: argparse.Namespace) -> None:
    plan = client.plan(path)
    if _as_json(arguments):
        print(json.dumps(plan))
        return
    from seallmd.ctl import plan_view, view

    plan_view.show_plan(view.console(), plan)


def _requests(path: Path, arguments: argparse.Namespace) -> None:
    requests = client.requests(path)
    if _as_json(arguments):
        print(json.dumps(requests))
        return
    from seallmd.ctl import details, view

    details.show_requests(view.console(), requests)


def _batches(path: Path, arguments: argparse.Namespace) -> None:
    if arguments.cancel:
        client.cancel_batch(path, arguments.cancel)
        _done(arguments, f"{arguments.cancel} is being cancelled")
        return
    batches = client.batches(path)
    if _as_json(arguments):
        print(json.dumps(batches))
        return
    from seallmd.ctl import details, view

    details.show_batches(view.console(), batches)


def _cancel(path: Path, arguments: argparse.Namespace) -> None:
    client.cancel(path, arguments.request)
    _done(arguments, f"request {arguments.request} is cancelled")


def _load(path: Path, arguments: argparse.Namespace) -> None:
    service, devices = arguments.service, arguments.device
    _follow(arguments, lambda told: client.load(path, service, devices, told), "is resident")


def _evict(path: Path, arguments: argparse.Namespace) -> None:
    _follow(arguments, lambda told: client.evict(path, arguments.service, arguments.now, told), "is evicted")


def _pin(path: Path, arguments: argparse.Namespace) -> None:
    on = arguments.verb == "pin"
    client.pin(path, arguments.service, on)
    _done(arguments, f"{arguments.service} is {'pinned' if on else 'no longer pinned'}")


def _drain(path: Path, arguments: argparse.Namespace) -> None:
    on, service, device = arguments.verb == "drain", arguments.service, arguments.device
    if service is not None and device is not None:
        raise ControlError("name a service or a device, not both")
    target = {"service": service} if service is not None else {} if device is None else {"device": device}
    arguments.service = service or ("the daemon" if device is None else f"device {device}")
    _follow(
        arguments,
        lambda told: client.drain(path, target, on, told),
        "is drained" if on else "is no longer drained",
    )


def _events(path: Path, arguments: argparse.Namespace) -> None:
    if _as_json(arguments):  # a document for each line: there is no end to wait for
        client.events(
            path, arguments.last, arguments.follow, lambda event: print(json.dumps(event), flush=True)
        )
        return
    from seallmd.ctl import feed, view

    out = view.console()
    client.events(path, arguments.last, arguments.follow, lambda event: feed.show_event(out, event))


def _reload(path: Path, arguments: argparse.Namespace) -> None:
    reply = client.reload(path)
    if _as_json(arguments):
        print(json.dumps(reply))
        return
    print("changed: " + (", ".join(reply["changed"]) or "nothing"))
    if reply["restart"]:
        print("needs a restart: " + ", ".join(reply["restart"]))


def _bench(path: Path, arguments: argparse.Namespace) -> int:
    from seallmd.ctl import bench, feed, http, view

    report = client.status(path)
    services = arguments.services or [s["name"] for s in report["services"] if s["state"] != "refused"]
    if not services:
        raise ControlError("there is no service to ask")
    load = bench.Load(
        services, arguments.requests, arguments.clients, arguments.prompt_tokens, arguments.output_tokens
    )
    address = arguments.url or http.choose(report["daemon"]["http"])
    if _as_json(arguments):
        found = bench.run(address, load, lambda _: None, bench.default_clock)
        print(json.dumps(found))
    else:
        with view.CountView(view.console(stderr=True), "requests", load.requests) as count:
            found = bench.run(address, load, count.told, bench.default_clock)
        feed.show_bench(view.console(), found)
    return EXIT_BAD if found["total"]["failed"] else 0


def _follow(
    arguments: argparse.Namespace, command: Callable[[Callable[[client.Reply], None]], None], done: str
) -> None:
    """Run a command that takes a while; `command` gets what is to be called with its progress."""
    if _as_json(arguments):
        command(lambda _: None)
    else:
        from seallmd.ctl import view

        # Progress goes to stderr: stdout carries the result alone.
        with view.JobView(view.console(stderr=True), arguments.service) as job:
            command(job.told)
    _done(arguments, f"{arguments.service} {done}")


def _chat(path: Path, arguments: argparse.Namespace) -> None:
    from seallmd.ctl import chat, http

    options: dict[str, Any] = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    address = arguments.url or http.choose(client.status(path)["daemon"]["http"])
    given = {name: value for name, value in options.items() if value is not None}
    conversation = chat.Chat(address, arguments.service, arguments.system, given)
    prompt = _prompt(arguments)
    if prompt:
        chat.once(conversation, prompt, as_json=_as_json(arguments))
    elif sys.stdin.isatty():
        chat.converse(conversation)


def _prompt(arguments: argparse.Namespace) -> str:
    """What is asked; empty where a terminal is to be asked for it. Raises ControlError."""
    try:
        prompt = os.fsencode(" ".join(arguments.prompt))
        if not prompt and (_as_json(arguments) or not sys.stdin.isatty()):
            prompt = sys.stdin.buffer.read()
        return prompt.decode()
    except UnicodeError:
        raise ControlError("the prompt is not UTF-8 text") from None


def _doctor(path: Path, arguments: argparse.Namespace) -> int:
    from seallmd.ctl import doctor

    findings = doctor.examine(path, arguments.config)
    if _as_json(arguments):
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.level:<5} {finding.check:<14} {finding.text}")
            if finding.remedy:
                print(f"{'':<20} -> {finding.remedy}")
    return EXIT_BAD if any(finding.level == "bad" for finding in findings) else 0


def _completion(_path: Path, arguments: argparse.Namespace) -> None:
    from seallmd.ctl.completion import SCRIPTS

    print(SCRIPTS[arguments.shell], end="")


_VERBS: dict[str, Callable[[Path, argparse.Namespace], int | None]] = {
    "batches": _batches,
    "bench": _bench,
    "cancel": _cancel,
    "chat": _chat,
    "completion": _completion,
    "doctor": _doctor,
    "drain": _drain,
    "events": _events,
    "evict": _evict,
    "list": _list,
    "load": _load,
    "pin": _pin,
    "plan": _plan,
    "reload": _reload,
    "requests": _requests,
    "show": _show,
    "status": _status,
    "top": _top,
    "undrain": _drain,
    "unpin": _pin,
}


def _done(arguments: argparse.Namespace, text: str) -> None:
    print(json.dumps({"ok": True}) if _as_json(arguments) else text)


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    """One line for people on stderr; for programs, also the JSON document that they wait for."""
    if _as_json(arguments):
        print(json.dumps({"ok": False, "error": message}))
    print(f"seallmctl: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
