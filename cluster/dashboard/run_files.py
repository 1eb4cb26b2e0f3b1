"""What else is in a run's folder: its configuration with where each value came from, its lineage, its pictures."""

from __future__ import annotations

import json
import re
from typing import Any

from cluster.dashboard.logs import check_inside
from cluster.dashboard.run_view import RunView
from cluster.dashboard.store_view import StoreView
from configs.errors import NotFound, ShardyardError
from configs.load import Resolved
from configs.schema import flatten
from configs.yaml_text import write_value
from data_pipelines.storage import Store
from data_pipelines.time_limit import within
from trainer.record import RunRecord

Row = dict[str, Any]

_LARGEST_PICTURE = 32 << 20  # bytes
_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE = re.compile(r"step-\d{1,12}/[A-Za-z0-9_-]{1,100}\.png")
_CHECKPOINT = re.compile(r"(?P<store>.+)/(?P<run>[^/]+)/checkpoints/step-\d+/?")
PARENT_S = 10.0  # in which a store elsewhere has to answer
_OF_THE_RUN = {"name", "store"}  # keys that differ between any two runs


def configuration(store: StoreView, view: RunView) -> Row:
    """{"recipe", "values": [{"key", "value" as YAML, "origin"}], "parent", "lineage": of each launch, oldest first}.

    parent: None, or {"checkpoint", "state", "run": its name if it is in this store, "differences": [{"key", "here",
    "there"}], "problem": why these are not known, else None}. A parent in another store is looked for there.
    """
    resolved = view.record.resolved
    values = [
        {"key": key, "value": write_value(value), "origin": resolved.origins.get(key, "")}
        for key, value in flatten(resolved.config.model_dump()).items()
    ]
    return {
        "recipe": resolved.path,
        "values": values,
        "parent": _parent(store, resolved),
        "lineage": _lineages(view.record.store),
    }


def picture(view: RunView, path: str) -> bytes:
    """A picture that the run has recorded, as PNG; path: in its folder `pictures`. Raises NotFound."""
    run, full = view.record.store, f"pictures/{path}"
    told = {event.get("path") for event in view.events() if event["kind"] == "picture"}
    if _PICTURE.fullmatch(path) is None or full not in told:
        raise NotFound(f"Run '{view.name}' has no picture {path}.")
    check_inside(run, full)
    facts = run.info(full)
    if facts is None:
        raise NotFound(f"{run.path(full)} has been deleted.")
    data = run.read_bytes(full) if facts.size <= _LARGEST_PICTURE else b""
    if not data.startswith(_PNG):
        raise NotFound(f"{run.path(full)} is no picture, or larger than {_LARGEST_PICTURE >> 20} MiB.")
    return data


def _parent(store: StoreView, mine: Resolved) -> Row | None:
    given = mine.config.parent
    if given is None:
        return None
    found: Row = {"checkpoint": given.checkpoint, "state": given.state, "run": None, "differences": [], "problem": None}
    place, mark, options = given.checkpoint.partition("?")
    match = _CHECKPOINT.fullmatch(place)
    if match is None:
        return found | {"problem": "It is no checkpoint of a run, so there is no config to compare with."}
    name, uri = match["run"], match["store"] + mark + options
    try:
        if Store(uri).uri == store.store.uri:
            parent, found["run"] = store.run(name).record.config, name
        else:
            parent = within(PARENT_S, lambda: RunRecord.open(uri, name).config)
    except (ShardyardError, OSError) as error:
        return found | {"problem": f"What differs from it is not known, since its run cannot be read: {error}"}
    here, there = (flatten(config.model_dump(exclude=_OF_THE_RUN)) for config in (mine.config, parent))
    found["differences"] = [
        {"key": key, "here": _written(here, key), "there": _written(there, key)}
        for key in dict.fromkeys([*here, *there])
        if not key.startswith("parent") and here.get(key, ...) != there.get(key, ...)
    ]
    return found


def _written(values: Row, key: str) -> str | None:
    return write_value(values[key]) if key in values else None


def _lineages(run: Store) -> list[Row]:
    """What cannot be read is left out: the rest of the page is worth seeing without it."""
    names = ["lineage.json", *(name for name in run.list() if re.fullmatch(r"lineage-\d{4,}\.json", name))]
    found = []
    for name in names:
        try:
            lineage = json.loads(run.read_text(name))
        except (ShardyardError, ValueError):
            continue
        if isinstance(lineage, dict):
            attempt = int(name.removeprefix("lineage-").removesuffix(".json")) if "-" in name else 1
            found.append({"attempt": attempt} | lineage)
    return found
