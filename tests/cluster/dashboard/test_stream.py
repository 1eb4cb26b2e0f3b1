"""Streams: nothing is lost, whoever connects again; many readers cost one look; who has gone costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cluster.dashboard import stream
from cluster.dashboard.run_view import RunView
from cluster.dashboard.store_view import StoreView
from cluster.dashboard.stream import Hubs, RunHub, StoreHub
from configs.errors import Unreachable
from tests.cluster.dashboard.records import new_run, train
from trainer.record import RunRecord

TIMEOUT_S = 20.0


class Reader:
    """What one page has been told."""

    def __init__(self, messages: AsyncIterator[str]) -> None:
        self._messages = messages
        self._waiting: list[str] = []  # of what came together
        self.told: list[tuple[str, Any]] = []
        self.last_id: str | None = None

    async def until(self, kind: str) -> Any:
        """The content of the next message of a kind."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                if not self._waiting:
                    self._waiting = (await anext(self._messages)).strip().split("\n\n")
                lines = self._waiting.pop(0).splitlines()
                fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
                self.last_id = fields.get("id", self.last_id)
                if "event" in fields:
                    self.told.append((fields["event"], json.loads(fields["data"])))
                    if fields["event"] == kind:
                        return self.told[-1][1]

    async def ended(self) -> bool:
        """Whether it ends by itself."""
        with contextlib.suppress(StopAsyncIteration):
            while True:
                await asyncio.wait_for(anext(self._messages), TIMEOUT_S)
        return True

    async def go(self) -> None:
        await self._messages.aclose()  # type: ignore[attr-defined]

    def steps(self) -> list[int]:
        return [row["step"] for kind, rows in self.told if kind == "rows" for row in rows]

    def kinds(self) -> list[str]:
        return [event["kind"] for kind, events in self.told if kind == "events" for event in events]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "RUN_EVERY_S", 0.02)
    monkeypatch.setattr(stream, "STORE_EVERY_S", 0.02)


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return new_run(tmp_path / "store")


def server(tmp_path: Path) -> tuple[Hubs, RunView]:
    """As a server has them that was just started."""
    store = StoreView(str(tmp_path / "store"), tmp_path / "cache")
    return Hubs(store), store.run("run")


def run(test: Coroutine[Any, Any, None]) -> None:
    async def alone() -> None:
        await test
        await asyncio.sleep(0.05)  # what is cancelled ends in its next turn
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, left

    asyncio.run(alone())


def test_a_reader_is_told_what_comes_and_nothing_twice(tmp_path: Path, record: RunRecord) -> None:
    async def test() -> None:
        train(record, 1, 10)
        hubs, view = server(tmp_path)
        reader = Reader(hubs.run(view).messages(None))
        assert (await reader.until("summary"))["step"] == 10
        for first in (11, 14, 15):
            train(record, first, {11: 13, 14: 14, 15: 20}[first])
            await reader.until("rows")
        record.event("checkpoint_saved", step=20)
        await reader.until("events")
        assert (await reader.until("summary"))["step"] == 20
        assert reader.steps() == [*range(11, 21)] and reader.kinds() == ["checkpoint_saved"]
        await reader.go()

    run(test())


@pytest.mark.parametrize("same_server", [True, False])
def test_what_came_meanwhile_is_told_also_by_a_server_started_anew(
    tmp_path: Path, record: RunRecord, same_server: bool
) -> None:
    async def test() -> None:
        train(record, 1, 10)
        hubs, view = server(tmp_path)
        first = Reader(hubs.run(view).messages(None))
        await first.until("summary")
        train(record, 11, 12)
        record.event("evaluated", step=12)
        await first.until("events")
        await first.go()
        train(record, 13, 20)
        record.event("paused", step=20)
        if not same_server:
            hubs, view = server(tmp_path)
        second = Reader(hubs.run(view).messages(first.last_id))
        await second.until("summary")
        assert first.steps() + second.steps() == [*range(11, 21)]
        assert first.kinds() + second.kinds() == ["evaluated", "paused"]
        await second.go()

    run(test())


