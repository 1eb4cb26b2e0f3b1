"""A run that is sent to a target, from its submission to its end, as whoever sent it sees it."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

from cluster.commands.output import run_arguments
from cluster.progress_bar import Narrator, View
from cluster.record_tail import RecordTail
from cluster.targets import ENDED, Job, Status, Target
from configs.errors import RunFailed, ShardyardError, TimedOut, Unreachable, UsageError
from data_pipelines.storage import Store
from trainer.record import RunRecord
from trainer.record_rows import decode_value

POLL_S = 2.0
# How long a job is believed to be as it was while neither its target answers nor its run shows that it lives.
PATIENCE_S = 30.0
TAIL_LINES = 15


def shared_store(job: Job) -> Store:
    """The run's store, refused where a target could not see the same. It may be out of sight from here."""
    uri = job.resolved.config.store
    if "://" not in uri and not uri.startswith("/"):
        raise UsageError(
            f"store={uri} is a folder of this machine, relative to this one. For a target give one that its nodes "
            "and this machine see alike: an absolute path on a shared file system, or an object store "
            "(store=/shared/runs, store=s3://bucket/runs)."
        )
    return Store(uri)


def send(target: Target, name: str, job: Job) -> str:
    """Queue the run, or find its job that is queued or running already; the job's id.

    What the target refuses leaves no new record behind: the name is free for the corrected run.
    """
    store = shared_store(job)
    known = target.find(job.run, job.resolved.config.store)
    if known is not None:
        return known
    is_new = not store.exists(job.run)
    record = RunRecord.create(store, job.resolved)  # refused here, not there, if the name is another run's
    if record.status() == "finished":
        raise UsageError(
            f"Run '{job.run}' has finished already; there is nothing left to train. Start a new run under another name "
            f"(name=...), from this one's weights if you like: --from {job.run}."
        )
    record.event("submitted", target=name)
    record.close()  # before the job's launcher writes
    try:
        return target.submit(job)
    except UsageError:
        if is_new:
            store.delete_dir(job.run)
        raise


class Following:
    """Tells of a job until it ends. Ctrl-C leaves it: the job goes on."""

    def __init__(self, target: Target, name: str, job: Job, job_id: str, *, json: bool) -> None:
        self._target, self._name, self._job, self._id = target, name, job, job_id
        self._narrator = Narrator(sys.stderr if json else sys.stdout)
        self._record = RunRecord.open(job.resolved.config.store, job.run)
        self._tail = RecordTail(self._record)
        self._status = Status("pending")  # as heard last
        self._alive_at = time.monotonic()
        self._out_of_reach = False

    def wait(self) -> dict[str, Any]:
        """How it ended.

        Raises:
            RunFailed: with the run's own account where it has one, else with the last lines of the job's log.
            Unreachable: the target has been out of reach, and the run without a sign of life, for too long.
        """
        try:
            while (status := self._ask()).state not in ENDED:
                self._show(status)
                time.sleep(POLL_S)
            self._show(status)
        finally:
            self._narrator.close()
        return self._ended(status)

    def _ask(self) -> Status:
        """The job's status; the last one, while its run lives all the same."""
        try:
            status = self._target.status(self._id)
            if status.state == "pending":
                status = replace(status, reason=self._target.why_pending(self._id))
        except (Unreachable, TimedOut) as error:
            return self._without_target(error)
        if self._out_of_reach:
            self._narrator.notice(f"{self._name} answers again.")
        self._out_of_reach, self._alive_at = False, time.monotonic()
        if status.state != "gone" or self._record.holder() is None:
            self._status = status
        return self._status

    def _without_target(self, error: ShardyardError) -> Status:
        if not self._out_of_reach:
            self._narrator.notice(f"{self._name} is out of reach; the run is followed by its own record. {error}")
        self._out_of_reach = True
        outcome = self._record.status()
        if outcome == "finished":
            return Status("finished")
        if self._record.holder() is not None:
            self._alive_at = time.monotonic()
        if time.monotonic() - self._alive_at <= PATIENCE_S:
            return self._status
        if outcome in ("stopped", "failed"):  # only now: the target might have queued it again
            return Status(outcome)
        raise Unreachable(
            f"{self._name} is out of reach, and run '{self._job.run}' has shown no sign of life for "
            f"{PATIENCE_S:.0f} s: {self._go_on()} {error}"
        )

    def _go_on(self) -> str:
        saved = self._record.checkpoints()
        where = f"saved after step {saved[-1]['step']:,}" if saved else "before its first checkpoint"
        return f"it is {where}. Once {self._name} is back, the same command goes on with it."

    def _show(self, status: Status) -> None:
        evaluations, warnings = self._tail.read(now=True)
        for warning in warnings:
            self._narrator.notice(warning)
        for step, values in evaluations:
            self._narrator.evaluation(step, values)
        latest = self._tail.latest
        if status.state == "pending":
            self._narrator.show(View(f"waiting at {self._name}: {status.reason or 'it gives no reason'}"))
        elif latest is None:
            self._narrator.show(View(f"starting at {self._name}"))
        else:
            values = {key: decode_value(value) for key, value in latest["values"].items()}
            steps = self._job.resolved.config.steps
            self._narrator.show(View("", latest["step"], steps, values["loss"], values.get("tokens_per_s")))

    def _ended(self, status: Status) -> dict[str, Any]:
        if status.state == "refused":
            self._target.stop(self._id)
            raise UsageError(f"{self._name} will never start the job, which was taken back: {status.reason}")
        outcome = self._record.status()
        failures = [event for event in self._record.events() if event["kind"] == "failed"]
        if outcome in ("finished", "stopped"):
            rows = self._record.stitched()
            step = rows[-1]["step"] if rows else 0
            return {"run": self._job.run, "outcome": outcome, "step": step, "target": self._name, "job": self._id}
        if outcome == "failed" and failures:
            summary = failures[-1].get("summary") or failures[-1].get("error")
            if status.exit_code == UsageError.exit_code:  # it was never begun
                raise UsageError(f"{self._name} refuses the run: {summary}")
            named = run_arguments(self._job.run, self._job.resolved.config.store)
            raise RunFailed(
                f"{summary} (job {self._id} at {self._name}) All of it: shardyard runs show {named}. Once that is put "
                "right, the same command goes on with the run."
            )
        if status.state == "gone":
            raise Unreachable(
                f"{self._name} has lost job {self._id} ({status.reason}), as when its cluster was started anew, and "
                f"run '{self._job.run}' has not ended: {self._go_on()}"
            )
        reason = status.reason or status.state
        if status.exit_code is not None and f"exit code {status.exit_code}" not in reason:
            reason += f", exit code {status.exit_code}"
        raise RunFailed(f"Job {self._id} at {self._name} has ended without the run: {reason}.{self._last_lines()}")

    def _last_lines(self) -> str:
        try:
            lines = self._target.logs(self._id).splitlines()[-TAIL_LINES:]
        except ShardyardError as error:
            return f" Its log cannot be had: {error}"
        return "\n".join([" Its last lines:", *lines]) if lines else " It has printed nothing."
