"""A run's checkpoints: which there are, which are good, which may go."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from configs.errors import Damaged, NotFound, ShardyardError, Unreachable
from configs.schema import CheckpointConfig, KeepBestConfig
from data_pipelines.storage import Store
from trainer.checkpoint_files import MANIFEST, CheckpointReader, is_later_save, read_manifest

_log = logging.getLogger(__name__)
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` completed steps."""
    return f"step-{step:08d}"


def saved_steps(checkpoints: Store) -> list[int]:
    """Steps that have a folder, newest first; whether they are good is another question."""
    matches = (_STEP_FOLDER.fullmatch(name) for name in checkpoints.list_dirs())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def newest(
    checkpoints: Store,
    report: Callable[[str], None] = _log.warning,
    *,
    before: int | None = None,
    contents: bool = True,
) -> tuple[int, CheckpointReader] | None:
    """(step, reader) of the newest checkpoint that verifies, every byte of it; None if there is none.

    report: told of each newer one that is damaged or unfinished, and what is wrong with it. before: only older ones
    than of this step. contents: False to verify manifest and sizes alone, and the rest as it is read.

    Raises:
        Unreachable: the store does not answer. What is out of reach is not damaged: an older checkpoint is no way out.
    """
    for step in saved_steps(checkpoints):
        if before is not None and step >= before:
            continue
        store = checkpoints.child(folder_name(step))
        try:
            reader = CheckpointReader(store)
            damage = reader.verify(contents=contents)
        except NotFound:
            damage = [f"it has no {MANIFEST}: its save was cut off."]
        except Unreachable:
            raise
        except ShardyardError as error:
            damage = [str(error)]
        if not damage:
            return step, reader
        more = f" And {len(damage) - 1} more like it." if len(damage) > 1 else ""
        report(skipped(store, damage[0] + more))
    return None


def skipped(checkpoint: Store, damage: str) -> str:
    """What is said of a damaged checkpoint that is passed over."""
    return f"Checkpoint {checkpoint.path()} is skipped: {damage}"


def find(checkpoints: Store, step: int | None = None) -> CheckpointReader:
    """The checkpoint after `step` completed steps; None: the newest that verifies.

    Raises:
        NotFound: there is no such checkpoint; says which there are.
        Damaged: it, or all there are, fail their digests. With a step given only its manifest and sizes are verified
            here, the rest as it is read.
    """
    if step is None:
        return _newest_or_error(checkpoints)
    steps = saved_steps(checkpoints)
    try:
        reader = CheckpointReader(checkpoints.child(folder_name(step)))
    except NotFound as error:
        there = f"It has steps {', '.join(map(str, reversed(steps)))}." if steps else "There is none yet."
        raise NotFound(f"There is no finished checkpoint of step {step} in {checkpoints.uri}. {there}") from error
    if damage := reader.verify(contents=False):
        raise Damaged(f"{damage[0]} Use another step, or none for the newest good one.")
    return reader


def _newest_or_error(checkpoints: Store) -> CheckpointReader:
    damage: list[str] = []
    found = newest(checkpoints, damage.append)
    if found is not None:
        return found[1]
    if damage:
        raise Damaged(f"No checkpoint in {checkpoints.uri} is good. {' '.join(damage)}")
    raise NotFound(f"There is no checkpoint in {checkpoints.uri} yet. Train until checkpoint.every is reached.")


def open_checkpoint(uri: str) -> CheckpointReader:
    """The checkpoint in a folder given by path or URI; NotFound if there is none."""
    try:
        return CheckpointReader(Store(uri))
    except NotFound as error:
        raise NotFound(f"{uri} is no checkpoint: it has no {MANIFEST}. Give the path of a step-... folder.") from error


