"""Outlives a killed launcher just long enough to clear up after it. Run as a script, with the standard library alone.

It reads the folder of Ray's files, then lines of "PID START_TICKS". At the end of its input, which comes when the
launcher is gone, however it went, it kills those processes and removes the folder.

Most of Ray's processes end with the launcher by themselves, but its agents go on for a minute, and its files for ever.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys


def main() -> None:
    """Wait for the launcher's end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the launcher decides; this process ends with it
    folder = sys.stdin.readline().rstrip("\n")
    processes = [tuple(map(int, line.split())) for line in sys.stdin]
    for pid, started_ticks in processes:
        if start_ticks(pid) == started_ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: tells it from a later one with the same pid."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the name in parentheses, which may hold anything; the start time is the 22nd field.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


if __name__ == "__main__":
    main()
