"""What people see of plans: where services are, where they would be better, and what moving would cost.

Owns the table and wording of `seallmctl plan`. Must not know sockets.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from seallmd.ctl.details import human_seconds
from seallmd.ctl.view import Record, plain_table


def show_plan(out: Console, plan: Record | None) -> None:
    """The plan in force beside the best one known. None: nothing is planned."""
    if plan is None:
        out.print("nothing is planned: replacement is off, or no request has come yet")
        return
    table = plain_table()
    for title in ("SERVICE", "NOW", "BEST", "MS/TOKEN", "BEST", "WHY"):
        right = title == "MS/TOKEN"
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for service in plan["services"]:
        table.add_row(
            Text(service["service"]),
            _groups(service["current"]),
            _groups(service["best"]),
            _milliseconds(service["current_seconds_per_token"]),
            _milliseconds(service["best_seconds_per_token"]),
            Text(service["reason"]),
        )
    out.print(table)
    now, best = (_milliseconds(plan[f"{which}_normalized_latency"]) for which in ("current", "best"))
    out.print(f"over all: {now} ms per token now, {best} by the best plan known")
    if plan["steps"]:
        out.print(
            f"regret {plan['regret']:.3g} of {plan['cost']:.3g} request-seconds, at which services are moved:"
        )
        for step in plan["steps"]:
            out.print(f"  {step}", markup=False)
    else:
        out.print("no better plan is known")
    out.print(f"next planning in {human_seconds(plan['next_planning_seconds'])}")


def _groups(groups: list[list[int]]) -> str:
    return ",".join("+".join(map(str, group)) for group in groups) or "-"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
