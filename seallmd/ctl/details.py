"""What people see of services, requests and batches one by one: `list`, `show`, `requests`, `batches`.

Owns their tables and wording, as `view` does for `status`. Must not know sockets.
"""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from seallmd.ctl.view import Record, human_bytes, plain_table, state_text


def show_list(out: Console, services: list[Record]) -> None:
    """Every configured service with what it is."""
    table = plain_table()
    for title in ("SERVICE", "STATE", "DEV", "CONTEXT", "DTYPE", "WEIGHTS", "MODEL"):
        table.add_column(title, overflow="fold")
    for service in services:
        table.add_row(
            Text(service["name"]),
            state_text(service["state"]),
            _devices(service),
            str(service["context"]),
            service["dtype"],
            human_bytes(service["weights_bytes"]),
            Text(service["model"]),
        )
    out.print(table)


def show_requests(out: Console, requests: list[Record]) -> None:
    """Every request that is not over, and why it waits if it does."""
    table = plain_table()
    titles = ("ID", "SERVICE", "TIER", "STATE", "DEV", "AGE", "PROMPT", "OUTPUT", "PLACE", "WAITS BECAUSE")
    for title in titles:
        right = title in ("ID", "AGE", "PROMPT", "OUTPUT", "PLACE")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for request in requests:
        table.add_row(
            str(request["request"]),
            Text(request["service"]),
            request["tier"],
            state_text(request["state"]),
            "-" if request["device"] is None else str(request["device"]),
            human_seconds(request["age_seconds"]),
            str(request["prompt_tokens"]),
            f"{request['output_tokens']}/{request['max_tokens']}",
            str(request["place"] or "-"),
            Text(request["reason"] or "-"),
        )
    out.print(table)


def show_batches(out: Console, batches: list[Record]) -> None:
    """Batches, and how far they are."""
    table = plain_table()
    titles = ("ID", "KEY", "ENDPOINT", "STATUS", "LINES", "DONE", "FAILED", "AGE", "DEADLINE IN")
    for title in titles:
        right = title in ("LINES", "DONE", "FAILED", "AGE", "DEADLINE IN")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for batch in batches:
        table.add_row(
            Text(batch["id"]),
            Text(batch["owner"] or "-"),
            batch["endpoint"],
            batch["status"],
            str(batch["lines"] or "-"),
            str(batch["completed"]),
            str(batch["failed"]),
            human_seconds(batch["age_seconds"]),
            human_seconds(batch["left_seconds"]) if batch["left_seconds"] else "-",
        )
    out.print(table)


def show_service(out: Console, detail: Record) -> None:
    """All that is known of one service."""
    status = detail["status"]
    state = state_text(status["state"])
    out.print(Text.assemble((status["name"], "bold"), "  ", state))
    if status["reason"]:
        out.print(escape(status["reason"]))
    _section(out, "configured", _configured(detail["settings"]))
    if detail["shape"] is not None:
        _section(out, "model", _shape(detail))
    for place in detail["places"]:
        _section(out, f"on device {place['device']}", _place(place))
    _section(out, "so far", _counters(status))
    if detail["profile"] is not None:
        _section(out, "learnt", _learnt(detail))


def human_seconds(seconds: float) -> str:
    """0.42 -> "0.42 s", 75 -> "1:15 min", 7500 -> "2:05 h"."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def _devices(service: Record) -> str:
    return ",".join(str(device) for device in service["devices"]) or "-"


def _section(out: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = plain_table()
    table.show_header = False
    table.add_column(min_width=18)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", Text(value))
    out.print(f"\n[bold]{title}[/]")
    out.print(table)


def _configured(settings: Record) -> list[tuple[str, str]]:
    return [
        ("model", settings["model"]),
        ("dtype", settings["dtype"]),
        ("context", str(settings["context"] or "the model's own")),
        ("preload", _yes(settings["preload"])),
        ("pinned", _yes(settings["pinned"])),
        ("importance", f"{settings['importance']:g}"),
        ("max_waiting", str(settings["max_waiting"])),
        (
            "idle_seconds",
            f"{settings['idle_seconds']:g}" if settings["idle_seconds"] else "never leaves idle",
        ),
    ]


def _shape(detail: Record) -> list[tuple[str, str]]:
    shape = detail["shape"]
    # LayerShape travels as an array: KV heads, elements of K and of V per head.
    layers = {tuple(layer): 0 for layer in shape["layers"]}
    for layer in shape["layers"]:
        layers[tuple(layer)] += 1
    kinds = (f"{count} with {heads} KV heads of {k}+{v}" for (heads, k, v), count in layers.items())
    return [
        ("architecture", shape["architecture"]),
        ("weights", f"{human_bytes(sum(shape['segments']))} in {len(shape['segments'])} segments"),
        ("dtype", shape["dtype"]),
        ("context", f"{shape['context']} tokens, served with {detail['status']['context']}"),
        ("vocabulary", str(shape["vocab"])),
        ("attention layers", "; ".join(kinds)),
        ("KV of a token", human_bytes(detail["kv_bytes_per_token"])),
    ]


def _place(place: Record) -> list[tuple[str, str]]:
    return [
        ("state", place["state"]),
        ("weights", human_bytes(place["weights_bytes"])),
        ("running", str(place["running"])),
        ("fast operations", ", ".join(f"{n} {kind}" for kind, n in place["operations"]) or "none"),
        ("last step", f"{human_seconds(place['idle_seconds'])} ago"),
    ]


def _counters(status: Record) -> list[tuple[str, str]]:
    return [
        ("running, waiting", f"{status['running']}, {status['waiting']}"),
        ("KV", human_bytes(status["kv_bytes"])),
        ("output now", f"{status['tokens_per_second']:.1f} tokens/s"),
        ("tokens", f"{status['prompt_tokens']} in prompts, {status['output_tokens']} generated"),
        ("preempted", f"{status['preemptions']}, {status['saves']} of them to host memory"),
        ("moved to other devices", f"{status['migrations']} requests"),
        ("brought in", f"{status['swaps_in']} times, last in {status['last_swap_seconds']:.3f} s"),
    ]


def _learnt(detail: Record) -> list[tuple[str, str]]:
    profile = detail["profile"]
    costs = profile["costs"]
    lengths = zip(detail["prompt_quantiles"], detail["output_quantiles"], strict=True)
    half, most = (f"{prompt:.0f}, {output:.0f} tokens" for prompt, output in lengths)
    fixed, rows, context = costs["decode"]
    return [
        ("a step costs", f"{fixed * 1e3:.2f} ms"),
        ("with 100 rows", f"{rows * 1e3:.2f} ms more"),
        ("with 100 prompt tokens", f"{costs['prompt'] * 1e3:.2f} ms more"),
        ("with 1000 of context", f"{context * 1e3:.2f} ms more"),
        ("predictions are off", f"{costs['error']:.0%}, after {costs['steps']} steps"),
        ("mean prompt, output", f"{profile['prompt_tokens']:.0f}, {profile['output_tokens']:.0f} tokens"),
        ("half are up to", half),
        ("95% are up to", most),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
