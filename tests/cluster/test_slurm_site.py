"""What tests of launching under Slurm rely on: two real nodes, signals, preemption, requeueing, and no trace after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import links_of
from tests.cluster.slurm_site import GRACE_S, NODES, ROOT, SlurmSite, missing
from tests.cluster.waiting import alive, commands, mentioning, wait_for

pytestmark = [pytest.mark.daemon, pytest.mark.skipif(bool(missing()), reason=f"no Slurm here: {missing()}")]

# Whole nodes, as training takes them; else two jobs of one CPU each would run beside each other.
WHOLE = ("--nodes=2", "--ntasks-per-node=1", "--exclusive", "--open-mode=append")
SERVE = (
    "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); s.accept()[0].send(b'k')"
)
KNOCK = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 10).recv(1).decode())"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmSite]:
    with SlurmSite(tmp_path_factory.mktemp("site")) as made:
        yield made


def submit(site: SlurmSite, folder: Path, script: str, *options: str) -> str:
    """Id of a job; what it says is in folder/log."""
    path = folder / "job.sh"
    path.write_text("#!/bin/bash\n" + textwrap.dedent(script))
    answer = site.run("sbatch", "--parsable", f"--output={folder}/log", *options, str(path))
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def wait_for_state(site: SlurmSite, job_id: str, *states: str, timeout_s: float = 60.0) -> dict[str, str]:
    wait_for(lambda: site.job(job_id)["JobState"] in states, f"{states} of job {job_id}", timeout_s)
    return site.job(job_id)


def wait_for_line(folder: Path, line: str, timeout_s: float = 60.0) -> None:
    wait_for(lambda: line in lines(folder), f"{line!r} in {folder}/log", timeout_s)


def lines(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_two_hosts_see_one_folder(site: SlurmSite, tmp_path: Path) -> None:
    said = site.run("srun", *WHOLE[:3], "sh", "-c", f"hostname; hostname > {tmp_path}/$SLURM_PROCID; ps -e -o args")
    assert said.returncode == 0, said.stderr
    assert {line for line in said.stdout.splitlines() if line in NODES} == set(NODES)
    assert said.stdout.count("slurmd -D") == 2, "each node sees its own processes alone"
    assert {(tmp_path / rank).read_text().strip() for rank in ("0", "1")} == set(NODES)
    answer = site.run("srun", "--overlap", "--nodes=1", "-w", "node2", "cat", str(tmp_path / "0"))
    assert answer.stdout.strip() in NODES


def test_nodes_reach_each_other_by_name_and_address(site: SlurmSite) -> None:
    assert len(set(site.nodes.values())) == 2
    for client in (["srun", "-w", "node2"], []):  # another node, and this machine
        command = ["srun", "-w", "node1", sys.executable, "-c", SERVE]
        with subprocess.Popen(command, env=site.environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            host = "node1" if client else site.nodes["node1"]
            answer = site.run(*client, sys.executable, "-c", KNOCK, host, port)
            assert answer.stdout.strip() == "k", answer.stderr


def test_exit_codes_stay_visible(site: SlurmSite, tmp_path: Path) -> None:
    job = wait_for_state(site, submit(site, tmp_path, "exit 7"), "FAILED")
    assert (job["ExitCode"], job["Reason"]) == ("7:0", "NonZeroExitCode")


def test_a_job_is_cancelled_with_its_processes(site: SlurmSite, tmp_path: Path) -> None:
    job_id = submit(site, tmp_path, "srun sh -c 'echo up; exec sleep 8761' &\nwait", *WHOLE)
    wait_for(lambda: lines(tmp_path).count("up") == 2, "both tasks")
    assert site.run("scancel", job_id).returncode == 0
    wait_for_state(site, job_id, "CANCELLED")
    wait_for(lambda: not asleep("8761"), "the end of its processes")


def test_a_signal_before_the_time_limit_reaches_the_batch_script(site: SlurmSite, tmp_path: Path) -> None:
    script = """
        trap 'echo warned; exit 3' USR1
        while :; do sleep 0.1; done
    """
    job_id = submit(site, tmp_path, script, "--time=1", "--signal=B:USR1@58")
    wait_for_line(tmp_path, "warned", 90.0)
    assert wait_for_state(site, job_id, "FAILED")["ExitCode"] == "3:0"


PREEMPTED = """
    echo start ${SLURM_RESTART_COUNT:-0}
    [ -n "$SLURM_RESTART_COUNT" ] && exit 0
    trap 'echo batch USR1' USR1
    srun --overlap bash -c 'trap "echo step TERM" TERM; echo step; while :; do sleep 0.1; done' &
    while :; do sleep 0.1; done
