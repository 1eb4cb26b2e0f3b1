"""A run, or all runs of a store, as a terminal shows them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.commands.output import age, pretty
from cluster.dashboard.run_view import Row, RunView
from trainer import history

BLOCKS = "▁▂▃▄▅▆▇█"
EVENTS_SHOWN = 8
_BAR = 40  # columns of the attempts' timeline
_STYLES = {"running": "green", "finished": "blue", "failed": "bold red", "lost": "bold red", "stopped": "yellow"}
_ENDS = {"finished": "✓", "stopped": "■", "failed": "✗"}
_HIDDEN = {"time", "attempt", "kind", "stack", "traceback", "text"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def run_screen(view: RunView, width: int, now: float) -> RenderableType:
    """Everything of a run that fits. now: epoch seconds."""
    row, events = view.summary(), view.events()
    parts: list[RenderableType] = [_head(row), _progress(row, width), Text()]
    parts += [*_loss(view, width), Text(), *_attempts(events, row, now), Text(), *_latest(events)]
    parts += [Text(f"! {printable(each['kind'])}: {printable(each['text'])}", "bold red") for each in row["attention"]]
    return Group(*parts)


def store_screen(rows: Sequence[Row]) -> Table:
    """One line a run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("RUN", "STATUS", "WHERE"):
        table.add_column(name)
    for name in ("STEP", "OF", "LOSS", "TOK/S", "ETA"):
        table.add_column(name, justify="right")
    table.add_column("LOOK AT")
    for row in rows:
        cells = [pretty(row.get(key)) for key in ("step", "steps", "loss", "tokens_per_s")]
        attention = row.get("error") or "; ".join(each["text"] for each in row["attention"])
        table.add_row(
            Text(printable(row["run"])),
            Text(row["status"], _STYLES.get(row["status"], "")),
            Text(printable(row.get("where") or "-")),
            *cells,
            "-" if row.get("eta_s") is None else age(row["eta_s"]),
            Text(printable(attention), "red"),
        )
    return table


def run_line(row: Row) -> str:
    """A run as one line of plain text."""
    parts = [printable(row["run"]), row["status"], f"step {row['step']:,}/{row['steps']:,}"]
    for name, value in (("loss", row["loss"]), ("tok/s", row["tokens_per_s"])):
        if value is not None:
            parts.append(f"{name} {pretty(value)}")
    if row["eta_s"] is not None:
        parts.append(f"eta {age(row['eta_s'])}")
    return "  ".join(parts)


def event_line(event: Row) -> str:
    """An event as one line of plain text."""
    shown = [f"{name}={pretty(value)}" for name, value in event.items() if name not in _HIDDEN]
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return printable(f"{clock}  attempt {event['attempt']}  {event['kind']}  {' '.join(shown)}")[:500]


def sparkline(values: Sequence[float]) -> str:
    """A block for each value, by its place between the smallest and the largest; '!' for one that is not finite."""
    good = [value for value in values if math.isfinite(value)]
    low, high = (min(good), max(good)) if good else (0.0, 0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((each - low) * scale)] if math.isfinite(each) else "!" for each in values)


def printable(text: Any) -> str:
    """Without what a terminal would obey: what is in a record was written by anybody."""
    return _CONTROL.sub(" ", str(text))


def _head(row: Row) -> Text:
    started = row["started_at"]
    return Text.assemble(
        (printable(row["run"]), "bold"),
        "  ",
        (row["status"], _STYLES.get(row["status"], "")),
        f"  on {printable(row['where'])}" if row["where"] else "",
        f"  {row['workers']} workers",
        f"  {row['restarts']} restarts" if row["restarts"] else "",
        "" if started is None else time.strftime("  since %Y-%m-%d %H:%M:%S", time.localtime(started)),
    )


def _progress(row: Row, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    speeds = [f"step {row['step']:,} of {row['steps']:,}"]
    for name, unit in (("tokens_per_s", "tok/s"), ("step_s", "s a step"), ("mfu", "mfu"), ("goodput", "goodput")):
        if row[name] is not None:
            speeds.append(f"{pretty(row[name])} {unit}")
    if row["eta_s"] is not None:
        speeds.append(f"eta {age(row['eta_s'])}")
    table.add_row(ProgressBar(row["steps"], row["step"], width=min(40, width // 2)), Text("  ".join(speeds)))
    return table


def _loss(view: RunView, width: int) -> list[RenderableType]:
    curve = view.series("loss", buckets=max(width - 2, 10)).curve
    if not len(curve.x):
        return [Text("no loss yet", "dim")]
    # The largest of each column, so that one step that stands out is seen.
    line = [math.nan if bad else high for high, bad in zip(curve.largest, curve.bad, strict=True)]
    found = [_extreme(view, curve, which) for which in ("smallest", "largest")]
    bad = f"  {int(curve.bad.sum()):,} not finite" if curve.bad.any() else ""
    facts = "  ".join(f"{name} {pretty(value)} at step {step:,}" for name, value, step in filter(None, found))
    return [Text(f"loss {facts}{bad}"), Text(sparkline(line), "cyan")]


def _extreme(view: RunView, curve: Any, which: str) -> tuple[str, float, int] | None:
    """Its name, its value and its step: the latter from the column that it is in."""
    values = getattr(curve, which)
    if not any(math.isfinite(value) for value in values):
        return None
    pick = min if which == "smallest" else max
    place = pick((number for number in range(len(values)) if math.isfinite(values[number])), key=lambda i: values[i])
    start = float(curve.x[place - 1]) if place else None
    near = view.series("loss", start=start, stop=float(curve.x[place]), buckets=1 << 20).curve
    step = next(int(x) for x, value in zip(near.x, getattr(near, which), strict=True) if value == values[place])
    return ("lowest" if which == "smallest" else "highest"), float(values[place]), step


def _attempts(events: Sequence[Row], row: Row, now: float) -> list[RenderableType]:
    attempts = history.attempts(events)
    begun = [each["started_at"] for each in attempts if each["started_at"] is not None]
    if not begun:
        return []
    ends = [
        each["ended_at"] or (now if row["status"] == "running" else each["events"][-1]["time"]) for each in attempts
    ]
    first, last = begun[0], max(ends)
    scale = _BAR / max(last - first, 1e-9)
    lines: list[RenderableType] = []
    for each, end in zip(attempts, ends, strict=True):
        if each["started_at"] is None:
            continue
        start = min(int((each["started_at"] - first) * scale), _BAR - 1)
        length = max(1, min(int((end - each["started_at"]) * scale), _BAR - start))
        mark = _ENDS.get(each["outcome"] or "", "▶" if row["status"] == "running" else "?")
        bar = " " * start + "━" * length + mark
        said = [printable(event.get("summary") or event.get("error") or "") for event in each["events"]][-1]
        lines.append(
            Text(f"attempt {each['attempt']:<3} {bar:<{_BAR + 1}} {age(end - each['started_at'])}  {said}".rstrip())
        )
    return lines


def _latest(events: Sequence[Row]) -> list[RenderableType]:
    return [Text(event_line(event), "dim", no_wrap=True, overflow="ellipsis") for event in events[-EVENTS_SHOWN:]]
