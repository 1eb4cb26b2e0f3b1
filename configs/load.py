"""Read a run's configuration: a recipe, then ``key=value`` overrides; and write it down resolved.

    load("language_modeling-gpt-tiny", ["steps=100"])   ->  Resolved(config, origins, path)
    dump(resolved)                                      ->  the text of run.yaml, each value followed by its origin
    load_resolved(text)                                 ->  exactly the same Resolved

All that is wrong with a configuration is reported at once, each fault with its file and line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.errors import NotFound, UsageError
from configs.messages import explain, nearest, section_of, shown
from configs.problems import ConfigError, Problem, where
from configs.rules import broken_rules
from configs.schema import Plugin, RunConfig, Section, flatten
from configs.yaml_text import Parsed, key_problem, parse, write_text, write_value

__all__ = ["ConfigError", "Problem", "Resolved", "dump", "load", "load_resolved", "recipe_names", "validate_plugin"]

RECIPES = Path(__file__).parent / "recipes"
COMMAND_LINE = "command line"
DEFAULT = "default"
PYTHON = "python"
_PATH_MARK = "# recipe: "


@dataclass(frozen=True)
class Resolved:
    """A complete configuration. ``origins``: dotted key of each value -> "file:line", "command line", "default", or
    "python" for a mapping; ``path``: the file it was read from, None for a mapping."""

    config: RunConfig
    origins: dict[str, str]
    path: str | None


def load(recipe: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()) -> Resolved:
    """Read a recipe (a path, the name of a file in configs/recipes, or a mapping) and apply overrides in order.

    Raises ConfigError with everything that is wrong, NotFound for a missing recipe, UsageError for an unreadable one.
    """
    if isinstance(recipe, (Mapping, RunConfig)):
        path, place = None, None
        values, origins, problems = _from_mapping(recipe)
    else:
        file = _find(recipe)
        path, place = str(file), _place(file)
        parsed = parse(_read(file, place))
        values, origins, problems = parsed.values, _line_origins(parsed, place), _file_problems(parsed, place)
        if not isinstance(values, dict):
            raise ConfigError(problems or [Problem(place, "", _not_a_mapping(values))])
    for override in overrides:
        problems += _apply(override, values, origins)
    return Resolved(*_resolve(values, origins, problems, place), path)


def validate_plugin(
    schema: type[Section], plugin: Plugin, key: str, origins: Mapping[str, str]
) -> tuple[Section | None, list[Problem]]:
    """Check the settings of ``plugin``, found under ``key``, against the Config of its file."""
    problems = []
    try:
        return schema.model_validate(plugin.settings), []
    except ValidationError as error:
        for below, message in explain(error, schema, plugin.settings):
            dotted = f"{key}.{below}" if below else key
            problems.append(Problem(where(_without_index(dotted), origins, DEFAULT), dotted, message))
    return None, problems


def recipe_names() -> list[str]:
    """Names of the recipes that come along."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def dump(resolved: Resolved) -> str:
    """The text of run.yaml: one value a line, its origin behind it. :func:`load_resolved` is its inverse."""
    lines = [
        "# The resolved configuration of one run. Behind each value: where it came from.",
        _PATH_MARK + write_value(resolved.path),
    ]
    _write(resolved.config.model_dump(), resolved.origins, "", lines)
    return "\n".join(lines) + "\n"


def load_resolved(text: str, file: str = "run.yaml") -> Resolved:
    """Read what :func:`dump` wrote. A value without an origin behind it gets its line in ``file``."""
    parsed = parse(text)
    problems = _file_problems(parsed, file)
    if not isinstance(parsed.values, dict):
        raise ConfigError(problems or [Problem(file, "", _not_a_mapping(parsed.values))])
    config, origins = _resolve(parsed.values, _line_origins(parsed, file), problems, file)
    lines = text.split("\n")
    for path, (line, column) in parsed.ends.items():
        key, comment = ".".join(path), lines[line][column:].strip()
        if key in origins and comment.startswith("# "):
            origins[key] = _read_comment(comment[2:])
    return Resolved(config, origins, _written_path(text))


def _find(recipe: str | Path) -> Path:
    file = Path(recipe)
    named = file.suffix in (".yaml", ".yml") or len(file.parts) > 1
    names = recipe_names()
    if not os.path.isfile(file) and str(recipe) in names:
        return RECIPES / f"{recipe}.yaml"
    if os.path.exists(file):
        return file
    nearby = sorted(other.name for other in file.parent.glob("*.y*ml")) if named and os.path.isdir(file.parent) else []
    close = nearest(file.name, nearby)
    suggestion = str(file.parent / close) if close else nearest(file.stem if named else str(recipe), names)
    hint = f" Did you mean '{suggestion}'?" if suggestion else ""
    what = f"There is no file '{recipe}'." if named else f"There is no recipe, and no file, named '{recipe}'."
    raise NotFound(f"{what}{hint} Give the path of a YAML file, or one of the recipes: {', '.join(names)}.")


