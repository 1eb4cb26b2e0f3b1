"""A worker body that harms its own run where a schedule says, in the middle of real training.

It writes down what it trains on. With it comes what training imports, for the process that attempts are forked from.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tests.preload  # noqa: F401
from data_pipelines.batches import MicroBatch
from tests.distributed.small_runs import allow_emulated_fp16
from trainer.progress import Progress
from trainer.session import Session
from trainer.worker import run_worker

SCHEDULE = "schedule.json"
MLFLOW = "mlflow-processes.json"
HOLD, HELD = "hold", "held"
WAIT_S = 60.0
SWITCH_S = sys.getswitchinterval()
_LIBC = ctypes.PyDLL(None)  # its calls keep Python's lock
SMALL_FILE_BYTES = 1 << 16  # what this module writes is smaller, a checkpoint's file is larger


@dataclass(frozen=True)
class Harm:
    """What befalls `rank` in attempt `attempt`, `delay_s` after it has completed `step` steps.

    kind: a function of this file. Each ends the attempt but those of OUTAGES.
    """

    kind: str
    attempt: int
    rank: int
    step: int
    delay_s: float


def make_schedule(
    seed: int, kinds: list[str], *, workers: int, steps: int, save_every: int, step_s: float
) -> list[Harm]:
    """One harm of each kind, in an order of the seed's, spread over the run, each after a checkpoint to go back to.

    And between two checkpoints, so that what follows has steps to repeat; the last one with a save before the end.
    """
    rng = random.Random(seed)
    kinds = rng.sample(kinds, len(kinds))
    part = (steps - 3 * save_every) // len(kinds)
    schedule: list[Harm] = []
    attempt = 1
    for index, kind in enumerate(kinds):
        first = 2 * save_every + index * part
        candidates = [step for step in range(first + 1, first + part) if step % save_every not in (0, save_every - 1)]
        rank = workers - 1 if kind == "full_disk" else rng.randrange(workers)  # rank 0 writes the record as well
        schedule.append(Harm(kind, attempt, rank, rng.choice(candidates), rng.uniform(0, step_s)))
        if kind not in OUTAGES:
            attempt += 2 if kind == "corrupt_shard" else 1  # the next one ends at once, and its launch with it
    return schedule


def write_schedule(store: Path, schedule: list[Harm]) -> None:
    (store / SCHEDULE).write_text(json.dumps([asdict(harm) for harm in schedule]))


def train_until_harmed(
    store_uri: str, run: str, attempt: int, rank: int, progress: Progress, **rest: Any
) -> dict[str, Any]:
    """trainer.worker.run_worker, with a thread that carries out this rank's harm and writes down where it landed."""
    folder = Path(store_uri)
    note_examples(folder, attempt, rank)
    for entry in json.loads((folder / SCHEDULE).read_text()):
        harm = Harm(**entry)
        if (harm.attempt, harm.rank) == (attempt, rank):
            arguments = (harm, progress, folder, folder / run, threading.get_ident())
            threading.Thread(target=_carry_out, args=arguments, daemon=True).start()
    return run_worker(store_uri, run, attempt, rank, progress=progress, **rest)


def train_and_hold(
    store_uri: str,
    run: str,
    attempt: int,
    rank: int,
    world_size: int,
    stop: threading.Event,
    progress: Progress,
    **rest: Any,
) -> dict[str, Any]:
    """trainer.worker.run_worker, which does not begin the step after HOLD until it is asked to stop, if it is alone.

    So it does not reach its end before there is room for more workers. It says so in HELD.
    """
    allow_emulated_fp16()
    folder = Path(store_uri)
    note_examples(folder, attempt, rank)
    hold = folder / HOLD
    if world_size == 1 and hold.exists():
        given, step_held = Session.micro_batches, int(hold.read_text())

        def held(session: Session, step: int) -> list[MicroBatch]:
            while step == step_held and not stop.wait(0.05):
                (folder / HELD).touch()
                progress.touch()
            return given(session, step)

        Session.micro_batches = held  # type: ignore[method-assign]
    return run_worker(store_uri, run, attempt, rank, world_size=world_size, stop=stop, progress=progress, **rest)


