"""What the workers of a run printed, in pieces: a log of many gigabytes costs no more than a small one.

A place in a log is a number of bytes from its beginning, which stays right while the log grows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, BinaryIO

from configs.errors import NotFound
from data_pipelines.storage import Store
from trainer.record import attempt_folder

Row = dict[str, Any]

MOST_BYTES = 1 << 20  # in one piece
LONGEST_LINE = 4000  # characters shown
MOST_HITS = 200
_SEARCHED_BYTES = 64 << 20  # by one request, which then says where to go on
_BLOCK_BYTES = 1 << 20
_LOG = re.compile(r"rank-(?P<rank>\d{1,9})\.log")
_COLOURS = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")  # and other words to a terminal (ECMA-48)
_TRACEBACK = b"Traceback (most recent call last)"


def index(run: Store, events: Iterable[Row]) -> Row:
    """{"logs": one {attempt, rank, size_bytes} each, "failures": of each attempt that failed, its first}.

    A failure is its event, and in `place` where the log of its rank tells of it, None where that log is not there.
    """
    logs = []
    for folder in run.list_dirs("attempts"):
        for name in run.list(f"attempts/{folder}") if folder.isdigit() else ():
            match = _LOG.fullmatch(name)
            facts = run.info(f"attempts/{folder}/{name}") if match else None
            if match and facts is not None:
                logs.append({"attempt": int(folder), "rank": int(match["rank"]), "size_bytes": facts.size})
    failures: dict[int, Row] = {}
    for event in events:
        if event["kind"] == "failed" and event["attempt"] not in failures:
            failures[event["attempt"]] = event | {"place": _failure_place(run, event)}
    return {"logs": logs, "failures": list(failures.values())}


def piece(run: Store, attempt: int, rank: int, *, start: int | None, stop: int | None, limit: int) -> Row:
    """Lines of a log: from `start` on, or else those before `stop`; without either, the last ones.

    {"lines": [{"place", "text"}], "start", "stop": the bytes they take, "size_bytes": of the log}. Lines are whole, but
    one without an end yet, at the end of the log, is shown as it is and `stop` is before it; so is one that is longer
    than `limit` bytes, of which `stop` is within. Raises NotFound.
    """
    path = log_path(run, attempt, rank)
    with run.open_input(path) as file:
        size = file.seek(0, 2)
        if start is None:
            end = size if stop is None else min(stop, size)
            begin = max(0, end - limit)
            data = _read(file, begin, end - begin)
            skipped = data.find(b"\n") + 1
            if begin and skipped < len(data) and not _ends_line(file, begin):  # within a line
                begin, data = begin + skipped, data[skipped:]
        else:
            begin = min(start, size)
            data = _read(file, begin, limit)
    whole = data.rfind(b"\n") + 1
    if whole and begin + len(data) < size:
        data = data[:whole]
    lines = list(_lines(data, begin))
    torn = begin + len(data) == size and whole < len(data)
    return {"lines": lines, "start": begin, "stop": begin + (whole if torn else len(data)), "size_bytes": size}


def search(run: Store, attempt: int, rank: int, text: str, *, start: int) -> Row:
    """Lines of a log from `start` on that hold a text, in small or capital letters.

    {"lines": [{"place", "text"}], "next": where to go on, None at the end}. Raises NotFound.
    """
    wanted = text.encode().lower()
    hits: list[Row] = []
    with run.open_input(log_path(run, attempt, rank)) as file:
        place = start
        while len(hits) < MOST_HITS and place - start < _SEARCHED_BYTES:
            data = _read(file, place, _BLOCK_BYTES)
            if len(data) == _BLOCK_BYTES:
                data = data[: data.rfind(b"\n") + 1] or data
            if not data:
                return {"lines": hits, "next": None}
            if wanted in data.lower():
                found = [line for line in _lines(data, place) if wanted.decode() in line["text"].lower()]
                room = MOST_HITS - len(hits)
                hits += found[:room]
                if len(found) > room:
                    return {"lines": hits, "next": found[room]["place"]}
            place += len(data)
        return {"lines": hits, "next": place}


def log_path(run: Store, attempt: int, rank: int) -> str:
    """Of a rank's log, in the run's folder. Raises NotFound if it is not there, or is a link that leads elsewhere."""
    path = f"{attempt_folder(attempt)}/rank-{rank:05d}.log"
    check_inside(run, path)
    if not run.exists(path):
        raise NotFound(f"There is no {run.path(path)}.")
    return path


def check_inside(run: Store, path: str) -> None:
    """Refuse a path that leads out of a run's folder. Raises NotFound."""
    folder, file = run.local_path(), run.local_path(path)
    if folder is None or file is None:  # a remote store has no links
        inside = ".." not in path.split("/")
    else:
        inside = file.resolve().is_relative_to(folder.resolve())
    if not inside:
        raise NotFound(f"{path} is not in {run.uri}.")


def _failure_place(run: Store, event: Row) -> int | None:
    """Where a failed rank's log tells why: its last traceback, else its last lines."""
    if not isinstance(event.get("rank"), int) or event["rank"] < 0:
        return None
    try:
        path = log_path(run, event["attempt"], event["rank"])
    except NotFound:
        return None
    with run.open_input(path) as file:
        size = file.seek(0, 2)
        begin = max(0, size - MOST_BYTES)
        data = _read(file, begin, MOST_BYTES)
    found = data.rfind(_TRACEBACK)
    if found < 0:
        found = max(0, len(data) - 2000)
    return begin + data.rfind(b"\n", 0, found) + 1


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _ends_line(file: BinaryIO, place: int) -> bool:
    return _read(file, place - 1, 1) == b"\n"


def _lines(data: bytes, place: int) -> Iterable[Row]:
    for line in data.removesuffix(b"\n").split(b"\n") if data else ():
        yield {"place": place, "text": _shown(line)}
        place += len(line) + 1


def _shown(line: bytes) -> str:
    text = _COLOURS.sub("", line.decode("utf-8", "replace").rstrip("\r"))
    text = text.rpartition("\r")[2]  # a progress bar goes back to the beginning of its line
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} ... ({len(text):,} characters)"
