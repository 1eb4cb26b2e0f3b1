"""Writes docs/configuration.md from the settings' own descriptions: `python docs/make_configuration.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.messages import section_of
from configs.plugins import find_plugin, plugin_names
from configs.schema import Plugin, RunConfig
from configs.yaml_text import write_value
from data_pipelines.sources import SourceConfig

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

A run is one YAML file, a recipe. These are all its keys. The page is made from the descriptions in `configs/schema.py`
and in the files of tasks, models and sources, by `python docs/make_configuration.py`; a test holds it to them.

- A file is complete: there is no inheritance, no include and no environment variable in it.
- A key is written as nested mappings (`zero: {stage: 2}`), or on the command line with dots (`zero.stage=2`). The value
  on the command line is YAML too.
- YAML is version 1.2: `1e-3` is a number, `on` and `yes` are text. Aliases and tags are refused.
- Unknown keys are refused, with the nearest right one. All that is wrong is reported at once.
- `null` means unset.
- Some keys exclude each other; `configs/rules.py` holds those rules, each with its message.
- `shardyard check RECIPE` shows what a recipe will do, and `shardyard init FILE` writes a commented one.
- A run's folder holds `run.yaml`: every value, and behind each where it came from.
"""
PLUGINS = (
    ("task", "trainer.tasks", "Tasks"),
    ("model", "trainer.models", "Models"),
    ("data", "data_pipelines.sources", "Data sources"),
)
TYPES = {bool: "true, false", int: "whole number", float: "number", str: "text", type(None): "null"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_sections(RunConfig, "## The run", "One run, complete.", "")]
    for key, package, title in PLUGINS:
        parts.append(
            f"## {title}\n\n`{key}.name` is the name of a file in `{package.replace('.', '/')}/`, or the module path "
            "of a file of your own.\nThe other keys of the section are that file's.\n"
        )
        if key == "data":
            summary = "Settings that every source has; the tables below leave them out, but where the default differs."
            parts += _sections(SourceConfig, "### Every source", summary, "data.")
        for name in plugin_names(package):
            config = find_plugin(package, name).Config
            inherited = SourceConfig if key == "data" else None
            parts += _sections(config, f"### `{key}: {{name: {name}}}`", config.__doc__ or "", f"{key}.", inherited)
    return "\n".join(parts)


def _sections(
    model: type[BaseModel], heading: str, summary: str, prefix: str, inherited: type[BaseModel] | None = None
) -> Iterator[str]:
    """A section's table, then those of the sections in it. inherited: whose settings are left out."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    inner: list[str] = []
    known = inherited.model_fields if inherited else {}
    for name, field in model.model_fields.items():
        if name in known and known[name].default == field.default:
            continue
        key, description = prefix + name, field.description or ""
        section = section_of(field.annotation)
        if section is None:
            rows.append(_row(key, field))
        elif issubclass(section, Plugin):
            rows.append(f"| `{key}.name` | text | required | {description} |")
        elif field.default is None:
            rows.append(f"| `{key}` | null, or the settings below | `null` | {description} |")
            inner += _sections(section, f"{heading.partition(' ')[0]}# `{key}`", description, f"{key}.")
        else:
            inner += _sections(section, f"{heading.partition(' ')[0]}# `{key}`", description, f"{key}.")
    table = "\n".join(rows) + "\n" if len(rows) > 2 else "It has no settings of its own.\n"
    yield f"{heading}\n\n{summary}\n\n{table}"
    yield from inner


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.default is PydanticUndefined else f"`{write_value(field.default)}`"
    cells = (f"`{key}`", _values(field), default, field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(field: FieldInfo) -> str:
    """What may be written: a kind of value and its bounds, or the choices."""
    kinds = _kinds(field.annotation)
    bounds = [
        f"{words} {write_value(getattr(limit, name))}"
        for limit in field.metadata
        for name, words in BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([" or ".join(kinds), *bounds])


def _kinds(annotation: Any) -> list[str]:
    if annotation in TYPES:
        return [TYPES[annotation]]
    if get_origin(annotation) is Literal:
        return [", ".join(f"`{choice}`" for choice in get_args(annotation))]
    if get_origin(annotation) is tuple:
        items = [argument for argument in get_args(annotation) if argument is not Ellipsis]
        count = "any number" if Ellipsis in get_args(annotation) else str(len(items))
        return [f"list ({_kinds(items[0])[0]}, {count} of them)"]
    if get_origin(annotation) is Mapping:
        return [f"mapping of names to {' or '.join(_kinds(get_args(annotation)[1]))}"]
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kinds(get_args(annotation)[0])
    return [kind for option in get_args(annotation) for kind in _kinds(option)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
