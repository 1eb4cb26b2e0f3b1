"""Somebody who sends runs to a target by the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.runs import RUN, recipe
from tests.cluster.waiting import wait_for
from trainer.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]
TRAIN_S = 300.0


class User:
    """In a folder with targets.yaml and run.yaml. environment: with which commands find the target's site."""

    def __init__(self, folder: Path, environment: Mapping[str, str], targets: str, steps: int, **changes: Any) -> None:
        self.folder = folder
        self.settings = recipe(folder, steps) | changes
        self.store = str(self.settings["store"])
        (folder / "targets.yaml").write_text(targets)
        (folder / "run.yaml").write_text(json.dumps(self.settings))
        self.environment = {**environment, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}

    def start(self, *arguments: str, **environment: str) -> Command:
        """A command of shardyard's, such as ("train", "run.yaml", "--on", "lab")."""
        return Command(self.folder, {**self.environment, **environment}, arguments)

    def run(self, *arguments: str, timeout_s: float = TRAIN_S, **environment: str) -> tuple[int, str]:
        """Exit code of a command, and all that it said."""
        command = self.start(*arguments, **environment)
        return command.wait(timeout_s), command.said

    def record(self) -> RunRecord:
        return RunRecord.open(self.store, RUN)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.record().events() if event["kind"] == kind]

    def steps_done(self) -> int:
        """Of the run as it is; 0 before its first."""
        rows = self.record().stitched() if Path(self.store, RUN, "run.yaml").exists() else []
        return int(rows[-1]["step"]) if rows else 0


class Command:
    """A command that runs; what it says is read while it does."""

    def __init__(self, folder: Path, environment: Mapping[str, str], arguments: tuple[str, ...]) -> None:
        self._said = folder / f"said-{len(list(folder.glob('said-*')))}"
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        with self._said.open("w") as file:
            # Tests that are run in the background ignore Ctrl-C, and so would what they start.
            default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=file, stderr=file, preexec_fn=default
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for(self, words: str, timeout_s: float = TRAIN_S) -> None:
        """Until it has said this."""
        wait_for(lambda: words in self.said or self.has_ended, words, timeout_s)
        assert words in self.said, self.said

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = TRAIN_S) -> int:
        """Its exit code; it is killed where it does not end."""
        try:
            return self._process.wait(timeout_s)
        finally:
            self.end()

    def end(self) -> None:
        """Kill it, if it is still there."""
        self._process.kill()
        self._process.wait()
