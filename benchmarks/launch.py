"""Seconds from the command to the end of the first optimizer step: Shardyard beside bare torchrun and Ray Train.

    python benchmarks/launch.py [--repeats 5] [--out benchmarks/results]

All train the same GPT with DeepSpeed at ZeRO stage 1 on two workers of one thread, from data that is built already.
They run in turns, each as a process of its own: on a machine on which nothing else runs, and then on a Ray cluster that
is there already, joined (--address) or sent a job (--on). Torchrun's and Ray Train's script keep no record.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.overhead import WORKERS, recipe  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402

STEPS = 5
START_S = 120.0
COLD = ("torchrun", "Ray Train", "shardyard train")
RUNNING = ("Ray Train, running", "shardyard train --address", "shardyard train --on")


class Bench:
    """Launches one system at a time in a folder, and reads when its first step ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0
        self.head: tuple[str, str] = ("", "")  # address, dashboard

    def seconds(self, system: str) -> float:
        """From the command to the first step's end."""
        self._runs += 1
        name = f"run-{self._runs}"
        shape = recipe(20, name, self._folder / "runs") | {"steps": STEPS}
        path, out = self._folder / f"{name}.json", self._folder / f"{name}.out"
        path.write_text(json.dumps(shape | {"checkpoint": {"every": STEPS}, "tracking": {"mlflow": None}}))
        product = [sys.executable, "-m", "cluster.cli", "train", str(path), "--json"]
        peer = [sys.executable, str(ROOT / "benchmarks/launch_ray_train.py"), str(path), str(out), str(self._folder)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
        command = {
            "torchrun": [*torchrun, str(ROOT / "benchmarks/bare_deepspeed.py"), str(path), str(out)],
            "Ray Train": peer,
            "shardyard train": product,
            "Ray Train, running": [*peer, self.head[0]],
            "shardyard train --address": [*product, "--address", self.head[0]],
            "shardyard train --on": [*product, "--on", "lab"],
        }[system]
        began = time.time()
        self._call(command)
        return (json.loads(out.read_text())[0] if out.exists() else self._first_step(name)) - began

    @contextlib.contextmanager
    def running_cluster(self) -> Iterator[None]:
        """A head of two CPUs and a bit, with its dashboard, that asks for a token."""
        ports = [_free_port() for _ in range(3)]
        token = self._folder / "token"
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ["RAY_raylet_start_wait_time_s"] = f"{START_S:.0f}"  # noqa: SIM112 - Ray's own spelling
        with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as scratch:
            own = f"--node-ip-address=127.0.0.1 --port={ports[0]} --dashboard-port={ports[1]} --temp-dir={scratch}"
            free = f"--ray-client-server-port={ports[2]} --min-worker-port=0 --max-worker-port=0"
            command = f"start --head --block --num-cpus={WORKERS + 1} --dashboard-agent-listen-port=0 {own} {free}"
            own_bin = Path(sys.executable).parent
            environment = {**os.environ, "PATH": f"{own_bin}:{os.environ['PATH']}"}  # a job's `python`
            with open(self._folder / "head.log", "w") as log:
                head = subprocess.Popen(
                    [str(own_bin / "ray"), *command.split()], stdout=log, stderr=log, env=environment
                )
            try:
                self.head = (f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}")
                (self._folder / "targets.yaml").write_text(f"lab: {{type: ray, address: '{self.head[1]}'}}\n")
                _wait_for(self.head[1], token.read_text())
                yield
            finally:
                family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(family, timeout=10)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_raylet_start_wait_time_s"):
            del os.environ[name]

    def _call(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ended = subprocess.run(command, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=300)
        if ended.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")

    def _first_step(self, name: str) -> float:
        rows = [
            json.loads(line)
            for segment in (self._folder / "runs" / name / "metrics").iterdir()
            for line in segment.read_text().splitlines()
        ]
        return min(row["time"] for row in rows if "loss" in row["values"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_for(dashboard: str, token: str) -> None:
    """Until the head takes jobs."""
    request = urllib.request.Request(f"{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
            time.sleep(5)  # the agent that starts jobs comes last
            return
        time.sleep(0.5)
    sys.exit("The head did not start.")


def page(found: dict[str, list[float]]) -> str:
    """benchmarks/results/launch.md."""
    bare = statistics.median(found["torchrun"])
    return "\n".join(
        [
            "# From the command to the end of the first optimizer step",
            "",
            f"`{' '.join(['python benchmarks/launch.py', *sys.argv[1:]])}`, {provenance()},",
            f"{WORKERS} workers of 1 thread, ZeRO-1, fp32; medians of interleaved runs.",
            "",
            "| | median, s | least to most, s | more than torchrun, s |",
            "|---|---|---|---|",
            *(
                f"| {system} | {statistics.median(each):.1f} | {min(each):.1f} to {max(each):.1f} | "
                f"{statistics.median(each) - bare:+.1f} |"
                for system, each in found.items()
            ),
            "",
        ]
    )


def main() -> None:
    """Measure in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {system: [] for system in (*COLD, *RUNNING)}
    with tempfile.TemporaryDirectory(prefix="launch-") as scratch:
        bench = Bench(Path(scratch))
        bench.seconds("shardyard train")  # builds the data
        for number in range(arguments.repeats):
            for system in COLD:
                found[system].append(bench.seconds(system))
                print(f"{number + 1}/{arguments.repeats} {system}: {found[system][-1]:.1f} s", flush=True)
        with bench.running_cluster():
            for number in range(arguments.repeats):
                for system in RUNNING:
                    found[system].append(bench.seconds(system))
                    print(f"{number + 1}/{arguments.repeats} {system}: {found[system][-1]:.1f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "launch.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "launch.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