def open_weights(uri: str) -> CheckpointReader | Mapping[str, Tensor]:
    """Weights to start from: a checkpoint's folder, or a Hugging Face Llama folder on a local disk."""
    store = Store(uri)
    folder = store.local_path()
    if folder is not None and not store.exists(MANIFEST) and store.exists("config.json"):
        from trainer.huggingface import import_llama

        _, weights = import_llama(folder)
        return weights
    return open_checkpoint(uri)


# --- what may go


def delete_checkpoint(checkpoints: Store, step: int) -> None:
    """Delete a checkpoint, the manifest first: at no moment does it look whole."""
    checkpoints.delete(f"{folder_name(step)}/{MANIFEST}")
    checkpoints.delete_dir(folder_name(step))


def delete_leftovers(checkpoints: Store) -> None:
    """Delete the files of saves that were cut off, while no save is under way.

    A folder whose manifest is damaged stays as it is, for whoever looks into it.
    """
    for step in saved_steps(checkpoints):
        folder = checkpoints.child(folder_name(step))
        try:
            delete_unlisted(folder, read_manifest(folder))
        except NotFound:
            folder.delete_dir()
        except ShardyardError:
            continue


def delete_unlisted(folder: Store, manifest: Mapping[str, Any]) -> None:
    """Delete what a checkpoint's manifest does not list: parts, and the files of earlier saves of the same step.

    The files of a later save by the same attempt stay: another rank may already be writing them.
    """
    listed = {MANIFEST, *(entry["name"] for entry in manifest["files"])}
    for name in folder.list():
        if name not in listed and not is_later_save(name, manifest["save"]):
            folder.delete(name)


class Retention:
    """Deletes the checkpoints that nothing keeps: those older than the newest `keep` that verify, less those that
    `keep_every` and `keep_best` name, and that with which early stopping would end.

    Each is verified once: every byte on a local disk, sizes in a remote store. A damaged one does not count, and goes
    when it is older than `keep` good ones, so the last good one is never deleted. While the store does not answer all
    methods raise Unreachable, and nothing goes.
    """

    def __init__(self, checkpoints: Store, rule: CheckpointConfig) -> None:
        self._checkpoints = checkpoints
        self._rule = rule
        self._good: set[str] = set()  # sha256 of manifests

    def apply(self) -> list[int]:
        """Delete what may go. Returns the steps that went."""
        going = self.going()
        for step in going:
            delete_checkpoint(self._checkpoints, step)
        return going

    def going(self) -> list[int]:
        """Steps whose checkpoints nothing keeps, newest first."""
        if self._rule.keep is None:
            return []
        good: list[int] = []
        older = []
        for step in saved_steps(self._checkpoints):
            if len(good) >= self._rule.keep:
                older.append(step)
            elif self._is_good(step):
                good.append(step)
        if not older:
            return []
        every = self._rule.keep_every
        kept = {step for step in older if every is not None and step % every == 0}
        kept.add(self._manifest(good[0]).get("early_stopping", {}).get("best_step"))
        if self._rule.keep_best is not None:
            kept |= self._best(self._rule.keep_best)
        return [step for step in older if step not in kept]

    def _best(self, rule: KeepBestConfig) -> set[int]:
        values = {}
        for step in saved_steps(self._checkpoints):
            try:
                found = self._manifest(step).get("evaluation", {})
            except Unreachable:
                raise
            except ShardyardError:  # damaged: it is no best one
                continue
            if rule.metric in found:
                values[step] = found[rule.metric] if rule.goal == "min" else -found[rule.metric]
        return set(sorted(values, key=lambda step: (values[step], step))[: rule.count])

    def _manifest(self, step: int) -> dict[str, Any]:
        return read_manifest(self._checkpoints.child(folder_name(step)))

    def _is_good(self, step: int) -> bool:
        try:
            reader = CheckpointReader(self._checkpoints.child(folder_name(step)))
            digest = reader.manifest["sha256"]
            known = digest in self._good
            if reader.verify(contents=self._checkpoints.is_local and not known):
                return False
        except Unreachable:
            raise
        except ShardyardError:
            return False
        self._good.add(digest)
        return True