def note_examples(folder: Path, attempt: int, rank: int) -> None:
    """Have this process write down what each step is given to train on, as that step begins.

    A line of `examples-{attempt}-{rank}`: {done: completed steps before it, time: epoch seconds, ids: [[k, sample ids
    of global micro-batch k], ...]}, without idle ones. One system call a line, so that a kill loses none.
    """
    given = Session.micro_batches
    file = os.open(folder / f"examples-{attempt}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(session: Session, step: int) -> list[MicroBatch]:
        batches = given(session, step)
        ids = [[batch.index, batch.sample_ids.tolist()] for batch in batches if not batch.idle]
        os.write(file, json.dumps({"done": step, "time": time.time(), "ids": ids}).encode() + b"\n")
        return batches

    Session.micro_batches = noted  # type: ignore[method-assign]


def _carry_out(harm: Harm, progress: Progress, folder: Path, run: Path, thread: int) -> None:
    while progress.step < harm.step:
        time.sleep(0.0005)
    time.sleep(harm.delay_s)

    path = os.fsencode(folder / f"landed-{harm.kind}.json")

    def landed() -> None:
        """Write down where it lands. Training begins no step before the harm is done: it waits for Python's lock."""
        sys.setswitchinterval(WAIT_S)
        where = {**asdict(harm), "step": progress.step, "phase": progress.phase, "time": time.time()}
        text = json.dumps(where).encode()
        descriptor = _LIBC.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        assert descriptor >= 0 and _LIBC.write(descriptor, text, len(text)) == len(text)

    HARMS[harm.kind](landed, run, thread)
    sys.setswitchinterval(SWITCH_S)


def _signal_self(number: signal.Signals) -> None:
    """At once: to this thread, which runs. One to the process would wait until its main thread gets a core."""
    _LIBC.pthread_kill(ctypes.c_ulong(threading.get_ident()), int(number))


def kill(landed: Callable[[], None], _run: Path, _thread: int) -> None:
    """SIGKILL."""
    landed()
    _signal_self(signal.SIGKILL)


def stop(landed: Callable[[], None], _run: Path, _thread: int) -> None:
    """SIGSTOP: it answers nothing, and nothing tells that it is gone."""
    landed()
    _signal_self(signal.SIGSTOP)


def raise_error(landed: Callable[[], None], _run: Path, thread: int) -> None:
    """An exception in the training thread, at whatever it does."""
    landed()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(RuntimeError))


def corrupt_newest(landed: Callable[[], None], run: Path, _thread: int) -> None:
    """One bit of the newest checkpoint flips, and the worker dies."""
    newest = max(path for path in (run / "checkpoints").glob("step-*") if (path / "manifest.json").exists())
    _flip_bits(min(newest.glob("*.safetensors")), 1)
    landed()
    _signal_self(signal.SIGKILL)


def full_disk(landed: Callable[[], None], run: Path, _thread: int) -> None:
    """This worker's next save finds no room, and then it dies.

    By the limit of a file's size, which the kernel enforces at the same calls as a full disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, before[1]))
    events, deadline = run / "events", time.monotonic() + WAIT_S
    while time.monotonic() < deadline and not _mentions(events, "checkpoint_failed"):
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    landed()
    _signal_self(signal.SIGKILL)


def corrupt_shard(landed: Callable[[], None], run: Path, _thread: int) -> None:
    """One bit of each of the data's shards flips, and the worker dies: what starts again cannot read them."""
    for shard in (run.parent / "datasets").rglob("*.arrow"):
        if shard.name != "blocks.arrow":
            shutil.copy(shard, shard.with_suffix(".whole"))
            _flip_bits(shard, 8)
    landed()
    _signal_self(signal.SIGKILL)


def kill_mlflow(landed: Callable[[], None], run: Path, _thread: int) -> None:
    """SIGKILL to MLflow's server: connections to it are refused."""
    _signal_mlflow(run, signal.SIGKILL)
    landed()


def stop_mlflow(landed: Callable[[], None], run: Path, _thread: int) -> None:
    """SIGSTOP to MLflow's server: it takes connections, and answers nothing."""
    _signal_mlflow(run, signal.SIGSTOP)
    landed()


def _signal_mlflow(run: Path, number: signal.Signals) -> None:
    for pid in json.loads((run.parent / MLFLOW).read_text()):
        os.kill(pid, number)


def mend_shards(store: Path) -> int:
    """Undo corrupt_shard; how many shards it had harmed."""
    whole = list((store / "datasets").rglob("*.whole"))
    for copy in whole:
        copy.replace(copy.with_suffix(".arrow"))
    return len(whole)


def _flip_bits(path: Path, count: int) -> None:
    """In place, so that a process that has the file mapped does not lose it."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        for number in range(count):
            place = size * (2 * number + 1) // (2 * count)
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 4]))


def _mentions(folder: Path, kind: str) -> bool:
    return any(f'"{kind}"' in path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


ENDINGS = {each.__name__: each for each in (kill, stop, raise_error, corrupt_newest, full_disk, corrupt_shard)}
OUTAGES = {each.__name__: each for each in (kill_mlflow, stop_mlflow)}
HARMS = ENDINGS | OUTAGES
