"""Imports point one way, and heavy libraries stay where they belong. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each package may import itself and those before it.
LAYERS = ("configs", "data_pipelines", "trainer", "cluster")
# Imported by nobody in the layers.
OUTSIDE = ("deploy", "tests", "benchmarks")
# The only places that may import these.
HOMES = {
    "deepspeed": ("trainer/engine.py",),
    "ray": ("cluster/",),
    "mlflow": ("cluster/",),
    "torch": (
        *(f"data_pipelines/{name}.py" for name in ("batches", "buffers", "loader", "native")),
        *("trainer/", "cluster/"),
    ),
    "transformers": ("trainer/", "cluster/"),
    "numpy": ("data_pipelines/", "trainer/", "cluster/"),
    "pyarrow": ("data_pipelines/", "trainer/", "cluster/"),
    "rich": ("cluster/",),
}
# Too slow to import for `shardyard --help`; a layer's __init__ runs whenever a part of it is imported.
HEAVY = ("torch", "deepspeed", "ray", "mlflow", "transformers")


def files() -> list[Path]:
    return sorted(file for layer in LAYERS for file in (ROOT / layer).rglob("*.py"))


def imports(source: str, at_import_time_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of each import, also those in functions unless told otherwise."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)
        if not (lazy and at_import_time_only):
            todo.extend(ast.iter_child_nodes(node))


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def broken_layers(path: str, source: str) -> list[str]:
    """What in the file at ``path`` (relative, with slashes) imports against the direction or away from home."""
    allowed = LAYERS[: LAYERS.index(path.partition("/")[0]) + 1]
    found = []
    for line, module in imports(source):
        top = module.partition(".")[0]
        if module.startswith("."):
            found.append(f"{path}:{line} imports relatively ({module}); write the full name")
        elif top in OUTSIDE or (top in LAYERS and top not in allowed):
            found.append(f"{path}:{line} imports {module}; it may import {', '.join(allowed)}")
        elif top in HOMES and not path.startswith(HOMES[top]):
            found.append(f"{path}:{line} imports {module}; only {', '.join(HOMES[top])} may")
    return found


def test_imports_point_one_way() -> None:
    assert [fault for file in files() for fault in broken_layers(_name(file), file.read_text())] == []


def test_no_layer_imports_anything_heavy_by_itself() -> None:
    faults = [
        f"{_name(file)}:{line} imports {module}"
        for file in (ROOT / layer / "__init__.py" for layer in LAYERS)
        for line, module in imports(file.read_text(), at_import_time_only=True)
        if module.partition(".")[0] in HEAVY
    ]
    assert faults == []


def test_every_layer_is_there() -> None:
    """Otherwise the tests above would pass on nothing."""
    assert {_name(file).partition("/")[0] for file in files()} == set(LAYERS)


def test_no_package_hides_the_standard_library() -> None:
    assert not {*LAYERS, *OUTSIDE} & set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("path", "source", "faults"),
    [
        ("configs/a.py", "import torch", 1),
        ("configs/a.py", "def f():\n    from trainer.loop import train", 1),
        ("configs/a.py", "import numpy as np, pydantic", 1),
        ("data_pipelines/order.py", "import torch.utils", 1),
        ("data_pipelines/loader.py", "import torch\nfrom configs.errors import UsageError", 0),
        ("trainer/loop.py", "import deepspeed", 1),
        ("trainer/engine.py", "import deepspeed\nimport ray", 1),
        ("trainer/loop.py", "import importlib\nimportlib.import_module('mlflow')", 1),
        ("trainer/a.py", "from cluster import train", 1),
        ("trainer/a.py", "from . import loop", 1),
        ("cluster/a.py", "import ray, mlflow, torch\nfrom trainer.loop import train", 0),
        ("cluster/a.py", "import tests.pool", 1),
        ("cluster/a.py", "import rayon, torchvision", 0),
    ],
)
def test_the_check_sees_each_kind_of_fault(path: str, source: str, faults: int) -> None:
    assert len(broken_layers(path, source)) == faults


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()
