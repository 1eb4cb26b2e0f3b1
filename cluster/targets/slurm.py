"""A Slurm site, from a machine that has its commands: a login node.

The job's script carries the config, so that what was submitted runs also when it is queued again. In the allocation
cluster/targets/slurm_job.py starts Ray on all nodes and the launcher on the first.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from cluster.targets import Job, Queued, State, Status, same_store
from configs.errors import NotFound, TimedOut, Unreachable, UsageError
from configs.targets import SlurmTarget

COMMAND_TIMEOUT_S = 10.0
JOBS = "jobs"  # a folder of the store
END_OF_RECIPE = "END_OF_RECIPE"
_STATES: dict[str, State] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"), "pending"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"), "running"),
    "COMPLETED": "finished",
    "CANCELLED": "stopped",
}  # any other is a failure
# What sbatch says -> what to do about it.
_REFUSALS = (
    ("nvalid partition", "`sinfo` lists the partitions; set the target's partition to one of them."),
    ("nvalid account", "`sacctmgr show assoc user=$USER` lists the accounts; set the target's account to one of them."),
    ("node configuration is not available", "No node has so many CPUs, GPUs or so much memory: set a smaller "
     "workers_per_node in the target, or ask for less in resources."),
    ("time limit", "The partition allows less: set a shorter time in the target."),
    ("ode count specification invalid", "The partition allows fewer nodes: use fewer workers, or more on each node."),
)  # fmt: skip
_REASONS = {
    "Resources": "the nodes it needs are busy",
    "Priority": "jobs of a higher priority are before it",
    "BeginTime": "it was queued again, and starts after a while",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "PartitionDown": "the partition is down",
    "Dependency": "a job that it depends on has not ended",
    "JobHeldUser": "it is held; `scontrol release` lets it go",
    "JobHeldAdmin": "an administrator holds it",
}
_WIDTH = 500  # of a column of squeue, which cuts what is longer
_FIELDS = (
    *("JobID", "Name", "UserName", "State", "PriorityLong", "NumNodes", "NumCPUs", "Partition", "Reason"),
    *("Comment", "SubmitTime", "StartTime"),
)
# Of these none goes by itself.
_NEVER = {
    "PartitionConfig": "The partition has no such nodes: set a smaller workers_per_node in the target.",
    "BadConstraints": "No node has all that is asked for: look at the target's options, and at resources.",
    "PartitionNodeLimit": "The partition gives fewer nodes: use fewer workers, or more on each node.",
    "PartitionTimeLimit": "The partition gives less time: set a shorter time in the target.",
    "InvalidAccount": "Set the target's account to one of `sacctmgr show assoc user=$USER`.",
    "InvalidQOS": "Set another --qos in the target's options.",
    "QOSMaxNodePerUserLimit": "The QOS gives a user fewer nodes: use fewer workers.",
    "QOSMaxGRESPerUser": "The QOS gives a user fewer GPUs: use fewer workers.",
}


class Target:
    """See cluster/targets/__init__.py."""

    def __init__(self, settings: SlurmTarget) -> None:
        self._settings = settings

    def render(self, job: Job) -> str:
        """The script that sbatch gets."""
        settings, resources = self._settings, job.resolved.config.resources
        per_node = min(settings.workers_per_node, resources.workers)
        options = {
            "job-name": _job_name(job.run),
            "comment": job.resolved.config.store,
            "nodes": -(-resources.workers // per_node),
            "ntasks-per-node": 1,
            "cpus-per-task": per_node * resources.threads,
            "gpus-per-node": per_node * resources.gpus_per_worker or None,
            "partition": settings.partition,
            "account": settings.account,
            "time": settings.time,
            "signal": f"B:USR1@{settings.notice_s}",
            "output": f"{_folder(job)}/{job.run}-%j.log",
            "open-mode": "append",
        }
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
        lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in settings.options)]
        if resources.fewest < resources.workers:
            lines.append("#SBATCH --no-kill")  # a node that fails does not end the job: the run goes on without it
        python = shlex.quote(settings.python or sys.executable)
        return "\n".join(
            [
                "#!/bin/bash",
                *lines,
                *settings.setup,
                f"exec {python} -m cluster.targets.slurm_job {shlex.quote(_folder(job))} <<'{END_OF_RECIPE}'",
                job.recipe.rstrip("\n"),
                END_OF_RECIPE,
                "",
            ]
        )

    def submit(self, job: Job) -> str:
        """By sbatch."""
        script = self.render(job)
        if job.recipe.count(END_OF_RECIPE):
            raise UsageError(f"The recipe holds {END_OF_RECIPE}, which ends it in the job's script. Leave it out.")
        Path(_folder(job)).mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and says nothing without it
        return self._call("sbatch", "--parsable", given=script).partition(";")[0].strip()

    def find(self, run: str, store: str) -> str | None:
        """By its name and its store, among the user's jobs."""
        listed = self._call("squeue", "--me", "--noheader", f"--name={_job_name(run)}", "--Format=JobID:20,Comment:500")
        for line in listed.splitlines():
            job_id, _, comment = line.strip().partition(" ")
            if same_store(comment.strip(), store):
                return job_id
        return None

    def status(self, job_id: str) -> Status:
        """As the controller tells it, which forgets an ended job after some minutes."""
        fields = self._show(job_id)
        if fields is None:
            return Status("gone", f"Slurm knows no job {job_id} any more")
        slurm_state = fields["JobState"]
        state = _STATES.get(slurm_state, "failed")
        reason = fields.get("Reason", "None")
        if state == "pending" and reason in _NEVER:
            return Status("refused", f"{reason}. {_NEVER[reason]}")
        code = int(fields["ExitCode"].partition(":")[0]) if state in ("finished", "failed") else None
        said = slurm_state if reason == "None" else f"{slurm_state} ({reason})"
        return Status(state, said, code)

    def why_pending(self, job_id: str) -> str:
        """Slurm's reason, what it means, and when it believes that the job will start."""
        fields = self._show(job_id) or {}
        reason = fields.get("Reason", "None")
        text = _explained(reason)
        start = fields.get("StartTime", "Unknown")
        return text if start in ("Unknown", "N/A") else f"{text}; it may start at {start}"

    def queue(self) -> list[Queued]:
        """As squeue lists them, with the time at which Slurm believes each to start."""
        listed = self._call(
            *("squeue", "--noheader", "--sort=-T,-p,i", "--states=PENDING,RUNNING,COMPLETING"),
            "--Format=" + ",".join(f"{name}:{_WIDTH}" for name in _FIELDS),
        )
        jobs, position = [], 0
        for line in listed.splitlines():
            values = [line[start : start + _WIDTH].strip() for start in range(0, _WIDTH * len(_FIELDS), _WIDTH)]
            job = dict(zip(_FIELDS, values, strict=True))
            if not job["Name"].startswith(_job_name("")):
                continue
            waits = job["State"] == "PENDING"
            position += waits
            jobs.append(
                Queued(
                    job=job["JobID"],
                    run=job["Name"].removeprefix(_job_name("")),
                    user=job["UserName"],
                    state="waiting" if waits else "running",
                    asks=f"{job['NumNodes']} nodes of {job['Partition']}, {job['NumCPUs']} CPUs",
                    why=_explained(job["Reason"]) if waits else "",
                    store=job["Comment"],
                    position=position if waits else None,
                    priority=int(job["PriorityLong"]),
                    submitted_at=_epoch(job["SubmitTime"]),
                    may_start=_epoch(job["StartTime"]) if waits else None,
                )
            )
        return jobs

    def logs(self, job_id: str) -> str:
        """The script's output so far."""
        fields = self._show(job_id)
        path = None if fields is None else fields.get("StdOut")
        if path is None or not os.path.exists(path):
            raise NotFound(f"Job {job_id} has no log yet.")
        return Path(path).read_text(errors="replace")

    def stop(self, job_id: str) -> None:
        """SIGTERM to the batch script, which hands it on to the launcher; a job that waits is cancelled."""
        waits = self.status(job_id).state in ("pending", "refused")
        self._call("scancel", *([] if waits else ["--batch", "--signal=TERM"]), job_id)

    def _show(self, job_id: str) -> dict[str, str] | None:
        try:
            text = self._call("scontrol", "show", "job", "--oneliner", job_id)
        except UsageError as error:
            if "Invalid job id" in str(error):
                return None
            raise
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def _call(self, *command: str, given: str | None = None) -> str:
        """What one of Slurm's commands prints."""
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
        except FileNotFoundError:
            raise Unreachable(
                f"There is no {command[0]} on this machine. Submit from a login node of the Slurm site, or install "
                "Slurm's commands and its configuration here."
            ) from None
        except subprocess.TimeoutExpired:
            raise TimedOut(
                f"{command[0]} has not answered for {COMMAND_TIMEOUT_S:.0f} s. Is Slurm's controller up? Ask it: "
                "`scontrol ping`."
            ) from None
        if done.returncode == 0:
            return done.stdout
        said = " ".join(line.partition("error: ")[2] or line for line in done.stderr.strip().splitlines())
        if "contact slurm controller" in said or "configuration source" in said or "onnect" in said:
            raise Unreachable(f"Slurm's controller cannot be reached: {said} See `scontrol ping`.")
        remedy = next((remedy for part, remedy in _REFUSALS if part in said), "See `man sbatch`.")
        raise UsageError(f"Slurm refuses: {said}. {remedy}")


def _explained(reason: str) -> str:
    return f"{reason}: {_REASONS[reason]}" if reason in _REASONS else reason


def _epoch(time: str) -> float | None:
    """Slurm's local time in epoch seconds; None for N/A."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(time).timestamp()
    return None


def _job_name(run: str) -> str:
    return f"shardyard-{run}"


def _folder(job: Job) -> str:
    return f"{job.resolved.config.store.rstrip('/')}/{JOBS}"
