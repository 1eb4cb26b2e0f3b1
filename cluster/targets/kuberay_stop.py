"""What a pod of a run does before it goes: launchers in it are told, and it stays until their workers have saved.

Kubernetes tells a container's first process alone, which is Ray's, and all pods of a job at once. Run as
`python -m cluster.targets.kuberay_stop` by the preStop hook, within the pod's grace. A launcher that was told ends with
75, and so is started again.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from cluster.worker import Worker


def main() -> None:
    """SIGTERM to all launchers in this container; return when they, and the workers in it, have ended."""
    commands = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    launchers = [process for process, command in commands if _launches(command)]
    for launcher in launchers:
        try:
            launcher.terminate()
        except psutil.NoSuchProcess:  # it has just ended
            pass
    workers = [process for process, command in commands if " ".join(command).startswith(f"ray::{Worker.__name__}")]
    psutil.wait_procs([*launchers, *workers])


def _launches(command: list[str]) -> bool:
    """`python -m cluster.cli train ...`, or `shardyard train ...` by the script's path."""
    is_ours = command[1:3] == ["-m", "cluster.cli"] or Path("".join(command[1:2])).name == "shardyard"
    return is_ours and "train" in command[2:4]


if __name__ == "__main__":
    main()
