"""The commented file that `shardyard init` writes: every setting, with its description and a working value."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.load import load
from configs.messages import section_of
from configs.schema import RunConfig
from configs.yaml_text import write_text, write_value

SCHEMA_FILE = "shardyard.schema.json"


def commented_recipe(recipe: str = "language_modeling-gpt-tiny") -> str:
    """A complete file with all values of ``recipe``, defaults too, each under its description.

    Its first line points editors to the schema, to be written beside it as :data:`SCHEMA_FILE`.
    Raises NotFound for an unknown recipe.
    """
    lines = [
        f"# yaml-language-server: $schema=./{SCHEMA_FILE}",
        "# `shardyard check` with the path of this file lists all that is wrong with it; `shardyard train` trains it.",
        "# Both take changes for once: shardyard train FILE steps=100 zero.stage=2",
    ]
    _write(load(recipe).config.model_dump(), RunConfig, "", lines)
    return "\n".join(lines) + "\n"


def _write(values: Mapping[str, Any], model: type[BaseModel] | None, indent: str, lines: list[str]) -> None:
    for key, value in values.items():
        field = model.model_fields.get(key) if model else None
        if not indent:
            lines.append("")
        if field is not None:
            lead = f"{indent}# "
            lines.extend(textwrap.wrap(_comment(field), 110, initial_indent=lead, subsequent_indent=lead))
        if isinstance(value, Mapping) and value:
            lines.append(f"{indent}{write_text(key)}:")
            _write(value, section_of(field.annotation) if field else None, indent + "  ", lines)
        else:
            lines.append(f"{indent}{write_text(key)}: {write_value(value)}")


def _comment(field: FieldInfo) -> str:
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, (str, int))]
    return (field.description or "") + (f" One of: {', '.join(choices)}." if choices else "")
