"""`shardyard runs ls | show | stop | sync | resume` and `shardyard logs`: what a store knows, cluster or no cluster."""

from __future__ import annotations

import codecs
import sys
import time
from argparse import Namespace
from typing import Any

from cluster.commands.output import age, facts, run_arguments, say, table
from cluster.targets import ENDED, Target
from configs.errors import NotFound, ShardyardError, TimedOut, UsageError
from data_pipelines.storage import Store
from trainer.record import RunRecord, attempt_folder, latest_attempt, list_runs

STOP_TIMEOUT_S = 300.0
CANCEL_TIMEOUT_S = 60.0
POLL_EVERY_S = 0.5


def ls(arguments: Namespace) -> list[dict[str, Any]]:
    """One line a run, the newest first."""
    rows = [_summary_or_damage(arguments.store, name) for name in list_runs(Store(arguments.store))]
    rows.sort(key=lambda row: row["started_at"] or 0.0, reverse=True)
    if not rows:
        say(
            arguments, f"No runs in {Store(arguments.store).uri}. Start one: shardyard train language_modeling-gpt-tiny"
        )
        return []
    header = ("RUN", "STATUS", "WHERE", "STEP", "OF", "LOSS", "TOK/S", "ETA", "RESTARTS", "AGE")
    shown = [
        (
            row["run"],
            row["status"],
            row["where"],
            row["step"],
            row["steps"],
            row["loss"],
            row["tokens_per_s"],
            None if row["eta_s"] is None else age(row["eta_s"]),
            row["restarts"],
            None if row["started_at"] is None else age(time.time() - row["started_at"]),
        )
        for row in rows
    ]
    table(arguments, header, shown)
    for row in rows:
        if "error" in row:
            say(arguments, f"\n{row['run']}: {row['error']}")
    return rows


def show(arguments: Namespace) -> dict[str, Any]:
    """One run: where it stands, its attempts and checkpoints, and what failed first."""
    record = RunRecord.open(arguments.store, arguments.run)
    waste = [event["packing_waste"] for event in record.events() if "packing_waste" in event]
    summary = _summary(record) | {"packing_waste": waste[-1] if waste else None}
    hidden = ("started_at", "eta_s", "packing_waste")
    shown = {key: value for key, value in summary.items() if key not in hidden}
    if waste:
        shown["padding"] = f"{100 * waste[-1]:.2g} % of the packed sequences"
    memory = _memory(record)
    if memory is not None:
        predicted = memory["predicted_bytes"]
        beside = "" if predicted is None else f", {predicted / 1e9:.2f} GB predicted"
        shown["memory"] = f"{memory['peak_bytes'] / 1e9:.2f} GB at most (rank {memory['rank']}){beside}"
    facts(arguments, shown)
    attempts = record.attempts()
    if attempts:
        say(arguments)
        table(
            arguments,
            ("ATTEMPT", "FROM STEP", "OUTCOME"),
            [(row["attempt"], row["start_step"], row["outcome"]) for row in attempts],
        )
    checkpoints = record.checkpoints()
    if checkpoints:
        say(arguments)
        table(arguments, ("CHECKPOINT", "PATH"), [(row["step"], row["path"]) for row in checkpoints])
    failures = [event for event in record.events() if event["kind"] == "failed"]
    for failure in failures[-1:]:
        say(arguments, f"\nLast failure (attempt {failure['attempt']}): {failure.get('summary', failure.get('error'))}")
        if failure.get("stack"):
            say(arguments, "\n".join(["It was here (innermost first):", *failure["stack"].splitlines()[:8]]))
    return summary | {"memory": memory, "attempts": attempts, "checkpoints": checkpoints, "failures": failures}


def _memory(record: RunRecord) -> dict[str, Any] | None:
    """What the worker that took the most has measured in the latest attempt, and what was predicted before it."""
    events = record.events()
    measured = [event for event in events if event["kind"] == "memory"]
    if not measured:
        return None
    latest = [event for event in measured if event["attempt"] == measured[-1]["attempt"]]
    most = max(latest, key=lambda event: int(event["peak_bytes"]))
    predicted = [event["measurable_bytes"] for event in events if event["kind"] == "planned"]
    named = {name: most[name] for name in ("rank", "peak_bytes", "base_bytes")}
    return named | {"predicted_bytes": predicted[-1] if predicted else None}


def stop(arguments: Namespace) -> dict[str, Any]:
    """Ask a run to save and stop, and wait until it has."""
    record = RunRecord.open(arguments.store, arguments.run)
    named = run_arguments(record.name, arguments.store)
    holder = record.holder()
    if holder is None and record.status() == "queued" and (job := _queued_job(record)) is not None:
        return _cancel(arguments, record, *job)
    if holder is None:
        raise UsageError(
            f"Run '{record.name}' is not running, so it cannot be stopped: its status is {record.status()}."
        )
    record.request_stop("asked by `shardyard runs stop`")
    say(arguments, f"Asked '{record.name}' to save and stop.")
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while record.holder() is not None:
        if time.monotonic() > deadline:
            raise TimedOut(
                f"The run '{record.name}' has not stopped within {STOP_TIMEOUT_S:.0f} s. It stops after the step it is "
                f"in: wait, or look at `shardyard logs {named}`."
            )
        time.sleep(POLL_EVERY_S)
    status = record.status()
    go_on = "" if status == "finished" else f" Go on with it: shardyard runs resume {named}"
    say(arguments, f"'{record.name}' has {status}.{go_on}")
    return _summary(record)


