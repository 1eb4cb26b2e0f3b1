"""What is new, as server-sent events. An event's id says how far its reader has come, so that nothing is lost when it
connects again, also to a server that was started anew: everything is in the runs' folders.

One task looks at a run (or at the store) for all pages that show it, and writes each message once: fifty open pages
cost the disk no more than one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from cluster.dashboard.json_response import Json
from cluster.dashboard.runs import RunView, StoreView
from configs.errors import ShardyardError

RUN_EVERY_S, STORE_EVERY_S = 0.5, 2.0
KEEP_ALIVE_S = 10.0
MOST_ROWS = 500  # of metrics in one message; a page that is further behind asks for its curves again
_MOST_WAITING = 200  # messages; a reader that is slower is sent away, and comes back with the id of the last it had


class _Hub(ABC):
    """Readers of one thing, and the task that looks at it while there are any."""

    every_s: float

    def __init__(self) -> None:
        self._readers: set[asyncio.Queue[str | None]] = set()
        self._task: asyncio.Task[None] | None = None

    @abstractmethod
    def look(self) -> list[str]:
        """Messages of what is new; called in a thread, by one at a time."""

    @abstractmethod
    def beginning(self, last_id: str | None) -> list[str]:
        """What a reader that comes now has missed; called in a thread, never together with `look`."""

    async def messages(self, last_id: str | None) -> AsyncIterator[str]:
        """What it missed, then all that comes, until it goes."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(_MOST_WAITING)
        yield "retry: 1000\n\n"
        async with self._quiet:
            try:
                missed = await asyncio.to_thread(self.beginning, last_id)
            except ShardyardError as error:
                missed = [message("trouble", {"error": str(error)})]
            self._readers.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._keep_looking())
        try:
            for each in missed:
                yield each
            while True:
                try:
                    new = await asyncio.wait_for(queue.get(), KEEP_ALIVE_S)
                except TimeoutError:
                    new = ": still here\n\n"
                if new is None:
                    return
                yield new
        finally:
            self._readers.discard(queue)
            if not self._readers and self._task is not None:
                self._task.cancel()
                self._task = None

    @property
    def _quiet(self) -> asyncio.Lock:
        lock: asyncio.Lock = self.__dict__.setdefault("_lock", asyncio.Lock())
        return lock

    async def _keep_looking(self) -> None:
        troubled = ""
        while True:
            async with self._quiet:
                try:
                    news = await asyncio.to_thread(self.look)
                    troubled = ""
                except ShardyardError as error:
                    news = [] if troubled == str(error) else [message("trouble", {"error": str(error)})]
                    troubled = str(error)
                for queue in list(self._readers):
                    for each in news:
                        with contextlib.suppress(asyncio.QueueFull):
                            queue.put_nowait(each)
                    if queue.full():
                        self._readers.discard(queue)
                        while not queue.empty():
                            queue.get_nowait()
                        queue.put_nowait(None)
            await asyncio.sleep(self.every_s)


class RunHub(_Hub):
    """`rows` of metrics, `events`, and `summary` of a run. Ids are "<rows>-<events>"."""

    every_s = RUN_EVERY_S

    def __init__(self, view: RunView) -> None:
        super().__init__()
        self._view = view
        self._place: tuple[int, int] | None = None
        self._summary: Any = None

    def look(self) -> list[str]:
        """What has come since the last look."""
        if self._place is None:
            self._place = self._end()
        found, self._place = self._since(self._place)
        summary = self._view.summary()
        if _without_clock(summary) != _without_clock(self._summary):
            self._summary = summary
            found.append(message("summary", summary))
        return found

    def beginning(self, last_id: str | None) -> list[str]:
        """From the id on to where the others are; without one, the summary alone."""
        if self._place is None or not self._readers:
            self._place = self._end()
        match = re.fullmatch(r"(\d{1,15})-(\d{1,15})", last_id or "")
        missed: list[str] = []
        if match is not None:
            missed, _ = self._since((int(match[1]), int(match[2])), self._place)
        return [*missed, message("summary", self._view.summary(), _id(self._place))]

    def _end(self) -> tuple[int, int]:
        return self._view.num_rows(), len(self._view.events())

    def _since(self, start: tuple[int, int], stop: tuple[int, int] | None = None) -> tuple[list[str], tuple[int, int]]:
        """Messages of all from one place to another (None: the end), and where that is."""
        stop = stop or self._end()
        found = []
        if start[0] > stop[0] or start[1] > stop[1] or stop[0] - start[0] > MOST_ROWS:
            return [message("reset", {}, _id(stop))], stop  # another run of this name, or too much
        rows = self._view.rows(start[0], stop[0])
        events = self._view.events()[start[1] : stop[1]]
        if rows:
            found.append(message("rows", rows, _id((stop[0], start[1]))))
        if events:
            found.append(message("events", events, _id(stop)))
        return found, stop


class StoreHub(_Hub):
    """`runs`: the overview's rows, whenever they differ."""

    every_s = STORE_EVERY_S

    def __init__(self, store: StoreView) -> None:
        super().__init__()
        self._store = store
        self._shown: Any = None

    def look(self) -> list[str]:
        """All rows, if any has changed."""
        rows = self._store.summaries()
        if [_without_clock(row) for row in rows] == self._shown:
            return []
        self._shown = [_without_clock(row) for row in rows]
        return [message("runs", rows)]

    def beginning(self, last_id: str | None) -> list[str]:  # noqa: ARG002
        """All rows."""
        return [message("runs", self._store.summaries())]


class Hubs:
    """One hub for each thing that is looked at."""

    def __init__(self, store: StoreView) -> None:
        self._store = StoreHub(store)
        self._runs: dict[RunView, RunHub] = {}

    def store(self) -> StoreHub:
        """Of the whole store."""
        return self._store

    def run(self, view: RunView) -> RunHub:
        """Of one run."""
        return self._runs.setdefault(view, RunHub(view))


def message(kind: str, content: Any, place: str | None = None) -> str:
    """One event of a stream."""
    text = bytes(Json(content).body).decode()
    return f"event: {kind}\n" + (f"id: {place}\n" if place else "") + f"data: {text}\n\n"


def _id(place: tuple[int, int]) -> str:
    return f"{place[0]}-{place[1]}"


def _without_clock(summary: dict[str, Any] | None) -> Any:
    """A summary without what changes while nothing happens."""
    if summary is None:
        return None
    attention = [(each["kind"], each["time"]) for each in summary["attention"]]
    return {key: value for key, value in summary.items() if key != "goodput"} | {"attention": attention}