"""


def test_a_preempted_job_is_warned_requeued_and_started_again(site: SlurmSite, tmp_path: Path) -> None:
    low = submit(site, tmp_path, PREEMPTED, "--partition=low", *WHOLE)
    wait_for(lambda: lines(tmp_path).count("step") == 2, "both tasks")
    (tmp_path / "high").mkdir()
    high = submit(site, tmp_path / "high", "sleep 1", "--partition=high", *WHOLE)
    wait_for(lambda: lines(tmp_path).count("step TERM") == 2, "the warning", GRACE_S / 2)
    assert site.job(low)["JobState"] == "RUNNING"
    wait_for_state(site, high, "COMPLETED", timeout_s=2.0 * GRACE_S)
    assert wait_for_state(site, low, "COMPLETED")["Restarts"] == "1"
    assert [line for line in lines(tmp_path) if line.startswith("start")] == ["start 0", "start 1"]
    assert "batch USR1" not in lines(tmp_path)


def test_where_the_site_says_so_preemption_warns_the_batch_script_instead(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    with SlurmSite(tmp_path / "site", "SlurmctldParameters=preempt_send_user_signal\n") as site:
        low = submit(site, tmp_path, PREEMPTED, "--partition=low", "--signal=B:USR1@30", *WHOLE)
        wait_for(lambda: lines(tmp_path).count("step") == 2, "both tasks")
        (tmp_path / "high").mkdir()
        submit(site, tmp_path / "high", "sleep 1", "--partition=high", *WHOLE)
        wait_for_line(tmp_path, "batch USR1", GRACE_S / 2)
        assert site.job(low)["JobState"] == "RUNNING"
        assert "step TERM" not in lines(tmp_path)


def test_a_job_requeues_itself(site: SlurmSite, tmp_path: Path) -> None:
    script = """
        echo start ${SLURM_RESTART_COUNT:-0}
        [ -n "$SLURM_RESTART_COUNT" ] && exit 5
        scontrol requeue $SLURM_JOB_ID
        sleep 60
    """
    job_id = submit(site, tmp_path, script, *WHOLE)
    job = wait_for_state(site, job_id, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("5:0", "1")
    assert [line for line in lines(tmp_path) if line.startswith("start")] == ["start 0", "start 1"]


def test_steps_of_a_job_run_beside_each_other(site: SlurmSite, tmp_path: Path) -> None:
    script = f"""
        step() {{ srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=2 -w $1 sh -c "$2" & }}
        step node1 'touch {tmp_path}/a; until [ -e {tmp_path}/b ]; do sleep 0.1; done; echo first'
        step node1 'touch {tmp_path}/b; until [ -e {tmp_path}/a ]; do sleep 0.1; done; echo second'
        step node2 'until [ -e {tmp_path}/b ]; do sleep 0.1; done; echo third'
        wait
    """
    wait_for_state(site, submit(site, tmp_path, script, *WHOLE), "COMPLETED")
    assert sorted(lines(tmp_path)) == ["first", "second", "third"]


def test_a_node_that_goes_away_ends_the_step_and_comes_back(site: SlurmSite, tmp_path: Path) -> None:
    script = "echo up\nsrun --overlap -w node2 --nodes=1 --ntasks=1 sleep 8764\necho step $?\nexit 4"
    job_id = submit(site, tmp_path, script, "--no-kill", *WHOLE)
    wait_for_line(tmp_path, "up")
    wait_for(lambda: asleep("8764"), "the step")
    site.stop_node("node2")
    assert not asleep("8764")
    job = wait_for_state(site, job_id, "FAILED")
    assert job["ExitCode"] == "4:0", "with --no-kill the job goes on without the node"
    assert "srun: error: Node failure on node2" in lines(tmp_path)
    assert any(line.startswith("step ") for line in lines(tmp_path)), "srun's exit code may be 0 then (Slurm 22.05)"
    site.start_node("node2")
    assert site.run("srun", "-w", "node2", "hostname").stdout == "node2\n"


def test_a_cut_node_is_missed_and_used_again_when_mended(site: SlurmSite, tmp_path: Path) -> None:
    job_id = submit(site, tmp_path, "sleep 600", "--no-requeue", *WHOLE)
    wait_for_state(site, job_id, "RUNNING")
    site.cut("node2")
    wait_for_state(site, job_id, "NODE_FAIL")
    site.mend("node2")
    wait_for(lambda: site.usable("node2"), "node2", 120.0)
    assert site.run("srun", "-w", "node2", "hostname").stdout == "node2\n"


def test_nothing_is_left(tmp_path: Path) -> None:
    before = links_of(os.getpid())  # of the other tests' site
    with SlurmSite(tmp_path) as site:
        submit(site, tmp_path, "srun sleep 8762", *WHOLE)
        wait_for(lambda: len(asleep("8762")) == 2, "both tasks")
        daemons = mentioning(str(tmp_path))
        assert len(daemons) >= 4 and links_of(os.getpid()) != before
        pids = asleep("8762") + daemons
    assert not [pid for pid in pids if alive(pid)]
    assert not mentioning(str(tmp_path)) and not mentioning("8762")
    assert links_of(os.getpid()) == before and str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_nothing_is_left_when_the_test_itself_is_killed(tmp_path: Path) -> None:
    code = f"""
        import pathlib
        from tests.cluster.slurm_site import SlurmSite
        with SlurmSite(pathlib.Path({str(tmp_path)!r})) as site:
            site.run("srun", "--nodes=2", "sleep", "8763")
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    try:
        wait_for(lambda: len(asleep("8763")) == 2, "both tasks")
        assert links_of(owner.pid)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    left = str(tmp_path), "8763"  # srun and the tasks have the number
    wait_for(lambda: not any(mentioning(word) for word in left), "the end of its processes")
    wait_for(lambda: not links_of(owner.pid), "the end of its link")
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def asleep(seconds: str) -> list[int]:
    """Pids of the processes `sleep seconds`; each test has a number of its own."""
    return [
        pid
        for pid, command in commands()
        if len(command) == 2 and command[0].endswith("sleep") and command[1] == seconds
    ]
