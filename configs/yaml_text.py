"""YAML 1.2 in and out: values with the line of each, and text that reads back as exactly the same values.

PyYAML speaks YAML 1.1, where ``1e-3`` is text and ``on`` is true. Here its scanner and composer are kept and scalars
are resolved by the core schema of YAML 1.2.2 (https://yaml.org/spec/1.2.2/#103-core-schema). Aliases, custom tags and
duplicate keys are refused: a run is one complete file that reads the same to everybody.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"^(?:null|Null|NULL|~|)\Z")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]{1,60}|0x[0-9a-fA-F]{1,60})\Z")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_PLAIN_TEXT = re.compile(r"^[A-Za-z_/][A-Za-z0-9_./+-]*\Z")
_TIGHT_COLON = re.compile(r"^[A-Za-z_/][A-Za-z0-9_./+:-]*[A-Za-z0-9_/]\Z")

# What PyYAML says -> what to do about it. The first entry found in its text is used.
_HINTS = (
    ("found character '\\t'", "indent with spaces, not with tabs"),
    ("scanning an alias", "text that begins with '*' needs quotes"),
    ("scanning an anchor", "text that begins with '&' needs quotes"),
    ("found character", "text that begins with this character needs quotes"),
    ("mapping values are not allowed", "check the indentation, or put quotes round a value that holds ': '"),
    ("could not find expected ':'", "write 'key: value', with a space after the colon"),
    ("expected ',' or '}'", "a '{' is not closed, or a comma is missing"),
    ("expected ',' or ']'", "a '[' is not closed, or a comma is missing"),
    ("scanning a quoted scalar", "a quote is not closed"),
    ("but found another document", "keep one document to a file: remove the '---' line"),
    ("expected <block end>", "the indentation of this line does not match the lines above"),
    ("special characters are not allowed", "remove the control character"),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner, parser and composer with the resolver of YAML 1.2 and no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "scanning an alias: aliases are not used here", mark)
        return super().compose_node(parent, index)


# Under None stand the resolvers that are tried for every first character.
_Loader.yaml_implicit_resolvers = {
    None: [
        (_TAG + kind, pattern) for kind, pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT))
    ]
}


@dataclass
class Parsed:
    """Values of one YAML text. Lines count from 1; ``ends`` is where a value's text stops (line, column from 0)."""

    values: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    ends: dict[Path, tuple[int, int]] = field(default_factory=dict)
    problems: list[tuple[int, Path, str]] = field(default_factory=list)


def parse(text: str) -> Parsed:
    """Read one YAML document. Every fault ends up in ``problems``; nothing is raised for a user's mistake."""
    parsed = Parsed()
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            parsed.values = _value(node, (), parsed)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parsed.problems.append((mark.line + 1 if mark else 1, (), _syntax_message(error)))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        parsed.problems.append((line, (), f"not valid YAML: character U+{_code(error.character):04X}; remove it"))
    except RecursionError:
        parsed.problems.append((1, (), "nested too deeply to be read; write it flatter"))
    finally:
        if loader is not None:
            loader.dispose()
    return parsed


def key_problem(key: object) -> str | None:
    """Why ``key`` cannot be a key of a configuration, or None when it can."""
    if not isinstance(key, str):
        return f"the key {write_value(key)} is {kind_of(key)}, keys are text; put quotes round it"
    if not key:
        return "an empty key; give it a name"
    if "." in key:
        nested = ": {".join(key.split(".")) + ": ..." + "}" * key.count(".")
        return f"a key holds no dots in a file; write it nested: {nested}"
    if len(key) > 200:
        return "a key of more than 200 characters; shorten it"
    return None


def kind_of(value: object) -> str:
    """The word for the kind of ``value`` in messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a true/false value"
    for kind, word in ((int, "a whole number"), (float, "a number"), (str, "text"), (Mapping, "a mapping")):
        if isinstance(value, kind):
            return word
    return "a list" if isinstance(value, (list, tuple)) else f"a Python {type(value).__name__}"


def write_value(value: object) -> str:
    """``value`` on one line, as YAML that :func:`parse` reads back as the same value (lists for tuples)."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        if math.isnan(value):
            return ".nan"
        return repr(value) if math.isfinite(value) else (".inf" if value > 0 else "-.inf")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{write_text(str(key))}: {write_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(write_value(item) for item in value) + "]"
    return write_text(str(value))


def write_text(text: str) -> str:
    """``text`` plain where that reads back as the same text anywhere, in double quotes otherwise."""
    plain = _PLAIN_TEXT.match(text) or _TIGHT_COLON.match(text)
    if plain and len(text) < 200 and not (_NULL.match(text) or _BOOL.match(text)):
        return text
    return '"' + "".join(_escape(char) for char in text) + '"'


def _escape(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _value(node: yaml.Node, path: Path, parsed: Parsed) -> Any:
    parsed.lines.setdefault(path, node.start_mark.line + 1)
    parsed.ends[path] = (node.end_mark.line, node.end_mark.column)
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, path, parsed)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        # Lists are single values: the lines of their items are not kept.
        return [_value(item, (*path, str(index)), parsed) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, parsed)
    parsed.problems.append((node.start_mark.line + 1, path, f"the tag {node.tag} is not used here; remove it"))
    return None


def _mapping(node: yaml.MappingNode, path: Path, parsed: Parsed) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            parsed.problems.append((line, path, "a key is one word; put quotes round text that begins with '{' or '['"))
            continue
        key = _scalar(key_node, path, parsed)
        problem = key_problem(key)
        if problem is None and key in values:
            problem = f"given twice, also on line {parsed.lines[(*path, key)]}; keep one"
        if problem is not None:
            parsed.problems.append((line, (*path, str(key)), problem))
            continue
        parsed.lines[(*path, key)] = line
        values[key] = _value(value_node, (*path, key), parsed)
    return values


def _scalar(node: yaml.ScalarNode, path: Path, parsed: Parsed) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    try:
        if kind == "str":
            return text
        if kind == "null" and _NULL.match(text):
            return None
        if kind == "bool" and _BOOL.match(text):
            return text.lower() == "true"
        if kind == "int" and _INT.match(text):
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if kind == "float" and _FLOAT.match(text):
            return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".n", "n"))
    except ValueError:
        pass  # more digits than Python reads
    message = f"{write_value(text[:60])} cannot be read as {kind}; remove the tag, or correct the value"
    parsed.problems.append((node.start_mark.line + 1, path, message))
    return None


def _code(character: int | str | bytes) -> int:
    return character if isinstance(character, int) else ord(character)


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    said = " ".join(part for part in (error.context, error.problem) if part)
    hint = next((hint for phrase, hint in _HINTS if phrase in said), "correct the line, or quote the text in it")
    return f"not valid YAML: {error.problem or error.context}; {hint}"
