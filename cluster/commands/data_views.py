"""What `shardyard data` prints for a person."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from cluster.commands.output import facts, pretty, say, table

_BAR_CHARACTERS = 40
_CELLS = ("rows", "tokens", "bytes", "bytes_per_token", "blocks", "files", "stored_bytes")
_HEADER = ("SPLIT", "ROWS", "TOKENS", "BYTES", "BYTES/TOKEN", "BLOCKS", "FILES", "STORED BYTES")


def show(arguments: Namespace, described: Mapping[str, Any]) -> None:
    """A data set's summary (data_pipelines/inspect.py): where, what columns, how much."""
    shown = {"path": described["path"], "fingerprint": described["fingerprint"]}
    shown["columns"] = ", ".join(map(_column, described["columns"]))
    if described["tokenizer"]:
        shown["vocab_size"] = described["tokenizer"]["vocab_size"]
    if described["compression"]:
        shown["compression"] = described["compression"]
    if described["quarantined"]:
        shown["bad rows"] = described["quarantined"]
    if described["dropped"]:
        shown["left out"] = ", ".join(f"{count:,} {reason}" for reason, count in described["dropped"].items())
    if described["packed"]:
        packed = described["packed"]
        shares = ", ".join(f"{100 * split['waste']:.2g} % of {name}" for name, split in packed["splits"].items())
        shown["packed"] = f"{packed['kind']}, {packed['seq_len']:,} tokens a sequence; padding is {shares}"
    facts(arguments, shown)
    say(arguments)
    splits = described["splits"].items()
    table(arguments, _HEADER, [(name, *(split[key] for key in _CELLS)) for name, split in splits])


def _column(column: Mapping[str, Any]) -> str:
    """`tokens list<uint16>`, `image uint8[3, 32, 32]`, `label int64`, `key utf8`."""
    shape = column["shape"]
    if column["dtype"] in ("utf8", "binary") or not shape:
        return f"{column['name']} {column['dtype']}"
    inner = [size for size in shape if size is not None]
    item = f"{column['dtype']}{inner}" if inner else column["dtype"]
    return f"{column['name']} " + (f"list<{item}>" if shape[0] is None else item)


def show_lengths(arguments: Namespace, split: str, column: str, lengths: Mapping[str, Any]) -> None:
    """A histogram of the lengths in a ragged column, a bar a class."""
    classes = lengths["classes"]
    if not classes:
        return
    most = max(one["rows"] for one in classes)
    looked_at = f" (of {lengths['rows']:,} rows looked at)" if lengths["is_sample"] else ""
    say(arguments, f"\n{split}: lengths of {column}, {lengths['shortest']:,} to {lengths['longest']:,}{looked_at}")
    labels = [f"{one['at_least']:,} to {one['below'] - 1:,}" for one in classes]
    width = max(map(len, labels))
    for label, one in zip(labels, classes, strict=True):
        bar = "#" * -(-_BAR_CHARACTERS * one["rows"] // most)
        say(arguments, f"  {label:>{width}}  {pretty(one['rows']):>9}  {bar}".rstrip())


def show_example(arguments: Namespace, split: str, example: Mapping[str, Any]) -> None:
    """One row, a column after the other; a picture by its size, and as coloured blocks in a terminal."""
    say(arguments, f"\n{split}: {example.get('key', 'an example')}")
    for name, value in example.items():
        if name == "key":
            continue
        if not isinstance(value, dict):
            say(arguments, f"  {name}: {pretty(value)}")
        elif "text" in value:
            say(arguments, f"  {name}, {value['length']:,} long, begins:\n\n{value['text']}\n")
        elif "picture" in value:
            say(arguments, f"  {name}: a picture of {' x '.join(map(str, value['shape']))}")
            if _shows_colours(arguments):
                say(arguments, "\n".join(value["picture"]))
        else:
            say(arguments, f"  {name}: " + ", ".join(f"{key} {item}" for key, item in value.items()))


def _shows_colours(arguments: Namespace) -> bool:
    stream = sys.stderr if arguments.json else sys.stdout
    return stream.isatty() and shutil.get_terminal_size().columns >= _BAR_CHARACTERS


def show_diff(arguments: Namespace, a: str, b: str, found: Mapping[str, Any]) -> None:
    """What data_pipelines/diff.py found."""
    if found["same"]:
        say(arguments, f"{a} and {b} hold the same data.")
        return
    say(arguments, f"a  {a}\nb  {b}")
    for name in ("columns", "tokenizer", "source"):
        if name in found:
            say(arguments, f"\n{name}: {_pairs(found[name])}")
    for split, values in found.get("splits", {}).items():
        say(arguments, f"\nsplit {split}:")
        for name in ("rows", "tokens", "bytes", "blocks"):
            one, other = values[name]
            say(arguments, f"  {name}: {pretty(one)} in a, {pretty(other)} in b")
        for name, what in (("only_a", "rows only in a"), ("only_b", "rows only in b"), ("changed", "rows changed")):
            if values.get(name):
                keys = ", ".join(values["examples"][name])
                say(arguments, f"  {what}: {values[name]:,} ({keys}{', ...' if values[name] > 5 else ''})")


def _pairs(values: Any) -> str:
    if isinstance(values, Mapping):
        return "; ".join(f"{name}: {_pairs(value)}" for name, value in values.items() if value)
    if isinstance(values, list) and len(values) == 2:
        return f"{_pairs(values[0])} in a, {_pairs(values[1])} in b"
    return str(values)
