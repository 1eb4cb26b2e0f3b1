"""What the head's pod does before it goes: its launchers are told, and have as long as the pod's grace to save.

Kubernetes sends SIGTERM to a container's first process, which is Ray's, and a launcher is not that. Run as
`python -m cluster.targets.kuberay_stop` by the pod's preStop hook. A launcher ends with 75, and so is started again.
"""

from __future__ import annotations

from pathlib import Path

import psutil


def main() -> None:
    """Tell all launchers in this container, and return when they have ended."""
    found = [process for process in psutil.process_iter(["cmdline"]) if _launches(process.info["cmdline"] or [])]
    for process in found:
        try:
            process.terminate()
        except psutil.NoSuchProcess:  # it has just ended
            pass
    psutil.wait_procs(found)


def _launches(command: list[str]) -> bool:
    """`python -m cluster.cli train ...`, or `shardyard train ...` by the script's path."""
    is_ours = command[1:3] == ["-m", "cluster.cli"] or Path("".join(command[1:2])).name == "shardyard"
    return is_ours and "train" in command[2:4]


if __name__ == "__main__":
    main()
