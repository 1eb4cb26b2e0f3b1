"""Custom resources against the schema of their definition, as a Kubernetes API server checks them.

After kubernetes.io, "Extend the Kubernetes API with CustomResourceDefinitions": Field pruning, Defaulting, Defaulting
and Nullable, Validation, Validation rules. A keyword or rule that is not known here is refused when a file is read.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

# Of anything: the schema of what is not checked.
OPEN: Schema = {"x-kubernetes-preserve-unknown-fields": True}
_KEYWORDS = {
    *("type", "properties", "additionalProperties", "items", "required", "enum", "default", "nullable", "pattern"),
    *("format", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "anyOf", "description"),
    *("x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string", "x-kubernetes-validations"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type"),
}
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
# The rules (Common Expression Language) that KubeRay's definitions hold, of (self, oldSelf).
_RULES: dict[str, Callable[[Any, Any], bool]] = {
    "self == oldSelf": lambda new, old: new == old,
    f"self in ['{_MANAGERS[0]}', '{_MANAGERS[1]}']": lambda new, _: new in _MANAGERS,
    "!((has(self.onSuccess) || has(self.onFailure)) && has(self.deletionRules))": lambda new, _: (
        not (("onSuccess" in new or "onFailure" in new) and "deletionRules" in new)
    ),
    "((has(self.onSuccess) && has(self.onFailure)) || has(self.deletionRules))": lambda new, _: (
        ("onSuccess" in new and "onFailure" in new) or "deletionRules" in new
    ),
    "!(has(self.jobStatus) && has(self.jobDeploymentStatus))": lambda new, _: (
        not ("jobStatus" in new and "jobDeploymentStatus" in new)
    ),
    "has(self.jobStatus) || has(self.jobDeploymentStatus)": lambda new, _: (
        "jobStatus" in new or "jobDeploymentStatus" in new
    ),
}
_RANGES = {"int32": 2**31, "int64": 2**63}


@dataclass(frozen=True)
class Cause:
    """One of `details.causes` in the Status of a refused object."""

    field: str
    reason: str
    message: str


@functools.lru_cache
def read_definition(path: Path) -> dict[str, Any]:
    """The `spec` of a CustomResourceDefinition in YAML."""
    definition = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
    for version in definition["versions"]:
        for schema in _schemas(version["schema"]["openAPIV3Schema"]):
            rules = {rule["rule"] for rule in schema.get("x-kubernetes-validations", ())}
            unknown = (schema.keys() - _KEYWORDS) | (rules - _RULES.keys())
            if unknown or ("anyOf" in schema and not schema.get("x-kubernetes-int-or-string")):
                raise ValueError(f"{path.name} uses what {Path(__file__).name} does not know: {unknown or 'anyOf'}")
    return dict(definition)


def prune(value: Any, schema: Schema, path: str = "") -> list[str]:
    """Drop the fields that the schema does not name; the paths of those (Field pruning)."""
    found = []
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += prune(item, schema.get("items", OPEN), f"{path}[{index}]")
    elif isinstance(value, dict) and schema.get("type", "object") == "object":
        for name in list(value):
            below = _field(schema, name)
            if below is None:
                del value[name]
                found.append(_join(path, name))
            else:
                found += prune(value[name], below, _join(path, name))
    return found


def fill(value: Any, schema: Schema) -> None:
    """Null counts as unset where it is not allowed; what is unset takes its default (Defaulting and Nullable)."""
    if isinstance(value, list):
        for item in value:
            fill(item, schema.get("items", OPEN))
    elif isinstance(value, dict):
        for name in [name for name, inner in value.items() if inner is None]:
            if not (_field(schema, name) or OPEN).get("nullable"):
                del value[name]
        for name, below in schema.get("properties", {}).items():
            if name not in value and "default" in below:
                value[name] = copy.deepcopy(below["default"])
        for name, inner in value.items():
            fill(inner, _field(schema, name) or OPEN)


def check(value: Any, schema: Schema, old: Any = None) -> list[Cause]:
    """What is wrong. Rules are evaluated only for what is well-formed; old: the object as it was, where it was."""
    return list(_violations(value, schema, "")) or list(_broken_rules(value, old, schema, ""))


def _violations(value: Any, schema: Schema, path: str) -> Iterator[Cause]:
    kind = type_of(value)
    if value is None and schema.get("nullable"):
        return
    types = [schema["type"]] if "type" in schema else []
    if schema.get("x-kubernetes-int-or-string"):
        types = ["integer", "string"]
    if types and kind not in types and not (kind == "integer" and "number" in types):
        text = f'Invalid value: "{kind}": {path} in body must be of type {",".join(types)}: "{kind}"'
        yield Cause(path, "FieldValueTypeInvalid", text)
        return
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(f'"{choice}"' for choice in schema["enum"])
        text = f"Unsupported value: {json.dumps(value)}: supported values: {supported}"
        yield Cause(path, "FieldValueNotSupported", text)
    for rule in (_wrong_text(value, schema), _wrong_number(value, schema), _wrong_length(value, schema)):
        if rule:
            yield Cause(path, "FieldValueInvalid", f"Invalid value: {json.dumps(value)}: {path} in body {rule}")
    if isinstance(value, str) and len(value) > schema.get("maxLength", len(value)):
        yield Cause(path, "FieldValueTooLong", f"Too long: may not be more than {schema['maxLength']} bytes")
    if isinstance(value, list):
        yield from _repeated(value, schema, path)
        for index, item in enumerate(value):
            yield from _violations(item, schema.get("items", OPEN), f"{path}[{index}]")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                yield Cause(_join(path, name), "FieldValueRequired", "Required value")
        for name, inner in value.items():
            yield from _violations(inner, _field(schema, name) or OPEN, _join(path, name))


def _wrong_text(value: Any, schema: Schema) -> str:
    if not isinstance(value, str):
        return ""
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"should match '{schema['pattern']}'"
    if len(value) < schema.get("minLength", 0):
        return f"should be at least {schema['minLength']} chars long"
    if schema.get("format") == "date-time" and not is_time(value):
        return f"must be of type date-time: {json.dumps(value)}"
    return ""


def _wrong_number(value: Any, schema: Schema) -> str:
    if type_of(value) not in ("integer", "number"):
        return ""
    if value < schema.get("minimum", value):
        return f"should be greater than or equal to {schema['minimum']}"
    if value > schema.get("maximum", value):
        return f"should be less than or equal to {schema['maximum']}"
    most = _RANGES.get(schema.get("format", ""))
    if most and not -most <= value < most:
        return f"must be of type {schema['format']}: {json.dumps(value)}"
    return ""


def _wrong_length(value: Any, schema: Schema) -> str:
    if not isinstance(value, list):
        return ""
    if len(value) < schema.get("minItems", 0):
        return f"should have at least {schema['minItems']} items"
    if len(value) > schema.get("maxItems", len(value)):
        return f"should have at most {schema['maxItems']} items"
    return ""


def _repeated(value: list[Any], schema: Schema, path: str) -> Iterator[Cause]:
    """Items of a set, or with the keys of a map (x-kubernetes-list-type), are there once."""
    keys, seen = schema.get("x-kubernetes-list-map-keys"), []
    if schema.get("x-kubernetes-list-type") not in ("set", "map"):
        return
    for index, item in enumerate(value):
        key = {name: item[name] for name in keys if name in item} if keys and isinstance(item, dict) else item
        if key in seen:
            yield Cause(f"{path}[{index}]", "FieldValueDuplicate", f"Duplicate value: {json.dumps(key)}")
        seen.append(key)


def _broken_rules(value: Any, old: Any, schema: Schema, path: str) -> Iterator[Cause]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if ("oldSelf" not in rule["rule"] or old is not None) and not _RULES[rule["rule"]](value, old):
            text = f'Invalid value: "{schema["type"]}": {rule["message"]}'
            yield Cause(path, "FieldValueInvalid", text)
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _broken_rules(item, None, schema.get("items", OPEN), f"{path}[{index}]")
    elif isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for name, inner in value.items():
            yield from _broken_rules(inner, before.get(name), _field(schema, name) or OPEN, _join(path, name))


def _field(schema: Schema, name: str) -> Schema | None:
    """Of a field of an object; None where the schema names none such."""
    if name in schema.get("properties", {}):
        return dict(schema["properties"][name])
    more = schema.get("additionalProperties")
    if more or schema.get("x-kubernetes-preserve-unknown-fields"):
        return dict(more) if isinstance(more, dict) else OPEN
    return None


def _schemas(schema: Schema) -> Iterator[Schema]:
    yield schema
    below = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for inner in below:
        if isinstance(inner, dict):
            yield from _schemas(inner)


def type_of(value: Any) -> str:
    """JSON's name of it; a number without a fraction is an integer."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {bool: "boolean", int: "integer", str: "string", dict: "object", list: "array", type(None): "null"}
    return names[type(value)]


def is_time(text: str) -> bool:
    """As RFC 3339 has it, with a zone."""
    try:
        return "T" in text and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