def _read(file: Path, place: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise UsageError(f"{place} is a folder. Give the path of a YAML file, for example {place}/run.yaml.") from None
    except UnicodeDecodeError as error:
        message = f"{place} is not UTF-8 text (byte {error.start}). Save it as UTF-8, or give the path of a YAML file."
        raise UsageError(message) from None
    except OSError as error:
        raise UsageError(f"{place} cannot be read: {error.strerror}. Check the file and its permissions.") from None


def _place(file: Path) -> str:
    """The file's name in messages: as short as still leads there from the current folder."""
    if file.parent == RECIPES:
        return f"configs/recipes/{file.name}"  # the same wherever Shardyard is installed
    absolute = os.path.abspath(file)
    relative = os.path.relpath(absolute)
    text = absolute if relative.startswith("..") else relative
    return text if text.isprintable() else ascii(text)


def _line_origins(parsed: Parsed, file: str) -> dict[str, str]:
    return {".".join(path): f"{file}:{line}" for path, line in parsed.lines.items() if path}


def _file_problems(parsed: Parsed, file: str) -> list[Problem]:
    return [Problem(f"{file}:{line}", ".".join(path), message) for line, path, message in parsed.problems]


def _not_a_mapping(values: object) -> str:
    if values is None:
        return "it is empty; write the keys of a run in it, or start from a recipe with `shardyard init`"
    return f"{shown(values)} is not a mapping; write the keys of a run in it, each as 'key: value'"


def _from_mapping(recipe: Mapping[str, Any] | RunConfig) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    problems: list[Problem] = []

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        if isinstance(value, (list, tuple)):
            return [plain(item, key) for item in value]
        if not isinstance(value, Mapping):
            return value
        kept = {}
        for name, item in value.items():
            message, dotted = key_problem(name), f"{key}.{name}".lstrip(".")
            if message is None:
                kept[name] = plain(item, dotted)
            else:
                problems.append(Problem(PYTHON, dotted, message))
        return kept

    values = plain(recipe, "")
    return values, dict.fromkeys(flatten(values), PYTHON), problems


def _apply(override: str, values: dict[str, Any], origins: dict[str, str]) -> list[Problem]:
    """Set one ``key=value`` in place; the value is YAML. Mappings on the way are created."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        message = f"{shown(override)} is not an override; write key=value, for example steps=100 or zero.stage=2"
        return [Problem(COMMAND_LINE, "", message)]
    parsed = parse(text)
    if parsed.problems:
        return [Problem(COMMAND_LINE, key, message) for _, _, message in parsed.problems]
    section = values
    for index, part in enumerate(parts[:-1]):
        if not isinstance(section.get(part), dict):
            section[part] = {}
            _forget(".".join(parts[: index + 1]), origins)
        section = section[part]
    section[parts[-1]] = parsed.values
    _forget(key, origins)
    origins[key] = COMMAND_LINE
    origins.update({f"{key}.{'.'.join(path)}": COMMAND_LINE for path in parsed.lines if path})
    return []


def _forget(key: str, origins: dict[str, str]) -> None:
    for other in [other for other in origins if other == key or other.startswith(key + ".")]:
        del origins[other]


def _resolve(
    values: dict[str, Any], origins: Mapping[str, str], problems: Iterable[Problem], place: str | None
) -> tuple[RunConfig, dict[str, str]]:
    """The config and the origin of each of its values; raises ConfigError with all problems, old ones too."""
    problems = list(problems)
    reported = {problem.key for problem in problems}
    fallback = f"{place}:1" if place else PYTHON
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        wrong = []
        for key, message in explain(error, RunConfig, values):
            wrong.append(_without_index(key))
            if key not in reported:
                problems.append(Problem(where(wrong[-1], origins, fallback), key, message))
        for keys, message in broken_rules(_right_values(values, wrong)):
            given = next((key for key in keys if key in origins), keys[0])
            problems.append(Problem(where(given, origins, DEFAULT), keys[0], message))
    if config is None or problems:
        raise ConfigError(problems, values, origins)
    return config, {key: origins.get(key, DEFAULT) for key in flatten(config.model_dump())}


def _right_values(values: dict[str, Any], wrong: Sequence[str]) -> dict[str, Any]:
    """Flat values, defaults included, without those that are wrong or lie in something wrong."""
    flat = _defaults(RunConfig, "") | flatten(values)
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{bad}.") for bad in wrong)}


def _defaults(model: type[BaseModel], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and not issubclass(section, Plugin):
            flat.update(_defaults(section, f"{prefix}{name}."))
        elif not field.is_required():
            flat[prefix + name] = field.default
    return flat


def _without_index(key: str) -> str:
    return ".".join(part.partition("[")[0] for part in key.split("."))


def _write(values: Mapping[str, Any], origins: Mapping[str, str], prefix: str, lines: list[str]) -> None:
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines.append(f"{indent}{write_text(key)}:")
            _write(value, origins, f"{prefix}{key}.", lines)
        else:
            comment = _write_comment(origins[prefix + key])
            lines.append(f"{indent}{write_text(key)}: {write_value(value)}  # {comment}")


def _write_comment(origin: str) -> str:
    plain = origin.isprintable() and origin == origin.strip() and not origin.startswith('"')
    return origin if plain else json.dumps(origin)


def _read_comment(comment: str) -> str:
    return str(json.loads(comment)) if comment.startswith('"') and comment.endswith('"') else comment


def _written_path(text: str) -> str | None:
    line = next((line for line in text.split("\n") if line.startswith(_PATH_MARK)), None)
    return parse(line.removeprefix(_PATH_MARK)).values if line is not None else None
