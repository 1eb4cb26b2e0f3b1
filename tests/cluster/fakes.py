"""A controller's surroundings in memory: a clock, a record, and workers that a script lets fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.controller import Controller, Outcome
from cluster.policies import WorkerStatus
from configs.errors import Unreachable
from configs.schema import RecoveryConfig

STEPS = 50
SAVE_EVERY = 10
SILENCE_S = 5.0


@dataclass
class FakeClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeRecord:
    attempt: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    stop_file: bool = False

    def next_attempt(self) -> int:
        self.attempt += 1
        return self.attempt

    def event(self, kind: str, **fields: Any) -> None:
        self.rows.append({"kind": kind, "attempt": self.attempt, **fields})

    def stop_requested(self) -> str | None:
        return "asked by a file" if self.stop_file else None

    def checkpoints(self) -> list[dict[str, Any]]:
        return [{"step": step, "path": f"checkpoints/step-{step:08d}"} for step in self.saved]

    @property
    def kinds(self) -> list[str]:
        return [row["kind"] for row in self.rows]


class FakeGroup:
    """Workers that take one step a poll; `script` maps (attempt, step) to what befalls them then."""

    def __init__(self, record: FakeRecord, clock: FakeClock, script: dict[tuple[int, int], str], size: int = 2) -> None:
        self.record, self.clock, self.script, self.size = record, clock, script, size
        self.alive = False
        self.attempt = 0
        self.prepared = 0
        self.kills = 0
        self.stopping = False
        self.workers: list[WorkerStatus] = []
        self.befallen: str | None = None
        self.rooms: list[int] = []  # for how many workers there is room, at each look
        self.to_be_had: int | None = None  # of the room that is promised

    def prepare(self, attempt: int, *, grow: bool = False) -> dict[str, Any]:
        assert not self.alive, "the attempt before was not killed"
        if self.script.get((attempt, -1)) == "no room":
            raise Unreachable("needs 4 CPUs, the cluster has 2")
        self.attempt, self.alive, self.befallen, self.stopping = attempt, True, None, False
        self.prepared += 1
        if self.rooms:
            self.size = self.rooms[0] if grow or self.prepared == 1 else min(self.size, self.rooms[0])
        if self.to_be_had is not None:
            self.size = min(self.size, self.to_be_had)
        start = self.record.saved[-1] if self.record.saved else 0
        self.workers = [
            WorkerStatus(rank, "node-a", "starting", log=f"rank-{rank:05d}.log", step=start, steps=STEPS)
            for rank in range(self.size)
        ]
        return {"workers": [{}] * self.size}

    def room(self) -> int:
        if len(self.rooms) > 1:
            self.rooms.pop(0)
        return self.rooms[0] if self.rooms else self.size

    def start(self, cancelled: Callable[[], bool]) -> None:
        if not cancelled():
            self.workers = [replace(worker, state="running", phase="forward") for worker in self.workers]

    def poll(self, timeout_s: float) -> list[WorkerStatus]:
        self.clock.now += timeout_s
        if self.befallen is None and all(worker.state == "running" for worker in self.workers):
            self._advance()
        elif self.befallen is not None and self.befallen.startswith("hang"):
            self._hang(timeout_s)
        elif self.befallen == "peer first":
            self.workers[0] = replace(self.workers[0], state="died", error="the process is gone")
        return list(self.workers)

    def _advance(self) -> None:
        step = self.workers[0].step + 1
        happens = self.script.get((self.attempt, step))
        if happens is not None:
            self.befallen = happens
            self._befall(happens)
            return
        self.workers = [replace(worker, step=step) for worker in self.workers]
        if self.stopping and self.script.get((self.attempt, -2)) == "no save":
            self.befallen = "user error"
            self._befall(self.befallen)
            return
        if step % SAVE_EVERY == 0 or self.stopping or step == STEPS:
            self.record.saved.append(step)
        if step == STEPS or self.stopping:
            state = "finished" if step == STEPS else "stopped"
            self.workers = [replace(worker, state=state) for worker in self.workers]  # type: ignore[arg-type]

    def _befall(self, happens: str) -> None:
        victim = self.workers[-1]
        if happens == "kill":
            self.workers[-1] = replace(victim, state="died", error="the process is gone", unanswered_s=0.3)
        elif happens in ("raise", "user error"):
            mine = happens == "user error"
            self.workers[-1] = replace(victim, state="raised", error="ValueError: x", failed_at=1.0, user_error=mine)
        elif happens == "peer first":
            error = "RuntimeError: Connection closed by peer"
            self.workers[-1] = replace(victim, state="raised", error=error, failed_at=1.0)

    def _hang(self, seconds: float) -> None:
        answers = self.befallen == "hang in python"
        for i, worker in enumerate(self.workers):
            is_victim = i == len(self.workers) - 1
            unanswered_s = worker.unanswered_s + seconds if is_victim and not answers else 0.0
            self.workers[i] = replace(worker, quiet_s=worker.quiet_s + seconds, unanswered_s=unanswered_s)

    def request_stop(self) -> None:
        self.stopping = True

    def stacks(self) -> dict[int, str]:
        return {len(self.workers) - 1: 'File "stuck.py", line 1 in wait'} if "python" in str(self.befallen) else {}

    def kill(self) -> None:
        self.kills += 1
        self.alive = False


class Bench:
    def __init__(self, script: dict[tuple[int, int], str] | None = None, **recovery: Any) -> None:
        self.clock, self.record, self.notices = FakeClock(), FakeRecord(), []  # type: ignore[var-annotated]
        self.group = FakeGroup(self.record, self.clock, script or {})
        settings = {"silence_s": SILENCE_S, "collective_timeout_s": 100.0, **recovery}
        self.controller = Controller(
            self.group,
            self.record,
            RecoveryConfig(**settings),
            resume_command="shardyard runs resume demo",
            notice=self.notices.append,
            clock=self.clock,
        )

    def run(self) -> Outcome:
        try:
            self.controller.prepare()
            return self.controller.run()
        except BaseException as error:
            self.controller.fail(error)
            raise
        finally:
            assert not self.group.alive


def at_step(bench: Bench, step: int, act: Callable[[], None]) -> None:
    poll = bench.group.poll

    def acting_poll(timeout_s: float) -> list[WorkerStatus]:
        if bench.group.workers[0].step == step:
            act()
        return poll(timeout_s)

    bench.group.poll = acting_poll  # type: ignore[method-assign]
