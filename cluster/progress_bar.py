"""What a foreground run tells its user: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from cluster.commands.output import age

LINE_EVERY_S = 5.0
_RATE_WINDOW_S = 30.0


@dataclass(frozen=True)
class View:
    """What is to be seen now. activity: what happens while no step does. step: completed steps of rank 0."""

    activity: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None


class Narrator:
    """Shows Views as they change, and notices as they come; plain lines at most every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar = _Bar(stream) if stream.isatty() else None
        self._rate = _Rate()
        self._said = ""
        self._said_at = float("-inf")

    def notice(self, text: str) -> None:
        """Say something once."""
        if self._bar is not None:
            self._bar.say(text)
        else:
            print(text, file=self._stream, flush=True)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Say what an evaluation found."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "seconds")
        self.notice(f"step {step:,}: validation {shown}")

    def show(self, view: View) -> None:
        """Show the present state, if it is due."""
        eta_s = self._rate.eta_s(view)
        if self._bar is not None:
            self._bar.show(view, eta_s)
            return
        text = describe(view, eta_s) if view.step else view.activity
        now = time.monotonic()
        # A new activity is said at once; the same one with another count, and steps, not more often than is readable.
        is_new = not view.step and text.partition(":")[0] != self._said.partition(":")[0]
        if text != self._said and (is_new or now - self._said_at >= LINE_EVERY_S):
            self._said, self._said_at = text, now
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()


def describe(view: View, eta_s: float | None) -> str:
    """One line: step, loss, speed, time left."""
    parts = [f"step {view.step:,}" + (f"/{view.steps:,}" if view.steps else "")]
    if view.loss is not None:
        parts.append(f"loss {view.loss:.4f}")
    if view.tokens_per_s is not None:
        parts.append(f"{view.tokens_per_s:,.0f} tok/s")
    if eta_s is not None:
        parts.append(f"eta {age(eta_s)}")
    if view.activity:
        parts.append(view.activity)
    return "  ".join(parts)


class _Rate:
    """Steps a second over the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def eta_s(self, view: View) -> float | None:
        """Seconds until the last step, None while that cannot be told."""
        now = time.monotonic()
        if not view.step or (self._seen and view.step < self._seen[-1][1]):
            self._seen.clear()  # a new attempt begins further back
        if view.step and (not self._seen or view.step > self._seen[-1][1]):
            self._seen.append((now, view.step))
        while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        if view.steps is None or len(self._seen) < 2:
            return None
        (began, first), (latest, last) = self._seen[0], self._seen[-1]
        return (view.steps - last) * (latest - began) / (last - first)


class _Bar:
    """A rich progress bar."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(file=stream),
            refresh_per_second=5,
            transient=True,
        )
        self._task: Any = self._progress.add_task("", total=None, text="")
        self._progress.start()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def show(self, view: View, eta_s: float | None) -> None:
        """Update the bar."""
        training = view.step > 0
        self._progress.update(
            self._task,
            description="" if training else view.activity,
            total=view.steps if training else None,
            completed=view.step,
            text=describe(view, eta_s) if training else "",
        )

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()
