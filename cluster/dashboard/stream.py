"""What is new, as server-sent events. An event's id says how far its reader has come, so that nothing is lost when it
connects again, also to a server that was started anew: everything is in the runs' folders.

One task looks at a run (or at the store) for all pages that show it, and writes each message once: fifty open pages
cost the disk no more than one.
"""

from __future__ import annotations

import asyncio
import re
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from cluster.dashboard.json_response import Json
from cluster.dashboard.run_view import RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import NotFound, ShardyardError

RUN_EVERY_S, STORE_EVERY_S = 0.25, 2.0
REMOTE_EVERY_S = 5.0  # each look is some requests there, and training writes every 10 s
KEEP_ALIVE_S = 10.0
MOST_ROWS = 500  # of metrics in one message; a page that is further behind asks for its curves again
_MOST_WAITING = (
    200  # looks with news; a reader that is slower is sent away, and comes back with the id of the last it had
)


class _Hub(ABC):
    """Readers of one thing, and the task that looks at it while there are any."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._readers: set[asyncio.Queue[str | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._ended = False
        self._quiet = asyncio.Lock()  # nobody joins between a look and its messages
        # A task that is cancelled leaves its thread in `look`, which must not meet a reader that comes then.
        self._one_thread = threading.Lock()

    @abstractmethod
    def look(self) -> list[str]:
        """Messages of what is new; called in a thread, by one at a time."""

    @abstractmethod
    def beginning(self, last_id: str | None) -> list[str]:
        """What a reader that comes now has missed; called in a thread, never together with `look`."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody reads."""
        return not self._readers and self._task is None

    async def messages(self, last_id: str | None) -> AsyncIterator[str]:
        """What it missed, then all that comes, until it goes."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(_MOST_WAITING)
        yield "retry: 1000\n\n"
        async with self._quiet:
            try:
                missed = await asyncio.to_thread(self._begin, last_id)
            except NotFound as error:
                yield _trouble(error)
                return
            except Exception as error:  # the record may hold anything; the next look may find it in order
                missed = [_trouble(error)]
            if self._ended:
                return
            self._readers.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._keep_looking())
        try:
            for each in missed:
                yield each
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        new = await queue.get()
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

    def end(self) -> None:
        """End all streams, those too that are about to begin."""
        self._ended = True
        self._send_away(self._readers)

    def _begin(self, last_id: str | None) -> list[str]:
        with self._one_thread:
            return self.beginning(last_id)

    def _look(self) -> list[str]:
        with self._one_thread:
            return self.look()

    async def _keep_looking(self) -> None:
        troubled = ""
        while self._readers:
            async with self._quiet:
                try:
                    news, troubled = await asyncio.to_thread(self._look), ""
                except NotFound as error:  # for good: who asks again is told so, or finds another run of this name
                    self._tell([_trouble(error)])
                    self._send_away(self._readers)
                    break
                except Exception as error:
                    trouble = _trouble(error)
                    news, troubled = [] if troubled == trouble else [trouble], trouble
                self._tell(news)
            await asyncio.sleep(self._every_s)
        self._task = None

    def _tell(self, news: list[str]) -> None:
        if not news:
            return
        text = "".join(news)  # at once: what a reader costs is mostly that something is sent to it
        late = {queue for queue in self._readers if queue.full()}
        for queue in self._readers - late:
            queue.put_nowait(text)
        self._send_away(late)

    def _send_away(self, queues: set[asyncio.Queue[str | None]]) -> None:
        """End their streams after what they have been told."""
        for queue in set(queues):
            self._readers.discard(queue)
            if queue.full():  # it is late already, and has the rest told when it comes back
                queue.get_nowait()
            queue.put_nowait(None)


class RunHub(_Hub):
    """`rows` of metrics, `events`, and `summary` of a run.

    Ids are "<rows>-<events>-<mark>", of which the mark tells these very events of this very run from others.
    """

    def __init__(self, view: RunView) -> None:
        super().__init__(RUN_EVERY_S if view.record.store.is_local else REMOTE_EVERY_S)
        self._view = view
        self._marks = [zlib.crc32(repr(view.identity).encode())]  # after so many events
        self._place: tuple[int, int] | None = None
        self._seen = -1  # of the view's changes
        self._summary: Any = None

    def look(self) -> list[str]:
        """What has come since the last look."""
        summary = self._view.summary()  # first: it says whether the run is still there
        found: list[str] = []
        if self._place is None:
            self._place = self._end()
        if self._seen != self._view.changes:
            self._seen = self._view.changes  # before the rows: those that come meanwhile are other files again
            found, self._place = self._since(self._place)
        if _without_clock(summary) != _without_clock(self._summary):
            self._summary = summary
            found.append(message("summary", summary))
        return found

    def beginning(self, last_id: str | None) -> list[str]:
        """From the id on to where the others are; without one, the summary alone."""
        summary = self._view.summary()
        if self._place is None or not self._readers:
            self._place = self._end()
        match = re.fullmatch(r"(\d{1,15})-(\d{1,15})-(\d{1,15})", last_id or "")
        missed: list[str] = []
        if match is not None:
            rows, events, mark = (int(each) for each in match.groups())
            if self._mark(events) == mark:
                missed, _ = self._since((rows, events), self._place)
            else:
                missed = [message("reset", {}, self._id(self._place))]
        return [*missed, message("summary", summary, self._id(self._place))]

    def _end(self) -> tuple[int, int]:
        return self._view.num_rows(), len(self._view.arrived())

    def _since(self, start: tuple[int, int], stop: tuple[int, int] | None = None) -> tuple[list[str], tuple[int, int]]:
        """Messages of all from one place to another (None: the end), and where that is."""
        stop = stop or self._end()
        found = []
        if start[0] > stop[0] or start[1] > stop[1] or stop[0] - start[0] > MOST_ROWS:
            return [message("reset", {}, self._id(stop))], stop  # another record of this run, or too much
        rows = self._view.rows(start[0], stop[0]) if start[0] < stop[0] else []
        events = self._view.arrived()[start[1] : stop[1]]
        if rows:
            found.append(message("rows", rows, self._id((stop[0], start[1]))))
        if events:
            found.append(message("events", events, self._id(stop)))
        return found, stop

    def _mark(self, events: int) -> int | None:
        """Of the first so many events; None where there are fewer."""
        for event in self._view.arrived()[len(self._marks) - 1 :]:
            told = f"{event['attempt']} {event['time']} {event['kind']}"
            self._marks.append(zlib.crc32(told.encode(), self._marks[-1]))
        return self._marks[events] if events < len(self._marks) else None

    def _id(self, place: tuple[int, int]) -> str:
        return f"{place[0]}-{place[1]}-{self._mark(place[1])}"


class StoreHub(_Hub):
    """`runs`: the overview's rows, whenever they differ."""

    def __init__(self, store: StoreView) -> None:
        super().__init__(STORE_EVERY_S if store.store.is_local else REMOTE_EVERY_S)
        self._store = store
        self._shown: Any = None

    def look(self) -> list[str]:
        """All rows, if any has changed."""
        rows = self._store.summaries()
        shown = [_without_clock(row) for row in rows]
        if shown == self._shown:
            return []
        self._shown = shown
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
        for other in [each for each, hub in self._runs.items() if hub.is_idle and each is not view]:
            del self._runs[other]
        return self._runs.setdefault(view, RunHub(view))

    def end(self) -> None:
        """End all streams, before the server ends: it would wait for them."""
        for hub in (self._store, *self._runs.values()):
            hub.end()


def message(kind: str, content: Any, place: str | None = None) -> str:
    """One event of a stream."""
    text = bytes(Json(content).body).decode()
    return f"event: {kind}\n" + (f"id: {place}\n" if place else "") + f"data: {text}\n\n"


def _trouble(error: Exception) -> str:
    text = str(error) if isinstance(error, ShardyardError) else f"{type(error).__name__}: {error}"
    return message("trouble", {"error": text})


def _without_clock(summary: dict[str, Any] | None) -> Any:
    """A summary without what changes while nothing happens."""
    if summary is None:
        return None
    attention = [(each["kind"], each["time"]) for each in summary["attention"]]
    return {key: value for key, value in summary.items() if key != "goodput"} | {"attention": attention}