@pytest.mark.parametrize("last_id", ["9-1-1", "99999-0-0", "x", "1-1", "", "-1-0-0", "1e3-0-0", "٣-0-0"])
def test_an_id_of_another_record_is_not_gone_on_from(tmp_path: Path, record: RunRecord, last_id: str) -> None:
    async def test() -> None:
        train(record, 1, 10)
        hubs, view = server(tmp_path)
        reader = Reader(hubs.run(view).messages(last_id))
        await reader.until("summary")
        assert reader.steps() == []
        assert {kind for kind, _ in reader.told} <= {"reset", "summary"}
        await reader.go()

    run(test())


def test_an_event_that_was_found_late_is_not_taken_for_another(tmp_path: Path, record: RunRecord) -> None:
    """A clock that is behind sorts it before those that a reader has: a new server cannot go on from them."""

    async def test() -> None:
        hubs, view = server(tmp_path)
        first = Reader(hubs.run(view).messages(None))
        await first.until("summary")
        record.event("now")
        await first.until("events")
        late = record.store.local_path("events/0001-rank-00001-000001.jsonl")
        assert late is not None
        late.write_text('{"time": 5, "attempt": 1, "kind": "of a clock that is behind"}\n')
        await first.until("events")
        assert first.kinds() == ["now", "of a clock that is behind"]
        hubs, view = server(tmp_path)
        await first.go()
        second = Reader(hubs.run(view).messages(first.last_id))
        await second.until("summary")
        assert second.told[0][0] == "reset"
        await second.go()

    run(test())


def test_who_is_far_behind_asks_for_the_curves_again(tmp_path: Path, record: RunRecord) -> None:
    async def test() -> None:
        hubs, view = server(tmp_path)
        reader = Reader(hubs.run(view).messages(None))
        await reader.until("summary")
        train(record, 1, stream.MOST_ROWS + 1)
        await reader.until("reset")
        train(record, stream.MOST_ROWS + 2, stream.MOST_ROWS + 2)
        assert [row["step"] for row in await reader.until("rows")] == [stream.MOST_ROWS + 2]
        await reader.go()

    run(test())


