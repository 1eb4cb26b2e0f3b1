"""What a Kubernetes API server does with parts of an object: selectors, merge patches, owners of fields.

After kubernetes.io: "Labels and Selectors", "Field Selectors", "Server-Side Apply"; merge patches are RFC 7386.
A list has one owner as a whole, also where a schema would let its items have owners of their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
FieldPath = tuple[str, ...]
Test = Callable[[Object], bool]

_KEY = r"([A-Za-z0-9][-A-Za-z0-9_./]*)"
_VALUE = r"((?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?)"
# Of metadata, what somebody may own.
_OWNED = ("labels", "annotations", "finalizers", "ownerReferences")


def label_selector(text: str) -> Test:
    """`a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1`; ValueError for others."""
    tests = [_requirement(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    return lambda obj: all(test(obj["metadata"].get("labels", {})) for test in tests)


def _requirement(text: str) -> Callable[[dict[str, str]], bool]:
    if found := re.fullmatch(rf"{_KEY}\s*(==|=|!=)\s*{_VALUE}", text):
        key, sign, value = found.groups()
        return lambda labels: (labels.get(key) == value) == (sign != "!=")
    if found := re.fullmatch(rf"{_KEY}\s+(in|notin)\s*\((.*)\)", text):
        key, sign, value = found.groups()
        values = [part.strip() for part in value.split(",")]
        if all(re.fullmatch(_VALUE, part) for part in values):
            return lambda labels: (labels.get(key) in values) == (sign == "in")
    if found := re.fullmatch(rf"{_KEY}\s*([<>])\s*(-?[0-9]+)", text):
        key, sign, value = found.groups()
        return lambda labels: _compare(labels.get(key, ""), sign, int(value))
    if found := re.fullmatch(rf"(!?)\s*{_KEY}", text):
        absent, key = found.groups()
        return lambda labels: (key in labels) != bool(absent)
    raise ValueError(f"unable to parse requirement: {text}")


def _compare(label: str, sign: str, value: int) -> bool:
    if not re.fullmatch(r"-?[0-9]+", label):
        return False
    return int(label) > value if sign == ">" else int(label) < value


def field_selector(text: str, supported: Iterable[str]) -> Test:
    """`a.b=c,d!=e` of the fields that the resource supports; ValueError for others."""
    tests = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"([^=!]+)(==|=|!=)(.*)", part)
        if not found:
            raise ValueError(f"invalid selector: '{part}'; can't understand '{part}'")
        if found[1] not in supported:
            raise ValueError(f"field label not supported: {found[1]}")
        tests.append((found[1].split("."), found[2] != "!=", found[3]))
    return lambda obj: all((_text_at(obj, path) == value) == wanted for path, wanted, value in tests)


def _text_at(value: Any, path: list[str]) -> str:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386: null removes, objects are merged, all else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(merged.get(name), value)
    return merged


@dataclass(frozen=True)
class Owner:
    """A manager of fields. operation: Apply, or Update for all else."""

    manager: str
    operation: str = "Update"
    subresource: str = ""


Owners = dict[Owner, set[FieldPath]]


class ApplyConflictError(Exception):
    """Somebody else owns what would change. conflicts: (owner, path)."""

    def __init__(self, conflicts: list[tuple[Owner, str]], api_version: str) -> None:
        self.causes = [(f"conflict with {_named(owner, api_version)}", path) for owner, path in conflicts]
        if len(conflicts) == 1:
            super().__init__(f"Apply failed with 1 conflict: {self.causes[0][0]}: {conflicts[0][1]}")
            return
        lines = []
        for owner in sorted({owner for owner, _ in conflicts}, key=str):
            lines.append(f"conflicts with {_named(owner, api_version)}:")
            lines += [f"- {path}" for other, path in conflicts if other == owner]
        super().__init__(f"Apply failed with {len(conflicts)} conflicts: " + "\n".join(lines))


def _named(owner: Owner, api_version: str) -> str:
    text = f'"{owner.manager}"' + (f' with subresource "{owner.subresource}"' if owner.subresource else "")
    return f"{text} using {api_version}" if owner.operation == "Update" else text


def owners_of(obj: Object) -> Owners:
    """As `metadata.managedFields` has it."""
    return {
        Owner(entry["manager"], entry["operation"], entry.get("subresource", "")): _paths(entry["fieldsV1"])
        for entry in obj["metadata"].get("managedFields", ())
    }


def managed_fields(owners: Owners, before: list[Object], api_version: str, time: str) -> list[Object]:
    """For `metadata.managedFields`; before: what stood there, of which an unchanged entry keeps its time."""
    entries = []
    for owner, paths in owners.items():
        entry: Object = {
            "manager": owner.manager,
            "operation": owner.operation,
            "apiVersion": api_version,
            "time": time,
        }
        entry |= {"fieldsType": "FieldsV1", "fieldsV1": _nested(paths)}
        entry |= {"subresource": owner.subresource} if owner.subresource else {}
        same = [old for old in before if old | {"time": time} == entry]
        entries += same[:1] or [entry]
    return entries


def update_owners(old: Object, new: Object, by: Owner) -> Owners:
    """Who changes a field owns it, alone ("Field management")."""
    before, after = _leaves(old), _leaves(new)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    owners = {owner: (paths & after.keys()) - changed for owner, paths in owners_of(old).items()}
    owners[by] = owners.get(by, set()) | changed
    return {owner: paths for owner, paths in owners.items() if paths}


def apply(old: Object, config: Object, by: Owner, *, force: bool) -> tuple[Object, Owners]:
    """The object with the configuration merged in, and who owns what then ("Conflicts", "Merge strategy")."""
    applied, before = _leaves(config), _leaves(old)
    owners = owners_of(old)
    others = {owner: paths for owner, paths in owners.items() if owner != by}
    changed = {path for path, value in applied.items() if before.get(path) != value}
    conflicts = [(owner, "." + ".".join(path)) for owner, paths in others.items() for path in sorted(paths & changed)]
    if conflicts and not force:
        raise ApplyConflictError(conflicts, old["apiVersion"])
    new = copy.deepcopy(old)
    for path in owners.get(by, set()) - applied.keys():
        if not any(path in paths for paths in others.values()):
            _drop(new, path)
    owners = {owner: paths - changed for owner, paths in others.items() if paths - changed}
    return merge(new, config), owners | {by: set(applied)}


def _leaves(obj: Object) -> dict[FieldPath, Any]:
    found: dict[FieldPath, Any] = {}

    def walk(value: Any, path: FieldPath) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, (*path, name))
        elif path:
            found[path] = value

    metadata = {name: value for name, value in obj.get("metadata", {}).items() if name in _OWNED}
    walk({name: value for name, value in obj.items() if name not in ("apiVersion", "kind", "metadata")}, ())
    for name, value in metadata.items():
        walk(value, ("metadata", name))
    return found


def _nested(paths: set[FieldPath]) -> Object:
    tree: Object = {}
    for path in sorted(paths):
        node = tree
        for name in path:
            node = node.setdefault(f"f:{name}", {})
    return tree


def _paths(tree: Object, above: FieldPath = ()) -> set[FieldPath]:
    if not tree:
        return {above}
    return {path for name, inner in tree.items() for path in _paths(inner, (*above, name.removeprefix("f:")))}


def _drop(obj: Object, path: FieldPath) -> None:
    for name in path[:-1]:
        obj = obj.get(name, {})
    obj.pop(path[-1], None)
