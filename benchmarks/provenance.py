"""Which code a result is of, and what it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """That of the checkout, short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def provenance() -> str:
    """Date, commit and processors, for the head of a table."""
    return f"{datetime.date.today()}, commit {commit()}, {os.cpu_count()} CPU cores ({platform.machine()})"