def test_while_no_file_changes_no_rows_are_read(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    real = RunView.num_rows
    monkeypatch.setattr(RunView, "num_rows", lambda view: read.append(view) or real(view))

    async def test() -> None:
        hubs, view = server(tmp_path)
        reader = Reader(hubs.run(view).messages(None))
        await reader.until("summary")
        train(record, 1, 1)
        await reader.until("rows")
        read.clear()
        await asyncio.sleep(0.5)
        assert read == []
        train(record, 2, 2)
        assert [row["step"] for row in await reader.until("rows")] == [2]
        await reader.go()

    run(test())


def test_many_readers_cost_one_look(tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    real = RunHub.look

    def counted(self: RunHub) -> list[str]:
        nonlocal looks
        looks += 1
        return real(self)

    monkeypatch.setattr(RunHub, "look", counted)

    async def test() -> None:
        nonlocal looks
        hubs, view = server(tmp_path)
        readers = [Reader(hubs.run(view).messages(None)) for _ in range(50)]
        await asyncio.gather(*(reader.until("summary") for reader in readers))
        looks = 0
        for step in range(1, 6):
            train(record, step, step)
            await asyncio.gather(*(reader.until("rows") for reader in readers))
        one = looks
        for reader in readers[1:]:
            await reader.go()
        looks = 0
        await asyncio.sleep(0.5)
        assert 5 <= one < 100 and 0 < looks <= 25
        await readers[0].go()
        looks = 0
        await asyncio.sleep(0.2)
        assert looks == 0 and hubs.run(view).is_idle

    run(test())


def test_a_slow_reader_is_sent_away_and_loses_nothing(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_MOST_WAITING", 6)

    async def test() -> None:
        hubs, view = server(tmp_path)
        slow, quick = (Reader(hubs.run(view).messages(None)) for _ in range(2))
        await asyncio.gather(slow.until("summary"), quick.until("summary"))
        for step in range(1, 11):
            train(record, step, step)
            await quick.until("rows")
        assert await slow.ended() is True
        again = Reader(hubs.run(view).messages(slow.last_id))
        await again.until("summary")
        assert again.steps() == [*range(1, 11)] == quick.steps()
        await again.go()
        await quick.go()

    run(test())


def test_a_store_that_cannot_be_read_is_told_once_and_followed_again(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(error: Exception, text: str) -> None:
        hubs, view = server(tmp_path)
        reader = Reader(hubs.run(view).messages(None))
        await reader.until("summary")
        with monkeypatch.context() as patch:
            patch.setattr(RunView, "summary", lambda _: (_ for _ in ()).throw(error))
            assert await reader.until("trouble") == {"error": text}
            late = Reader(hubs.run(view).messages(None))  # who comes now is told as well
            assert await late.until("trouble") == {"error": text}
            await asyncio.sleep(0.2)
        step = view.latest().get("step", 0) + 1
        train(record, step, step)
        assert [row["step"] for row in await reader.until("rows")] == [step]
        assert [kind for kind, _ in reader.told].count("trouble") == 1
        await late.until("rows")
        await reader.go()
        await late.go()

    run(test(Unreachable("the store is away"), "the store is away"))
    run(test(ZeroDivisionError("a fault of ours"), "ZeroDivisionError: a fault of ours"))


def test_a_run_that_is_deleted_ends_its_streams(tmp_path: Path, record: RunRecord) -> None:
    async def test() -> None:
        hubs, view = server(tmp_path)
        readers = [Reader(hubs.run(view).messages(None)) for _ in range(2)]
        await asyncio.gather(*(reader.until("summary") for reader in readers))
        shutil.rmtree(tmp_path / "store" / "run")
        for reader in readers:
            assert "deleted" in (await reader.until("trouble"))["error"]
            assert await reader.ended()
        late = Reader(hubs.run(view).messages(None))
        await late.until("trouble")
        assert await late.ended()

    run(test())


def test_a_run_of_the_same_name_is_another(tmp_path: Path, record: RunRecord) -> None:
    async def test() -> None:
        train(record, 1, 3)
        store = StoreView(str(tmp_path / "store"), tmp_path / "cache")
        hubs = Hubs(store)
        reader = Reader(hubs.run(store.run("run")).messages(None))
        await reader.until("summary")
        record.close()
        shutil.rmtree(tmp_path / "store" / "run")
        train(new_run(tmp_path / "store", steps=77), 1, 20)
        await reader.until("trouble")
        assert await reader.ended()
        again = Reader(hubs.run(store.run("run")).messages(reader.last_id))
        assert (await again.until("summary"))["steps"] == 77
        assert again.told[0][0] == "reset" and again.steps() == []
        await again.go()

    run(test())


def test_the_store_is_told_whenever_a_run_changes(tmp_path: Path, record: RunRecord) -> None:
    async def test() -> None:
        hubs, _ = server(tmp_path)
        reader = Reader(hubs.store().messages(None))
        assert [row["run"] for row in await reader.until("runs")] == ["run"]
        new_run(tmp_path / "store", "other")
        while len(await reader.until("runs")) < 2:
            pass
        told = len(reader.told)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.until("runs"), 0.3)
        assert len(reader.told) == told
        await reader.go()

    run(test())


def test_a_reader_that_leaves_during_a_look_leaves_no_task(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        hubs, view = server(tmp_path)
        for _ in range(20):
            task = asyncio.ensure_future(Reader(hubs.run(view).messages(None)).until("never"))
            await asyncio.sleep(0.01)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.sleep(0.1)
        assert hubs.run(view).is_idle

    run(test())


def test_a_remote_store_is_asked_less_often(tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(record.store), "is_local", False)
    store = StoreView(str(tmp_path / "store"), tmp_path / "cache")
    assert StoreHub(store)._every_s == RunHub(store.run("run"))._every_s == stream.REMOTE_EVERY_S
