"""What a job on a Ray cluster runs: it waits for its turn in the cluster's queue, and launches the run beside it.

    python -m cluster.targets.ray_job JOB --user ada --priority 5      in the folder that holds run.yaml

The launcher is a process of its own, so that one that waits is small. A run that makes room for another saves, and the
job waits again: it is one job from its submission to the run's end.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

from cluster.ray_cluster import join
from cluster.ray_placement import group_name, worker_needs
from cluster.ray_queue import Seat
from cluster.record_tail import RecordTail
from cluster.scheduling import Request
from configs.errors import Preempted, ShardyardError, UsageError
from configs.load import load
from configs.schema import RunConfig
from data_pipelines.storage import Store
from trainer.record import RunRecord
from trainer.record_rows import decode_value

RECIPE = "run.yaml"
POLL_S = 1.0
MAKES_ROOM = "it makes room for another run"


def main(argv: list[str]) -> int:
    """The job's exit code is the launcher's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--user", required=True)
    parser.add_argument("--priority", type=int, default=0)
    parser.add_argument("--submitted-at", type=float, required=True)
    parser.add_argument("--expected-s", type=float, default=None)
    arguments = parser.parse_args(argv)
    config = load(RECIPE).config
    resources = config.resources
    request = Request(
        job=arguments.job,
        user=arguments.user,
        worker=worker_needs(resources),
        fewest=resources.fewest,
        most=resources.most,
        priority=arguments.priority,
        submitted_at=arguments.submitted_at,
        expected_s=arguments.expected_s,
    )
    join("auto")
    seat = Seat(request, group_name(Store(config.store).uri, config.name))
    try:
        return Waiter(seat, config).serve()
    finally:
        seat.leave()


class Waiter:
    """Waits, launches, and makes room. SIGTERM, which Ray sends to the launcher as well, ends all of it."""

    def __init__(self, seat: Seat, config: RunConfig) -> None:
        self._seat = seat
        self._config = config
        self._told_to_end = False
        signal.signal(signal.SIGTERM, self._end)

    def serve(self) -> int:
        """The exit code of the last launcher."""
        while True:
            code = self._wait_for_turn()
            if code is not None:
                return code
            code, made_room = self._launch()
            if self._told_to_end or not made_room:
                return code
            self._event("queued", reason=MAKES_ROOM)
            self._seat.wait_again()

    def _wait_for_turn(self) -> int | None:
        """None once it is its turn; an exit code where that never comes."""
        told = ""
        while (reply := self._seat.ask()).verdict != "start":
            if reply.verdict == "refused":
                self._event("failed", error=reply.why, summary=reply.why, final=True)
                print(reply.why, flush=True)
                return UsageError.exit_code
            if self._told_to_end:
                saved = self._record().checkpoints()
                step = saved[-1]["step"] if saved else 0
                self._event("stopped", step=step, reason="stopped while it waited in the queue")
                return Preempted.exit_code
            if reply.why != told:
                told = reply.why
                print(f"Waiting: {told}", flush=True)
            time.sleep(POLL_S)
        return None

    def _launch(self) -> tuple[int, bool]:
        """The launcher's exit code, and whether it ended only to make room."""
        process = subprocess.Popen([sys.executable, "-m", "cluster.cli", "train", RECIPE, "--address", "auto"])
        tail, leaving = RecordTail(self._record()), False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(POLL_S)
                break
            leaving |= self._seat.ask(self._left_s(tail)).verdict == "leave"
            if (leaving or self._told_to_end) and self._record().stop_requested() is None:
                self._record().request_stop(MAKES_ROOM)  # again, if the launcher came after: it forgets what was before
        record = self._record()
        made_room = code == 0 and record.status() == "stopped" and record.stop_requested() == MAKES_ROOM
        return code, made_room or code == Preempted.exit_code

    def _left_s(self, tail: RecordTail) -> float | None:
        """What is left of the run by its newest step, in seconds."""
        with contextlib.suppress(ShardyardError, OSError):  # a store that is away is not the queue's affair
            tail.read()
            if tail.latest is not None and "step_s" in tail.latest["values"]:
                return (self._config.steps - tail.latest["step"]) * float(decode_value(tail.latest["values"]["step_s"]))
        return None

    def _record(self) -> RunRecord:
        return RunRecord.open(self._config.store, self._config.name)

    def _event(self, kind: str, **fields: Any) -> None:
        """Into the record, while no launcher writes there."""
        with contextlib.closing(self._record()) as record:
            record.event(kind, **fields)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._told_to_end = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
