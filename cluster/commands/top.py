"""`shardyard top`: a run, or all runs of a store, in a terminal, as long as they go on."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.commands.output import say
from cluster.commands.ui import cache_folder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cluster.dashboard.run_view import RunView
    from cluster.dashboard.store_view import StoreView

LOOK_EVERY_S = 1.0
LINE_EVERY_S = 5.0
_ENDED = {"finished", "stopped", "failed", "lost"}


def top(arguments: Namespace) -> Any:
    """Show until the run ends, or Ctrl-C; in plain lines where stdout is no terminal. With --json once, as it is now.

    Raises NotFound.
    """
    from cluster.dashboard.store_view import StoreView

    store = StoreView(arguments.store, cache_folder())
    view = None if arguments.run is None else store.run(arguments.run)
    try:
        if arguments.json:
            return store.summaries() if view is None else view.summary()
        if view is None:
            _show_store(store)
        elif sys.stdout.isatty():
            _show_run(view)
        else:
            _tell_run(arguments, view)
    except KeyboardInterrupt:  # whoever looks leaves; the run goes on
        pass
    return None


def _show_store(store: StoreView) -> None:
    from rich.console import Console

    from cluster.dashboard.terminal import store_screen

    if sys.stdout.isatty():
        _keep_showing(lambda _: (store_screen(store.summaries()), False))
    else:
        Console(width=200).print(store_screen(store.summaries()))


def _show_run(view: RunView) -> None:
    from cluster.dashboard.terminal import run_screen

    def screen(width: int) -> tuple[RenderableType, bool]:
        ended = view.status() in _ENDED  # before it is drawn, so that its end is
        return run_screen(view, width, time.time()), ended

    _keep_showing(screen)


def _keep_showing(screen: Callable[[int], tuple[RenderableType, bool]]) -> None:
    """screen: of a width, what is to be seen, and whether that is the end."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            shown, ended = screen(console.width)
            live.update(shown, refresh=True)
            if ended:
                return
            time.sleep(LOOK_EVERY_S)


def _tell_run(arguments: Namespace, view: RunView) -> None:
    from cluster.dashboard.terminal import event_line, run_line

    told, said, said_at = 0, "", float("-inf")
    while True:
        ended = view.status() in _ENDED
        events = view.arrived()
        for event in events[told:]:
            say(arguments, event_line(event))
        told = len(events)
        line = run_line(view.summary())
        if line != said and (ended or time.monotonic() - said_at >= LINE_EVERY_S):
            said, said_at = line, time.monotonic()
            say(arguments, line)
        if ended:
            return
        time.sleep(LOOK_EVERY_S)
