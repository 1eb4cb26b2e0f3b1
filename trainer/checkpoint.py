"""Saving a running engine behind its training, and loading it at any ZeRO stage and world size.

The order of a save, and what a crash leaves at each point (durable: fsync on a local disk, a finished put elsewhere):

    1. training thread, every rank: copy buffers and scalars. Training goes on, up to its next change of the weights.
    2. background thread, every rank: copy masters and optimizer state to host memory; the next update waits for it.
       Write the tensors, make them durable; write the part that lists them, make it and both names durable.
                                                -- a crash leaves a folder without a manifest: skipped, later deleted
    3. rank 0's thread: wait until it sees every rank's part (by polling: no collective outside the training thread);
       make the folder's own name durable; write the metrics of the steps before, which are not repeated; write the
       manifest and make it durable.            -- from here the checkpoint exists
    4. rank 0's thread: delete the parts and leftovers; then what `keep` lets go.

A save that fails is logged and recorded, then its files are deleted, and training goes on. Of a manifest that an object
store has not acknowledged nobody knows whether it is there, or comes yet: what it lists stays until the next start.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from configs.errors import ShardyardError, TimedOut, Unreachable, UsageError
from configs.schema import CheckpointConfig
from data_pipelines.local_files import sync_folder
from data_pipelines.storage import Store
from trainer import engine_state
from trainer.checkpoint_files import (
    MANIFEST,
    CheckpointReader,
    file_name,
    part_name,
    read_manifest,
    save_id,
    write_failure,
    write_manifest,
    write_part,
)
from trainer.checkpoint_folder import (
    Retention,
    delete_leftovers,
    delete_unlisted,
    find,
    folder_name,
    newest,
    open_checkpoint,
    open_weights,
    saved_steps,
    skipped,
)
from trainer.distributed import World, all_sum
from trainer.snapshot import Snapshot, SnapshotBuffer

if TYPE_CHECKING:
    from trainer.engine import Engine
    from trainer.progress import Progress
    from trainer.record import RunRecord

__all__ = [
    "CheckpointReader",
    "Checkpointer",
    "Retention",
    "find",
    "folder_name",
    "load",
    "load_weights",
    "newest",
    "open_checkpoint",
    "open_weights",
    "saved_steps",
    "skipped",
]

_log = logging.getLogger(__name__)
PARTS_TIMEOUT_S = 600.0


class Unacknowledged(Unreachable):
    """The store has not said whether it has the manifest."""


# --- loading


def load(engine: Engine, reader: CheckpointReader) -> None:
    """Give the engine the checkpoint's weights, optimizer state and loss scaler. Every rank calls it.

    Raises:
        UsageError: the checkpoint is of another model or optimizer. Damaged: some rank could not read its part; on
            all ranks, and the engine is then left half filled.
    """
    _check_fits(engine, {name: reader.shape(name) for name in _stored_names(reader)}, reader.name)
    engine_state.restore(engine, reader.read, reader.manifest["scalars"])


def load_weights(engine: Engine, source: CheckpointReader | Mapping[str, Tensor]) -> None:
    """Give the engine weights alone, of a checkpoint (their average, if it has one) or by name. Every rank calls it.

    The optimizer stays fresh.

    Raises:
        UsageError: a parameter is missing, unknown or of another shape. Damaged: a block fails its digest.
    """
    if isinstance(source, CheckpointReader):
        reader = source
        _check_fits(engine, {name: reader.shape(name) for name in _stored_names(reader)}, reader.name)
        engine_state.restore_weights(
            engine, lambda name, _kind, start, stop: reader.read(name, reader.weights_kind(name), start, stop)
        )
        return
    weights = source
    aliases = {alias for names in engine_state.describe(engine)["aliases"].values() for alias in names}
    _check_fits(engine, {name: tuple(t.shape) for name, t in weights.items() if name not in aliases}, "the source")
    engine_state.restore_weights(engine, lambda name, _kind, start, stop: weights[name].reshape(-1)[start:stop])


def _stored_names(reader: CheckpointReader) -> list[str]:
    return [*reader.manifest["parameters"], *reader.manifest["buffers"]]


def _check_fits(engine: Engine, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    own = engine_state.describe(engine)
    wanted = {name: tuple(entry["shape"]) for name, entry in (own["parameters"] | own["buffers"]).items()}
    differing = [
        f"'{name}' is {shapes.get(name, 'missing')} there and {wanted.get(name, 'unknown')} in this model"
        for name in sorted({*shapes, *wanted})
        if shapes.get(name) != wanted.get(name)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UsageError(
            f"The weights of {source} do not fit this model: {'; '.join(differing[:3])}{more}. "
            "Set `model` and `task` as they were when it was saved."
        )


# --- saving


class Checkpointer:
    """Saves checkpoints of one attempt into `store` (the run's checkpoints folder), at most one at a time.

    Every rank makes one, and calls save() at the same steps. The host buffer that snapshots are copied to is kept: this
    rank's share of masters and optimizer state (12 bytes a parameter for Adam, over world_size).

    keep: which checkpoints stay. record: None writes no events.
    last_error: why the latest finished save failed; None if it did not.
    """

    def __init__(
        self, store: Store, world: World, keep: CheckpointConfig, progress: Progress, record: RunRecord | None = None
    ) -> None:
        self._store = store
        self._world = world
        self._progress = progress
        self._record = record
        self._retention = Retention(store, keep)
        self._buffer = SnapshotBuffer(world.device)
        self._thread: threading.Thread | None = None
        self._num_saves = 0
        self.last_error: str | None = None
        if world.rank == 0:
            delete_leftovers(store)
        self._attempt_id = _agreed_id(world)  # received after rank 0 has cleaned up

    def save(
        self,
        step: int,
        engine: Engine,
        data_state: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Start to copy and write the state after `step` completed steps. Waits for the save before it, if any.

        Until the copy is made `engine.reading` holds up whatever changes the weights or the optimizer's state.
        data_state, extra: plain values for the manifest, as its "data" and as keys of their own.
        """
        started = time.perf_counter()
        self.wait()
        self._num_saves += 1
        header = self._header(step, engine, data_state, extra) if self._world.rank == 0 else {}
        fragments = self._buffer.begin(engine_state.fragments(engine))
        engine.reading.begin()
        snapshot = Snapshot(
            step=step,
            save=save_id(self._attempt_id, self._num_saves),
            fragments=fragments,
            reading=engine.reading,
            header=header,
            stall_s=time.perf_counter() - started,
        )
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when no save is in flight on this rank; `last_error` then says how it went."""
        while self._thread is not None:
            self._thread.join(timeout=1.0)
            self._progress.touch()
            if not self._thread.is_alive():
                self._thread = None

    def close(self) -> None:
        """Let the save in flight finish, and free the buffer."""
        self.wait()
        self._buffer.free()

    def _header(
        self, step: int, engine: Engine, data_state: Mapping[str, Any], extra: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        header: dict[str, Any] = {
            "step": step,
            "world_size": self._world.size,
            "zero_stage": engine.zero_stage,
            "versions": _versions(),
            "scalars": engine_state.scalars(engine),
            "data": dict(data_state),
            **engine_state.describe(engine),
        }
        if self._record is not None:
            config = self._record.config.model_dump(mode="json")
            header |= {"run": self._record.name, "attempt": self._record.attempt, "config": config}
        assert not header.keys() & (extra or {}).keys(), "`extra` must not replace a field of the manifest"
        # The one check of plain values; here, so that a mistake is raised to the caller.
        return json.loads(json.dumps(header | dict(extra or {}), allow_nan=False))  # type: ignore[no-any-return]

    # --- in the background thread

    def _write(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        folder = self._store.child(folder_name(snapshot.step))
        try:
            own_error = self._write_part(folder, snapshot)
            if self._world.rank == 0:
                size_bytes = self._commit(folder, snapshot, own_error)
                write_s = time.perf_counter() - started
                self._event(
                    "checkpoint",
                    step=snapshot.step,
                    path=folder.path(),
                    size_bytes=size_bytes,
                    stall_s=_stall_s(snapshot),
                    write_s=round(write_s, 4),
                )
            elif own_error is not None:
                raise own_error
            self.last_error = None
        except Exception as error:  # whatever it is, training goes on
            self.last_error = f"The checkpoint of step {snapshot.step} was not saved: {_cause(error)}"
            _log.error("%s Training goes on, and earlier checkpoints are as they were.", self.last_error)
            if self._world.rank == 0:
                self._event("checkpoint_failed", step=snapshot.step, error=_cause(error), stall_s=_stall_s(snapshot))
                if not isinstance(error, Unacknowledged):
                    self._discard(folder, snapshot.save)

    def _write_part(self, folder: Store, snapshot: Snapshot) -> Exception | None:
        """Copy and write what this rank holds; an error of another rank is told to rank 0, and nothing of it stays."""
        rank, save = self._world.rank, snapshot.save
        try:
            try:
                tensors, ranges = self._buffer.copy(snapshot.fragments)
            finally:
                snapshot.reading.end()
            write_part(folder, rank, save, tensors, ranges)
            return None
        except Exception as error:
            if rank != 0:
                with _warned("A part of a failed save was not deleted"):
                    folder.delete(file_name(rank, save))
                with _warned("Rank 0 could not be told of a failed save"):
                    write_failure(folder, rank, save, _cause(error))
            return error

    def _commit(self, folder: Store, snapshot: Snapshot, own_error: Exception | None) -> int:
        """Make a checkpoint of all ranks' parts; returns the bytes of its files."""
        parts = self._wait_for_parts(folder, snapshot.save, own_error)
        failures = [f"Rank {rank}: {part['error']}" for rank, part in enumerate(parts) if "error" in part]
        if failures:
            raise ShardyardError(" ".join(failures))
        if (path := folder.local_path()) is not None:
            sync_folder(path.parent)
            sync_folder(path.parent.parent)
        if self._record is not None:  # a run that goes on from here does not repeat the steps that led to it
            self._record.flush()
        try:
            manifest = write_manifest(folder, snapshot.header | {"save": snapshot.save}, parts)
        except Unreachable as error:
            manifest = _arrived(folder, snapshot.save, error)
        with _warned("Old checkpoints were not deleted"):
            delete_unlisted(folder, manifest)
            self._retention.apply()
        return sum(entry["size"] for entry in manifest["files"])

    def _wait_for_parts(self, folder: Store, save: str, own_error: Exception | None) -> list[dict[str, Any]]:
        """All ranks' parts, in the order of ranks, also after this rank failed: then all can be deleted together."""
        first = 0 if own_error is None else 1
        wanted = {part_name(rank, save): rank for rank in range(first, self._world.size)}
        deadline, pause_s = time.monotonic() + PARTS_TIMEOUT_S, 0.005
        while wanted and (missing := wanted.keys() - set(folder.list())):
            if time.monotonic() > deadline:
                ranks = ", ".join(str(wanted[name]) for name in sorted(missing))
                raise TimedOut(f"Rank(s) {ranks} wrote nothing within {PARTS_TIMEOUT_S:.0f} s. Check their disks.")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.5)
        parts = [json.loads(folder.read_bytes(name)) for name in wanted]
        return parts if own_error is None else [{"error": _cause(own_error)}, *parts]

    def _discard(self, folder: Store, save: str) -> None:
        """Delete the files of a failed save; what an earlier save left in the folder stays."""
        with _warned("The files of a failed save were not deleted"):
            names = folder.list()
            for name in names:
                if f"-{save}." in name:
                    folder.delete(name)
            if MANIFEST not in names and not folder.list():
                folder.delete_dir()

    def _event(self, kind: str, **fields: Any) -> None:
        if self._record is not None:
            self._record.event(kind, **fields)


def _stall_s(snapshot: Snapshot) -> float:
    """How long training waited for it."""
    return round(snapshot.stall_s + snapshot.reading.waited_s, 4)


def _arrived(folder: Store, save: str, error: Unreachable) -> dict[str, Any]:
    """The manifest of a save, which is in the store although writing it ended with `error`; raises Unacknowledged."""
    try:
        manifest = read_manifest(folder)
    except ShardyardError:
        manifest = {}
    if manifest.get("save") != save:
        raise Unacknowledged(f"{error} Should it have arrived all the same, the next start finds it.") from error
    return manifest


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """Log what the store refuses, and go on."""
    try:
        yield
    except ShardyardError as error:
        _log.warning("%s: %s", what, error)


@functools.cache
def _versions() -> dict[str, str]:
    """Looked up once: parsing packages' metadata takes 10 ms."""
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}


def _agreed_id(world: World) -> str:
    """Eight hexadecimal digits that no other attempt's saves have, the same on all ranks."""
    number = float(int.from_bytes(os.urandom(4), "little")) if world.rank == 0 else 0.0
    if world.size > 1:
        number = all_sum([number])[0]
    return f"{int(number):08x}"


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, ShardyardError) else f"{type(error).__name__}: {error}"
