"""Where a run came from: code, packages, machine and command. Best effort: it never stops a run."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.redact import Redactor

_MAX_DIFF_CHARACTERS = 1_000_000
_MAX_UNTRACKED = 200
_GIT_TIMEOUT_S = 10.0
_RELEVANT_VARIABLES = re.compile(
    r"(CUDA|NVIDIA|NCCL|GLOO|OMP|MKL|OPENBLAS|TORCH|PYTORCH|DS|DEEPSPEED|RAY|MLFLOW|SHARDYARD|HF|SLURM|AWS|GOOGLE|AZURE)_"
    r"|PYTHON|LD_LIBRARY_PATH|VIRTUAL_ENV"
)


def collect(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """What is needed to run the same again, without secrets.

    folder: where the command was given; if it is in no git repository, the repository of this code is described.
    """
    redactor = Redactor(environ)
    git = git_state(folder)
    if git["commit"] is None:
        here = git_state(Path(__file__).resolve().parent)
        git = here if here["commit"] is not None else git
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redactor.argv(argv),
        "folder": str(folder),
        "user": _user(),
        "host": {
            "name": socket.gethostname(),
            "platform": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "python": platform.python_version(),
        "packages": packages(),
        "environment": {
            name: redactor.value(value, name)
            for name, value in sorted(environ.items())
            if _RELEVANT_VARIABLES.match(name)
        },
        "git": {key: redactor.text(value) if isinstance(value, str) else value for key, value in git.items()},
    }


def packages() -> dict[str, str]:
    """Version by name of every installed distribution."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # a half-removed package has no readable metadata
            continue
        if name:
            found.setdefault(str(name), str(version))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def git_state(folder: Path) -> dict[str, Any]:
    """The repository around `folder`: {root, commit, branch, remote, diff, untracked, problem}.

    All None, with `problem` saying why, where there is no git, no repository, or git refuses. The diff holds staged and
    unstaged changes to tracked files; it is cut at a million characters, and `problem` says so.
    """
    state: dict[str, Any] = dict.fromkeys(("root", "commit", "branch", "remote", "diff", "untracked", "problem"))
    try:
        root = _git(folder, "rev-parse", "--show-toplevel").strip()
        state["root"] = root
        state["commit"] = _git(folder, "rev-parse", "HEAD").strip()
        state["branch"] = _git(folder, "rev-parse", "--abbrev-ref", "HEAD").strip()
        untracked = _git(Path(root), "ls-files", "-z", "--others", "--exclude-standard").split("\0")
        state["untracked"] = [name for name in untracked if name][:_MAX_UNTRACKED]
        diff = _git(Path(root), "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")
        state["diff"] = diff[:_MAX_DIFF_CHARACTERS]
        if len(diff) > _MAX_DIFF_CHARACTERS:
            state["problem"] = f"the diff has {len(diff)} characters and was cut"
        state["remote"] = _git(folder, "config", "--get", "remote.origin.url").strip()
    except FileNotFoundError:
        state["problem"] = "git is not installed, or the folder is gone"
    except subprocess.TimeoutExpired:
        state["problem"] = f"git did not answer within {_GIT_TIMEOUT_S:.0f} s"
    except subprocess.CalledProcessError as error:
        if error.stderr.strip():  # without a remote, git says nothing
            state["problem"] = error.stderr.strip().splitlines()[0]
    except OSError as error:
        state["problem"] = str(error)
    return state


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        timeout=_GIT_TIMEOUT_S,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
    ).stdout


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        return None
