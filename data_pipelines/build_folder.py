"""What a build may find in its folder, and what it leaves there: finished partitions, never halves, nobody's files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UsageError
from data_pipelines.build_lock import LOCK_FILE
from data_pipelines.index import BLOCKS_FILE, INDEX_FILE, TOKENIZER_FILE
from data_pipelines.lengths import LENGTHS_FILE
from data_pipelines.local_files import is_temporary
from data_pipelines.partition_rows import LENGTHS_ENDING, PARTS
from data_pipelines.quarantine import QUARANTINE_FILE
from data_pipelines.storage import Store

SCRATCH = "scratch-"  # begins the names of folders in PARTS that serve one process
_SHARD = re.compile(r"\w+-\d{5,}-\d{3,}\.arrow")
_OTHERS = (TOKENIZER_FILE, BLOCKS_FILE, LENGTHS_FILE, QUARANTINE_FILE)


def refuse_other_files(target: Path) -> None:
    """Raise UsageError where a local folder holds what no build writes."""
    own = {*_OTHERS, LOCK_FILE, PARTS}
    names = sorted(path.name for path in target.iterdir())
    others = [name for name in names if name not in own and not _SHARD.fullmatch(name) and not is_temporary(name)]
    if others:
        raise UsageError(
            f"{target} holds files that are not a data set's ({', '.join(others[:3])}) and no {INDEX_FILE}. Move them "
            "away: the data set is to be built there."
        )


def sweep(folder: Store) -> None:
    """Remove what an ended build left unfinished: files that no finished partition names, or that are half written.

    Where no partition is finished at all, everything of the build goes.
    """
    parts = [name for name in folder.list(PARTS) if name.endswith(".json")]
    if not parts:
        clear(folder)
        return
    done = {shard for name in parts for shard in _shards(folder.read_bytes(f"{PARTS}/{name}"))}
    for name in folder.list():
        if _SHARD.fullmatch(name) and name not in done:
            folder.delete(name)
    for name in folder.list(PARTS):
        if name.endswith(LENGTHS_ENDING) and f"{name.partition('.')[0]}.json" not in parts:
            folder.delete(f"{PARTS}/{name}")
    for name in folder.list_dirs(PARTS):
        folder.delete_dir(f"{PARTS}/{name}")
    _remove_temporary(folder)


def clear(folder: Store) -> None:
    """Remove everything of a build that has written no index, and nothing else."""
    for name in folder.list():
        if _SHARD.fullmatch(name) or name in _OTHERS:
            folder.delete(name)
    folder.delete_dir(PARTS)
    _remove_temporary(folder)


def _remove_temporary(folder: Store) -> None:
    target = folder.local_path()
    if target is None:
        return
    for place in (target, target / PARTS):
        for path in place.glob(".*"):
            if is_temporary(path.name):
                path.unlink(missing_ok=True)


def _shards(part: bytes) -> Iterator[str]:
    """The files that a partition's JSON names; none where it is of another kind, or no JSON."""
    try:
        for sizes, _ in json.loads(part)["splits"].values():
            yield from sizes
    except (ValueError, KeyError, TypeError, AttributeError):
        return
