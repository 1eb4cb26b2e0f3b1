"""How many workers each user may have at a time in the queue of a Ray cluster: a file on the cluster's head.

default: 8
ada: 16
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from configs.errors import UsageError
from configs.messages import shown
from configs.yaml_text import parse

FILE = "quota.yaml"


def quota_file() -> Path | None:
    """The user's who runs the cluster, else the machine's; None without one."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((path / FILE for path in (home / "shardyard", Path("/etc/shardyard")) if (path / FILE).is_file()), None)


def load_quota(file: Path | None) -> dict[str, int]:
    """Workers by user; without a file there is no limit.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    if file is None:
        return {}
    try:
        parsed = parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}. Check the file and its permissions.") from None
    values = parsed.values if isinstance(parsed.values, Mapping) else {}
    wrong = [f"line {line}: {message}" for line, _, message in parsed.problems]
    wrong += [
        f"{name}: {shown(value)}"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 0
    ]
    if wrong or not values:
        said = "; ".join(wrong) or "nothing"
        raise UsageError(f"{file} gives each user a number of workers, as in `ada: 16`. It holds {said}. Mend it.")
    return dict(values)