def _queued_job(record: RunRecord) -> tuple[Target, str, str] | None:
    """The target that a run was sent to, the target's name, and the run's job there; None where it has none."""
    from cluster.targets import open_target
    from configs.targets import load_target

    sent = [event["target"] for event in record.events() if event["kind"] == "submitted"]
    if not sent:
        return None
    target = open_target(load_target(sent[-1]))
    job_id = target.find(record.name, record.config.store)
    return None if job_id is None else (target, sent[-1], job_id)


def _cancel(arguments: Namespace, record: RunRecord, target: Target, name: str, job_id: str) -> dict[str, Any]:
    """Take a job back that waits."""
    target.stop(job_id)
    say(arguments, f"Took job {job_id} back, in which '{record.name}' waited at {name}.")
    deadline = time.monotonic() + CANCEL_TIMEOUT_S
    while target.status(job_id).state not in ENDED:
        if time.monotonic() > deadline:
            raise TimedOut(f"Job {job_id} has not ended within {CANCEL_TIMEOUT_S:.0f} s. Look at it: shardyard queue.")
        time.sleep(POLL_EVERY_S)
    if record.status() == "queued":  # its launcher had not begun, so nobody else writes
        saved = record.checkpoints()
        record.event("stopped", step=saved[-1]["step"] if saved else 0, reason=f"taken back at {name}")
    return _summary(record)


def sync(arguments: Namespace) -> dict[str, Any]:
    """Send MLflow what it has missed of a run."""
    from cluster.mlflow_copy import sync as sync_record

    record = RunRecord.open(arguments.store, arguments.run)
    sync_record(record)
    say(arguments, f"MLflow has all of '{record.name}'.")
    return {"run": record.name}


def resume(arguments: Namespace) -> dict[str, Any]:
    """Go on with a run, in the foreground, from its own resolved config."""
    from cluster.commands.train import foreground

    record = RunRecord.open(arguments.store, arguments.run)
    return foreground(arguments, record.config, [])


def logs(arguments: Namespace) -> dict[str, Any] | None:
    """Print a rank's log; with --follow go on as it grows, and with the attempts that follow, until the run ends."""
    record = RunRecord.open(arguments.store, arguments.run)
    if arguments.follow and not arguments.json:
        _follow(record, arguments.rank, arguments.attempt)
        return None
    path = _log_file(arguments.attempt or record.attempt, arguments.rank)
    if not record.store.exists(path):
        raise _no_log(record, path)
    text = record.store.read_bytes(path).decode("utf-8", "replace")
    say(arguments, text.removesuffix("\n"))
    return {"path": record.store.path(path), "text": text}


def _follow(record: RunRecord, rank: int, only_attempt: int | None) -> None:
    """Print logs as they grow: of the latest attempt and those after it, or of one alone."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    attempt, shown_bytes = only_attempt or record.attempt, 0
    while True:
        running = record.holder() is not None
        latest = only_attempt or latest_attempt(record.store)  # looked up before the log is read to its end
        path = _log_file(attempt, rank)
        there = record.store.exists(path)
        if there:
            with record.store.open_input(path) as file:
                file.seek(shown_bytes)
                data = file.read()
            sys.stdout.write(decoder.decode(data))
            sys.stdout.flush()
            shown_bytes += len(data)
        if attempt < latest:
            attempt, shown_bytes = attempt + 1, 0
            continue
        if not running:
            if not there:
                raise _no_log(record, path)
            return
        time.sleep(POLL_EVERY_S)


def _log_file(attempt: int, rank: int) -> str:
    return f"{attempt_folder(attempt)}/rank-{rank:05d}.log"


def _no_log(record: RunRecord, path: str) -> NotFound:
    names = [
        f"attempt {int(folder)}: {name}"
        for folder in record.store.list_dirs("attempts")
        for name in record.store.list(f"attempts/{folder}")
        if name.endswith(".log")
    ]
    return NotFound(f"There is no {record.store.path(path)}. There is: {', '.join(names) or 'no log yet'}.")


def _summary_or_damage(store: str, name: str) -> dict[str, Any]:
    try:
        return _summary(RunRecord.open(store, name))
    except ShardyardError as error:  # one broken run must not hide the others
        nothing = dict.fromkeys(("where", "step", "steps", "loss", "tokens_per_s", "eta_s", "started_at"))
        return {"run": name, "status": "damaged", **nothing, "restarts": 0, "error": str(error)}


def _summary(record: RunRecord) -> dict[str, Any]:
    """What `runs ls` shows of a run, as plain values."""
    rows = record.stitched()
    trained = [row for row in rows if "loss" in row]
    latest = trained[-1] if trained else {}
    status = record.status()
    step = latest.get("step", 0)
    holder = record.holder()
    events = record.events()
    eta_s = (record.config.steps - step) * latest["step_s"] if status == "running" and "step_s" in latest else None
    return {
        "run": record.store.path().rstrip("/").rpartition("/")[2],
        "status": status,
        "where": holder.holder.host if holder else None,
        "step": step,
        "steps": record.config.steps,
        "loss": latest.get("loss"),
        "tokens_per_s": latest.get("tokens_per_s"),
        "eta_s": eta_s,
        "restarts": sum(event["kind"] == "restarted" for event in events),
        "started_at": events[0]["time"] if events else None,
        "folder": record.store.path(),
    }
