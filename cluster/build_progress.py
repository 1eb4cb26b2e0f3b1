"""What a build tells its user: a bar over partitions in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from typing import Any

from cluster.commands.output import age, say

LINE_EVERY_S = 2.0


class BuildProgress:
    """`tell` is a build's progress, `watch` that of its tasks (cluster/ray_build.py). Close it at the end."""

    def __init__(self, arguments: Namespace, unit: str = "rows") -> None:
        self._arguments = arguments
        self._unit = unit
        self._stage = ""
        self._rows = self._done = self._total = 0
        self._began_at = 0.0
        self._said_at = float("-inf")
        stream = sys.stderr if arguments.json else sys.stdout
        self._bar: Any = _bar(stream) if stream.isatty() else None
        self._task: Any = self._bar.add_task("", total=None, text="") if self._bar is not None else None

    def tell(self, stage: str, rows: int) -> None:
        """A stage of the build, and the rows that it has done."""
        if stage != self._stage:
            self._stage, self._done, self._total, self._said_at = stage, 0, 0, float("-inf")
            self._began_at = time.monotonic()
        self._rows = rows
        self._show()

    def watch(self, done: int, total: int) -> None:
        """Tasks of the stage that are done."""
        if (done, total) != (self._done, self._total):
            self._done, self._total = done, total
            self._show()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> None:
        text = ", ".join(self._parts())
        if self._bar is not None:
            self._bar.update(
                self._task, description=self._stage, total=self._total or None, completed=self._done, text=text
            )
            return
        now = time.monotonic()
        if now - self._said_at >= LINE_EVERY_S:
            self._said_at = now
            say(self._arguments, f"{self._stage}: {text}" if text else self._stage)

    def _parts(self) -> list[str]:
        parts = [f"{self._rows:,} {self._unit}"] if self._rows else []
        if self._total:
            parts.append(f"{self._done:,} of {self._total:,} partitions")
        if self._done and self._done < self._total:
            spent_s = time.monotonic() - self._began_at
            parts.append(f"eta {age(spent_s * (self._total - self._done) / self._done)}")
        return parts


def _bar(stream: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(file=stream),
        refresh_per_second=5,
        transient=True,
    )
    bar.start()
    return bar
