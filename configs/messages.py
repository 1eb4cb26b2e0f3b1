"""Pydantic's findings in words for people: the value, the rule it breaks, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs.yaml_text import kind_of, write_value

_NEEDED = {
    "int": "a whole number is needed",
    "float": "a number is needed",
    "string": "text is needed",
    "bool": "true or false is needed",
    "list": "a list is needed",
    "tuple": "a list is needed",
    "dict": "a mapping is needed",
    "model": "a mapping is needed",
}
# What YAML 1.1 took for true and false, and YAML 1.2 takes for text.
_TRUE_OR_FALSE = dict.fromkeys(("yes", "y", "on", "true"), "true") | dict.fromkeys(("no", "n", "off", "false"), "false")


def explain(error: ValidationError, model: type[BaseModel], values: Any) -> list[tuple[str, str]]:
    """(dotted key, message) of each finding. Findings of one key, as unions give them, become one message."""
    found: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        if details["type"] == "rules":
            continue  # the caller checks them itself, also when other settings are wrong
        path = _path(details, values)
        message = _message(details, model, path)
        found.setdefault(_dotted(path), [])
        if message not in found[_dotted(path)]:
            found[_dotted(path)].append(message)
    return [(key, "; or: ".join(messages)) for key, messages in found.items()]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like ``word``, when one is like it at all."""
    by_folded = {other.lower().replace("-", "_"): other for other in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), by_folded, n=1)
    return by_folded[close[0]] if close else None


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this annotation holds, also for ``Section | None``."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def leaf_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of all settings of a section and the sections in it."""
    keys = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        keys += leaf_keys(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def shown(value: object) -> str:
    """``value`` as one would write it, cut when long."""
    text = f"'{value}'" if isinstance(value, str) and value.isprintable() and "'" not in value else write_value(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _path(details: ErrorDetails, values: Any) -> list[str | int]:
    """The finding's place in the values, without the names pydantic puts in for the branches of a union."""
    path: list[str | int] = []
    for depth, part in enumerate(details["loc"], start=1):
        if isinstance(values, Mapping):
            absent = details["type"] == "missing" and depth == len(details["loc"])
            if part not in values and not absent:
                continue
            values = values.get(part)
        elif isinstance(values, (list, tuple)) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        else:
            continue
        path.append(part)
    return path


def _dotted(path: list[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _message(details: ErrorDetails, model: type[BaseModel], path: list[str | int]) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    field = _field(model, path)
    if kind == "extra_forbidden":
        return _unknown(str(path[-1]), model, path)
    if kind == "missing":
        return _missing(path, field)
    if kind == "literal_error":
        return _not_a_choice(value, field, context)
    if kind == "too_long" or kind == "too_short":
        bound = f"at most {context['max_length']}" if kind == "too_long" else f"at least {context['min_length']}"
        return f"{shown(value)} has {context['actual_length']} values; give {bound}"
    if kind == "string_too_short":
        return f"{shown(value)} is too short; give at least {_count(context['min_length'], 'character')}"
    if kind == "string_too_long":
        return f"{shown(value)} is too long; give at most {_count(context['max_length'], 'character')}"
    if kind == "string_pattern_mismatch":
        return f"{shown(value)} does not match the pattern {context['pattern']}{_about(field)}"
    if kind == "finite_number":
        return f"{shown(value)} is not a finite number; give one"
    for limit, words in (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if limit in context:
            return f"{shown(value)} is out of range; it must be {words} {write_value(context[limit])}"
    if kind == "int_from_float" or kind.endswith(("_type", "_parsing", "_attributes_type")):
        return _wrong_kind(kind, value, path, field)
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", "")) or f"{shown(value)} is refused{_about(field)}"
    return str(context["text"]) if "text" in context else f"{shown(value)} is refused{_about(field)}"


def _field(model: type[BaseModel], path: list[str | int]) -> FieldInfo | None:
    """The field that the path leads to, or that holds the list it leads into; None inside free mappings."""
    section: type[BaseModel] | None = model
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = section_of(field.annotation) if field else None
    return field


def _unknown(key: str, model: type[BaseModel], path: list[str | int]) -> str:
    parent = _field(model, path[:-1])
    section = section_of(parent.annotation) if parent else None
    known = list((section or model).model_fields)
    close = nearest(key, known)
    if close is not None:
        return f"unknown key; did you mean '{close}'?"
    elsewhere = [f"'{other}'" for other in leaf_keys(model) if other.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key here; did you mean {_either(elsewhere)}?"
    return f"unknown key; remove it, or use one of: {', '.join(known)}"


def _missing(path: list[str | int], field: FieldInfo | None) -> str:
    example = f", for example: {path[-1]}: {write_value(field.examples[0])}" if field and field.examples else ""
    if isinstance(path[-1], int):
        return f"there is no value number {path[-1] + 1} in the list; add it{_about(field)}"
    return f"missing; add it{example}{_about(field)}"


def _not_a_choice(value: object, field: FieldInfo | None, context: Mapping[str, Any]) -> str:
    choices = _literals(field.annotation) if field else []
    if not choices:
        return f"{shown(value)} is not {context.get('expected', 'allowed')}"
    same = next((choice for choice in choices if str(choice) == str(value)), None)
    names = ", ".join(str(choice) for choice in choices)
    if same is not None:
        return f"{shown(value)} is {kind_of(value)}; write {write_value(same)}, without quotes"
    close = nearest(str(value), [choice for choice in choices if isinstance(choice, str)])
    hint = f"; did you mean '{close}'?" if close else ""
    return f"{shown(value)} is not one of {names}{hint}"


def _literals(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for option in get_args(annotation):
        found += [option] if isinstance(option, (str, int)) else _literals(option)
    return found


def _wrong_kind(kind: str, value: object, path: list[str | int], field: FieldInfo | None) -> str:
    base = kind.partition("_")[0]
    if base in ("model", "dict") and value is None:
        return "null is not a mapping; give the keys of this section, or remove the line to have the defaults"
    remedy = _remedy(base, value, str(path[-1]) if path else "", field)
    given = "it is null" if value is None else f"{shown(value)} is {kind_of(value)}"
    return f"{given}; {_NEEDED.get(base, 'another kind of value is needed')}{remedy}"


def _remedy(base: str, value: object, key: str, field: FieldInfo | None) -> str:
    if base == "model":
        section = section_of(field.annotation) if field else None
        if isinstance(value, str) and section is not None and "name" in section.model_fields:
            return f": write {key}: {{name: {write_value(value)}}}"
    if base in ("int", "float") and isinstance(value, str):
        number = _number(value, base)
        return f": write {write_value(number)}, without quotes" if number is not None else _about(field)
    if base == "int" and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if base == "bool" and isinstance(value, str) and value.lower() in _TRUE_OR_FALSE:
        return f": write {_TRUE_OR_FALSE[value.lower()]}"
    if base == "string" and isinstance(value, (int, float, bool)):
        return f': put it in quotes: "{write_value(value)}"'
    return _about(field)


def _number(text: str, base: str) -> int | float | None:
    try:
        digits = text.replace("_", "").replace(",", "").strip()
        number = float(digits)
        whole = number.is_integer() and (base == "int" or digits.isdecimal())
        return int(number) if whole else number if base == "float" else None
    except (ValueError, OverflowError):
        return None


def _about(field: FieldInfo | None) -> str:
    return f" ({field.description.rstrip('.')})" if field and field.description else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
