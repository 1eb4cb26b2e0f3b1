"""Programs that the tests of deploy/ ask: found, or the test is skipped and says how to get them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
EXTRA = 'pip install -c constraints.txt -e ".[deploy]"'


def program(name: str, remedy: str) -> str:
    """The path of a program, from this environment or the system; else the test is skipped."""
    beside = Path(sys.executable).parent
    found = shutil.which(name, path=str(beside)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: {remedy}")
    return found


def run(*command: str | Path, **options: Any) -> str:
    """What a program prints; it must end with 0."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def files(*patterns: str) -> list[Path]:
    """Files of deploy/ that fit a pattern; each pattern must fit one, so that no test runs on nothing."""
    found = {pattern: sorted(DEPLOY.glob(pattern)) for pattern in patterns}
    assert all(found.values()), found
    return [path for paths in found.values() for path in paths]


def named(path: Path) -> str:
    """A file's name in a test's."""
    return path.relative_to(DEPLOY).as_posix()
