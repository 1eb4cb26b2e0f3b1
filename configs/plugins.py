"""The name is the file: ``gpt`` in ``trainer.models`` is trainer/models/gpt.py; with a dot it is a user's module."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from configs.errors import UsageError
from configs.messages import nearest


def plugin_names(package: str) -> list[str]:
    """Names of the files (and packages) in ``package``, sorted, without those that begin with an underscore.

    The files are not imported; only the parent of ``package`` is.
    """
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    assert folders is not None, f"{package} is not a package"
    files = [file for folder in folders for file in Path(folder).iterdir() if not file.name.startswith(("_", "."))]
    return sorted(
        {file.stem for file in files if file.suffix == ".py"}
        | {file.name for file in files if (file / "__init__.py").is_file()}
    )


def find_plugin(package: str, name: str) -> ModuleType:
    """Import the file ``name`` of ``package``, or the module ``name`` when it holds a dot.

    Raises UsageError when there is none, naming the nearest and all others, and when importing it fails.
    """
    names = plugin_names(package)
    if name in names:
        return _import(f"{package}.{name}", f"{package.replace('.', '/')}/{name}.py")
    kind = package.rpartition(".")[2].removesuffix("s")
    if "." not in name:
        close = nearest(name, names)
        hint = f" Did you mean '{close}'?" if close else ""
        raise UsageError(
            f"There is no {kind} '{name}' in {package.replace('.', '/')}.{hint} There are: {', '.join(names)}. "
            "A file of your own is named by its module path, for example my_package.my_file."
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"'{name}' is not a module path. Write it without .py, for example my_package.my_file.")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    return _import(name, f"the {kind} '{name}'")


def _import(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(missing + "."):
            raise UsageError(
                f"There is no module '{missing}' for {what}: it was looked for in the current folder "
                f"({os.getcwd()}) and in the installed packages. Check the name, or run from the folder that holds it."
            ) from error
        raise UsageError(f"{what} needs the module '{missing}', which is not installed. Install it.") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno}"
        if isinstance(error, SyntaxError) and error.filename:
            place = f"{error.filename}:{error.lineno}"
        raise UsageError(
            f"{what} cannot be imported: {type(error).__name__}: {error} ({place}). Correct the file there."
        ) from error
