"""deploy/slurm/train.sbatch with a Slurm, a Ray and a run that are small scripts: what it starts, tells and leaves."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.tools import DEPLOY

SCRIPT = DEPLOY / "slurm" / "train.sbatch"
STUBS = {
    # Runs what comes after its own options, as Slurm would on the node.
    "srun": """#!/bin/bash
echo "srun $*" >>"$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
    "scontrol": """#!/bin/bash
echo "scontrol $*" >>"$LOG"
""",
    "ray": """#!/bin/bash
echo "ray $* token:$(stat -c %a "$RAY_AUTH_TOKEN_PATH"):$(wc -c <"$RAY_AUTH_TOKEN_PATH"):$RAY_AUTH_MODE" >>"$LOG"
trap 'echo "ray ended" >>"$LOG"; exit 0' TERM
[ "$HEAD_FAILS" = yes ] && exit 1
for option in "$@"; do
    case $option in --temp-dir=*) folder=${option#*=} ;; esac
done
mkdir -p "$folder"
while [ "$HEAD_TAKES" = long ]; do sleep 0.05; done
echo 10.0.0.1:4321 >"$folder/ray_current_cluster"
while :; do sleep 0.05; done
""",
    "python": f"""#!/bin/bash
if [ "$1" != - ]; then exec {sys.executable} "$@"; fi
echo "python $*" >>"$LOG"
until [ "$(grep -c '^ray start' "$LOG")" = 2 ]; do sleep 0.02; done
""",
    "shardyard": """#!/bin/bash
trap 'echo "run told USR1" >>"$LOG"; sleep 0.2; exit 75' USR1
trap 'echo "run told TERM" >>"$LOG"; sleep 0.2; exit 75' TERM
echo "shardyard $*" >>"$LOG"
if [ "$ENDS_WITH" != never ]; then exit "$ENDS_WITH"; fi
while :; do sleep 0.05; done
""",
}


class Job:
    """A job of `nodes` nodes, all of them here."""

    def __init__(self, folder: Path, nodes: int = 2, **environment: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in STUBS.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.log_file = folder / "log"
        self.log_file.touch()
        self.id = f"test-{os.getpid()}-{folder.name}"
        self.local = Path(f"/tmp/shardyard-{self.id}")
        given = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "LOG": str(self.log_file),
            "SLURM_JOB_ID": self.id,
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURMD_NODENAME": "n1",
            "SLURM_CPUS_PER_TASK": "3",
            "ENDS_WITH": "0",
            "HEAD_FAILS": "no",
            "HEAD_TAKES": "a moment",
        }
        arguments = ["bash", str(SCRIPT), "recipe.yaml", "name=a b"]
        self.process = subprocess.Popen(
            arguments, env=given | environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def end(self) -> int:
        """Its exit code; it must have ended all and left nothing."""
        _, error = self.process.communicate(timeout=30)
        assert not self.local.exists(), error
        assert not list(self.folder.glob(".shardyard-*"))
        starts = [line for line in self.log.splitlines() if line.startswith("ray start")]
        assert self.log.count("ray ended") == (0 if "did not start" in error else len(starts))
        return self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts a job; what a failing one would leave is removed."""
    jobs: list[Job] = []

    def started(**options: Any) -> Job:
        jobs.append(Job(tmp_path, **options))
        return jobs[-1]

    yield started
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        shutil.rmtree(job.local, ignore_errors=True)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_the_jobs_exit_code_is_the_runs(start: Callable[..., Job], code: int) -> None:
    job = start(ENDS_WITH=str(code))
    assert job.end() == code
    assert "shardyard train recipe.yaml name=a b --address 10.0.0.1:4321" in job.log
    assert "scontrol" not in job.log


def test_ray_is_started_on_every_node_with_a_token_and_no_fixed_port(start: Callable[..., Job]) -> None:
    job = start(nodes=4)
    assert job.end() == 0
    head, *others = [line for line in job.log.splitlines() if line.startswith("ray start")]
    (worker,) = others
    for line in (head, worker):
        assert "token:600:64:token" in line
        assert "--block" in line and "--num-cpus=3" in line and "--num-gpus=0" in line
        assert "--min-worker-port=0 --max-worker-port=0" in line
    assert "--head" in head and "--port=0" in head and "--include-dashboard=false" in head
    assert "--address=10.0.0.1:4321" in worker
    steps = [line for line in job.log.splitlines() if line.startswith("srun")]
    assert "--overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=n1" in steps[0]
    assert "--overlap --nodes=3 --ntasks=3 --ntasks-per-node=1 --exclude=n1" in steps[1]
    assert job.log.index("python - 10.0.0.1:4321 4") < job.log.index("shardyard train")


def test_one_node_has_no_workers_step(start: Callable[..., Job]) -> None:
    job = start(nodes=1)
    assert job.end() == 0
    assert job.log.count("ray start --block") == 2  # srun's line and ray's own


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_makes_room_is_queued_again(start: Callable[..., Job], number: signal.Signals) -> None:
    job = start(ENDS_WITH="never")
    job.wait_for(lambda: "shardyard train" in job.log)
    job.process.send_signal(number)
    assert job.end() == 75
    assert f"run told {number.name.removeprefix('SIG')}" in job.log
    assert job.log.count(f"scontrol requeue {job.id}") == 1
    assert job.log.index("ray ended") < job.log.index("scontrol")


def test_told_twice_it_ends_as_once(start: Callable[..., Job]) -> None:
    job = start(ENDS_WITH="never")
    job.wait_for(lambda: "shardyard train" in job.log)
    for _ in range(2):
        job.process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    assert job.end() == 75
    assert job.log.count("scontrol requeue") == 1


def test_told_before_the_run_began(start: Callable[..., Job]) -> None:
    job = start(HEAD_TAKES="long")
    job.wait_for(lambda: "ray start" in job.log and job.local.exists())
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 75
    assert "shardyard train" not in job.log and "scontrol requeue" in job.log


def test_a_head_that_does_not_start_is_said(start: Callable[..., Job]) -> None:
    job = start(HEAD_FAILS="yes")
    assert job.end() == 3
    assert "shardyard train" not in job.log and "scontrol" not in job.log


def test_the_tokens_folder_is_the_owners_alone(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start(ENDS_WITH="never")
    job.wait_for(lambda: "shardyard train" in job.log)
    (folder,) = tmp_path.glob(".shardyard-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    job.process.send_signal(signal.SIGTERM)
    job.end()
