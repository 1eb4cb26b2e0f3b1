"""What each rank wrote of itself in ranks/ (docs/metrics.md): all of it, or only the last readings of a run."""

from __future__ import annotations

import json
import re
import time
from array import array
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.dashboard.curves import Floats, Mask, Whole, surviving
from data_pipelines.storage import Store
from trainer.record_rows import Cursor, decode_value, read_rows
from trainer.step_times import PARTS

Row = dict[str, Any]

MEMORY = ("memory_used_bytes", "memory_reserved_bytes", "memory_free_bytes")
RECORDED = ("step_s", "step_s_max", *PARTS, *MEMORY)
OWN = "own_s"  # of a step: all but the waits for other ranks
METRICS = (OWN, *RECORDED)

_BLOCK_BYTES = 32 << 20  # of JSON at a time; each time every file is opened
_REMOTE_EVERY_S = 30.0  # each rank's file is a request there, and grows once a minute at most
_TAIL_BYTES = 16 << 10  # some 40 rows
_READERS = 16
_SEGMENT = re.compile(r"(?P<attempt>\d{4,})-rank-(?P<rank>\d{5,})-(?P<number>\d{6,})\.jsonl")


@dataclass(frozen=True)
class RankTable:
    """Rows of weights that were kept, by rank and step. values: NaN where a row lacks one."""

    rank: Whole
    step: Whole
    values: Mapping[str, Floats]

    def metric(self, name: str) -> Floats:
        """One of METRICS."""
        if name == OWN:
            return self.values["step_s"] - self.values["collective_s"]
        return self.values[name]


class RankRows:
    """All rows of a run's ranks. Not safe for threads."""

    def __init__(self, run: Store) -> None:
        self._run = run
        self._cursor: Cursor | None = None
        self._read_at: float | None = None
        self._attempt, self._rank, self._step = array("q"), array("q"), array("q")
        self._values = {name: array("d") for name in RECORDED}
        self._places: dict[tuple[int, int], Row] = {}  # (rank, attempt) -> where it ran
        self._starts: dict[int, int] = {}  # attempt -> completed steps at its start

    def update(self) -> None:
        """Read what is new. Raises ShardyardError if it cannot be read."""
        now = time.monotonic()
        if not self._run.is_local and self._read_at is not None and now - self._read_at < _REMOTE_EVERY_S:
            return
        self._read_at = now
        while True:
            rows, cursor = read_rows(self._run, "ranks", self._cursor, limit=_BLOCK_BYTES)
            if cursor == self._cursor:
                return
            self._cursor = cursor
            for row in rows:
                self._add(row)

    def _add(self, row: Row) -> None:
        """A row of ours; what is none is passed over (it may be damaged, or of a later version)."""
        try:
            attempt, rank, step = int(row["attempt"]), int(row["rank"]), int(row["step"])
            values = [decode_value(row["values"].get(name, "NaN")) for name in RECORDED]
            place = dict(row.get("place", {}))
        except (KeyError, TypeError, ValueError, AttributeError):
            return
        if place:
            self._places[rank, attempt] = place
            self._starts[attempt] = min(step, self._starts.get(attempt, step))
            return
        self._attempt.append(attempt)
        self._rank.append(rank)
        self._step.append(step)
        for name, value in zip(RECORDED, values, strict=True):
            self._values[name].append(value)

    def table(self) -> RankTable:
        """Of what has been read."""
        attempt, rank, step = (np.array(each, np.int64) for each in (self._attempt, self._rank, self._step))
        order = np.lexsort((np.arange(len(step)), attempt, rank))  # by rank, then attempt, then as it was written
        attempt, rank, step = attempt[order], rank[order], step[order]
        kept = of_kept_attempts(self._starts, attempt, step) & _not_rolled_back(rank, attempt, step)
        values = {name: np.array(each, np.float64)[order][kept] for name, each in self._values.items()}
        return RankTable(rank[kept], step[kept], values)

    def places(self) -> dict[int, Row]:
        """Of each rank, where it ran last: {host, world_size, local_rank, device}."""
        return {rank: self._places[rank, attempt] for rank, attempt in sorted(self._places)}


def of_kept_attempts(starts: Mapping[int, int], attempt: Whole, step: Whole) -> Mask:
    """Which rows no later attempt has repeated. starts: completed steps at the start of attempts.

    Not by rank, as curves.surviving does it: a rank of a larger attempt has no later row that would supersede its own.
    """
    last = np.full(len(step), np.iinfo(np.int64).max)
    for each in {int(number) for number in attempt}:
        last[attempt == each] = min((start for other, start in starts.items() if other > each), default=2**62)
    kept: Mask = step <= last
    return kept


def _not_rolled_back(rank: Whole, attempt: Whole, step: Whole) -> Mask:
    """Which rows a rank has not written anew within an attempt. Rows of a rank and attempt lie together."""
    cuts = np.flatnonzero((np.diff(rank) != 0) | (np.diff(attempt) != 0)) + 1
    kept: npt.NDArray[np.bool_] = np.ones(len(step), bool)
    for rows in np.split(np.arange(len(step)), cuts):
        if (np.diff(step[rows]) < 0).any():
            kept[rows] = surviving(np.zeros(len(rows), np.int64), step[rows])
    return kept


def recent_own_s(run: Store) -> dict[int, list[float]]:
    """By rank, its own seconds a step in the last readings of the newest attempt; read from the ends of the files."""
    newest: dict[int, dict[int, str]] = {}
    for name in run.list("ranks"):
        if (match := _SEGMENT.fullmatch(name)) is not None:
            newest.setdefault(int(match["attempt"]), {})[int(match["rank"])] = name  # in the order of their numbers
    ranks = newest[max(newest)] if newest else {}
    with ThreadPoolExecutor(_READERS) as readers:
        tails = readers.map(lambda name: _tail(run, f"ranks/{name}"), ranks.values())
        return {rank: _own_s(tail) for rank, tail in zip(ranks, tails, strict=True)}


def place_of(run: Store, rank: int) -> Row:
    """Where a rank runs in the newest attempt; {} where nothing says."""
    names = [name for name in run.list("ranks") if f"-rank-{rank:05d}-" in name and name.endswith("-000001.jsonl")]
    if not names:
        return {}
    with run.open_input(f"ranks/{names[-1]}") as file:
        first = file.read(_TAIL_BYTES).partition(b"\n")[0]
    try:
        return dict(json.loads(first)["place"])
    except (ValueError, KeyError, TypeError):
        return {}


def _tail(run: Store, path: str) -> bytes:
    with run.open_input(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        data: bytes = file.read()
    return data[: data.rfind(b"\n") + 1]


def _own_s(tail: bytes) -> list[float]:
    found = []
    for line in tail.splitlines():
        try:
            values = json.loads(line)["values"]
            found.append(decode_value(values["step_s"]) - decode_value(values["collective_s"]))
        except (ValueError, KeyError, TypeError):  # the first line may be cut, or tell the rank's place
            continue
    return found
