from __future__ import annotations

import ipaddress
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import embedded_ray, ray_group, ray_placement
from cluster.controller import Controller, Outcome
from cluster.embedded_ray import EmbeddedRay
from cluster.policies import WorkerStatus
from cluster.ray_cluster import join
from cluster.ray_group import RayWorkerGroup, import_paths
from cluster.ray_member import Member
from configs.errors import RunFailed, Unreachable
from configs.schema import RecoveryConfig, ResourcesConfig
from tests.cluster.fakes import FakeRecord
from tests.cluster.waiting import alive, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.daemon]

ROOT = Path(__file__).resolve().parents[2]
RUN = "demo"
NEVER_S = 600.0


@pytest.fixture(scope="module")
def ray_here() -> Iterator[EmbeddedRay]:
    """One Ray for all tests of this file; groups use the one that is connected."""
    embedded = EmbeddedRay(4, False, import_paths())
    yield embedded
    embedded.stop()


def make_group(store: Path, body: str, imports: str = "psutil", **resources: Any) -> RayWorkerGroup:
    (store / RUN).mkdir(exist_ok=True)
    config = ResourcesConfig(**{"workers": 2, **resources})
    return RayWorkerGroup(config, str(store), RUN, body=f"tests.cluster.bodies:{body}", imports=[imports])


class Launched:
    """A group with its controller in a thread, as a launcher has them."""

    def __init__(
        self, store: Path, body: str, resources: dict[str, Any] | None = None, imports: str = "psutil", **recovery: Any
    ) -> None:
        self.store = store
        self.group = make_group(store, body, imports, **(resources or {}))
        self.record = FakeRecord()
        settings = RecoveryConfig(**{"silence_s": NEVER_S, "collective_timeout_s": NEVER_S, **recovery})
        self.controller = Controller(self.group, self.record, settings)
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.group.open()
            self.controller.prepare()
            self.outcome = self.controller.run()
        except BaseException as error:
            self.error = error
            self.controller.fail(error)
        finally:
            self.group.close()

    def worker(self, rank: int) -> WorkerStatus | None:
        workers = self.controller.workers
        return workers[rank] if len(workers) > rank else None

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            seen = self.worker(1)
            return not self.thread.is_alive() or (seen is not None and seen.step >= step)

        wait_for(there, f"step {step}")

    def training(self, attempt: int, workers: int) -> bool:
        """Whether all workers of an attempt have begun to train."""
        written = [self.store / RUN / f"facts-{attempt}-{rank}" for rank in range(workers)]
        return all(path.exists() and path.read_text() for path in written)

    def pids(self, attempt: int = 1) -> list[int]:
        return [int(facts(self.store, attempt, rank)[3]) for rank in range(2)]

    def join(self, timeout_s: float = 60.0) -> None:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.record.rows if row["kind"] == kind]


def facts(store: Path, attempt: int, rank: int) -> list[str]:
    return (store / RUN / f"facts-{attempt}-{rank}").read_text().split()


def test_workers_finish_with_ranks_threads_and_logs(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    group = make_group(tmp_path, "steps", threads=2)
    group.open()
    try:
        placed = group.prepare(1)
        assert len({where["pid"] for where in placed["workers"]}) == 2
        group.start(lambda: False)
        statuses = wait_for(
            lambda: (found := group.poll(0.1)) and all(status.state == "finished" for status in found) and found,
            "the end",
        )
        assert [(status.rank, status.step, status.steps) for status in statuses] == [(0, 20, 20), (1, 20, 20)]
        for rank in range(2):
            assert facts(tmp_path, 1, rank)[:3] == [str(rank), "2", str(rank)]
            assert facts(tmp_path, 1, rank)[4:] == ["2", "tcp", str(os.nice(0))]
            assert f"worker {rank} of attempt 1" in Path(statuses[rank].log).read_text()
    finally:
        group.close()
    assert sorted(path.name for path in (tmp_path / RUN / "attempts/0001").iterdir()) == [
        "rank-00000.log",
        "rank-00001.log",
    ]
    for where in placed["workers"]:
        assert not alive(where["pid"])


def test_an_answer_from_before_the_end_does_not_undo_it() -> None:
    member = Member(None, 0, state="running")
    member.hear({"step": 8})
    assert member.status(0).step == 8
    member.end({"outcome": "finished", "step": 20})
    member.hear({"step": 9})
    assert (member.status(0).state, member.status(0).step) == ("finished", 20)


def test_a_killed_worker_is_noticed_at_once_and_the_run_goes_on(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    run = Launched(tmp_path, "endless_first_attempt")
    run.wait_for_step(5)
    killed_at = time.monotonic()
    os.kill(run.pids()[1], signal.SIGKILL)
    wait_for(lambda: run.events("failed"), "the failure's discovery")
    noticed_s = time.monotonic() - killed_at
    run.join()
    assert run.outcome == Outcome("finished", 20, 1)
    failed = run.events("failed")[0]
    assert (failed["cause"], failed["rank"], failed["phase"]) == ("died", 1, "forward")
    assert failed["step"] >= 5
    assert "killed by SIGKILL (signal 9)" in failed["error"]
    first, second = (placed["workers"] for placed in run.events("placed"))
    assert first == second  # the same actors, with their imports done
    assert not any(alive(pid) for pid in run.pids(1))
    assert not any(alive(pid) for pid in run.pids(2))
    print(f"noticed and killed the rest after {noticed_s:.2f} s")
    assert noticed_s < NEVER_S / 10  # by its death, not by its silence


def test_an_actor_that_dies_is_replaced_and_its_training_ends_with_it(
    ray_here: EmbeddedRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_group, "PROBE_TIMEOUT_S", 0.0)  # the node is too busy to answer at once
    run = Launched(tmp_path, "endless_first_attempt")
    run.wait_for_step(5)
    os.kill(run.events("placed")[0]["workers"][0]["pid"], signal.SIGKILL)
    run.join()
    assert run.outcome == Outcome("finished", 20, 1)
    first, second = (placed["workers"] for placed in run.events("placed"))
    kept = {where["pid"] for where in first} & {where["pid"] for where in second}
    assert kept == {first[1]["pid"]}
    failed = run.events("failed")[0]
    assert (failed["cause"], failed["rank"]) == ("died", 0)
    assert not any(alive(pid) for pid in run.pids(1) + run.pids(2))


def test_a_stopped_worker_is_named_and_killed(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    run = Launched(tmp_path, "endless_first_attempt", silence_s=3.0)
    run.wait_for_step(5)
    os.kill(run.pids()[1], signal.SIGSTOP)
    run.join()
    assert run.outcome == Outcome("finished", 20, 1)
    failed = run.events("failed")[0]
    assert (failed["cause"], failed["rank"]) == ("silent", 1)
    assert failed["detected_s"] > 2.5
    assert "steps" in failed["stack"]
    assert "steps" in (tmp_path / RUN / "attempts/0001/rank-00001.stack").read_text()
    assert not any(alive(pid) for pid in run.pids(1))


def test_a_node_that_answers_nothing_is_named_by_our_own_pings(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    run = Launched(tmp_path, "endless_first_attempt", silence_s=5.0)
    run.wait_for_step(5)
    actor = run.events("placed")[0]["workers"][1]["pid"]
    os.kill(actor, signal.SIGSTOP)  # as if cut off: Ray would take a minute to tell
    run.join()
    assert run.outcome == Outcome("finished", 20, 1)
    failed = run.events("failed")[0]
    assert (failed["cause"], failed["rank"]) == ("silent", 1)
    assert "its node has not answered for" in failed["summary"]
    assert failed["detected_s"] < 5.0
    assert not any(alive(pid) for pid in [actor, *run.pids(1)])


def test_a_stuck_loader_is_named_though_all_ranks_hang(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    run = Launched(tmp_path, "stuck_in_data", imports="trainer.distributed", silence_s=2.0)
    run.join()
    assert run.outcome == Outcome("finished", 20, 1)
    failed = run.events("failed")[0]
    assert (failed["cause"], failed["rank"], failed["phase"]) == ("silent", 1, "data")
    assert "read_forever (" in failed["summary"]
    assert "read_forever" in failed["stack"].splitlines()[0]
    assert failed["detected_s"] < 10
    for rank, function in enumerate(["all_sum", "read_forever"]):
        assert function in (tmp_path / RUN / f"attempts/0001/rank-{rank:05d}.stack").read_text()


@pytest.mark.parametrize(("body", "error"), [("raising", "ValueError: a bad example"), ("exiting", "SystemExit: 3")])
def test_an_error_is_named_with_its_log(ray_here: EmbeddedRay, tmp_path: Path, body: str, error: str) -> None:
    run = Launched(tmp_path, body, max_restarts=0)
    run.join()
    assert isinstance(run.error, RunFailed)
    failed = run.events("failed")[0]
    assert (failed["cause"], failed["rank"], failed["error"]) == ("raised", 1, error)
    assert error.partition(":")[0] in Path(failed["log"]).read_text()
    assert failed["log"] in str(run.error)
    assert not any(alive(pid) for pid in run.pids())


def test_a_stop_reaches_the_workers(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    run = Launched(tmp_path, "endless")
    run.wait_for_step(5)
    run.controller.request_stop("asked")
    run.join()
    assert run.outcome is not None
    assert run.outcome.outcome == "stopped"
    assert run.outcome.step >= 5


def test_an_abort_does_not_wait_for_deaf_workers(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    run = Launched(tmp_path, "deaf")
    run.wait_for_step(5)
    run.controller.request_stop("asked")
    run.controller.abort()
    run.join()
    assert not any(alive(pid) for pid in run.pids())


def test_a_module_that_is_missing_is_named(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    (tmp_path / RUN).mkdir()
    group = RayWorkerGroup(ResourcesConfig(), str(tmp_path), RUN, imports=["no_such_module"])
    group.open()
    try:
        group.prepare(1)
        group.start(lambda: False)
        (status,) = group.poll(0)
        assert status.state == "raised"
        assert status.user_error
        assert "No module named 'no_such_module'" in str(status.error)
    finally:
        group.close()


def test_more_than_the_cluster_has(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    group = make_group(tmp_path, "steps", workers=33, threads=3)
    group.open()
    with pytest.raises(Unreachable) as caught:
        group.prepare(1)
    group.close()
    assert "needs 99 CPUs (resources.workers=33, each with 3 CPUs)" in str(caught.value)
    assert "it has 4 CPUs" in str(caught.value)


def test_places_that_others_hold(ray_here: EmbeddedRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_placement, "PLACE_TIMEOUT_S", 1.0)
    holder = ray_placement.Placement(ResourcesConfig(workers=3))
    holder.reserve()
    waiting = ray_placement.Placement(ResourcesConfig(workers=2))
    try:
        with pytest.raises(Unreachable, match=r"needs 2 CPUs .* did not come free .* 4 CPUs, of which 1 free"):
            waiting.reserve()
        holder.release()
        monkeypatch.setattr(ray_placement, "PLACE_TIMEOUT_S", 60.0)
        waiting.reserve()
    finally:
        holder.release()
        waiting.release()


def test_a_launcher_that_is_terminated_has_time_to_save(ray_here: EmbeddedRay) -> None:
    with pytest.raises(SystemExit):  # Ray's handler in Python, which it sets in the main thread only: a run has another
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # ended by the handler
    alarm = signal.setitimer(signal.ITIMER_REAL, 0)
    assert alarm == (0.0, 0.0), "Ray's own handler aborts the process 3 s later"


def test_ray_listens_on_loopback_alone(ray_here: EmbeddedRay) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert all(is_loopback(address) for address in listening), listening


def test_who_has_not_the_token_is_refused(ray_here: EmbeddedRay, tmp_path: Path) -> None:
    import ray

    own = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert own.parent == ray_here.folder and stat.S_IMODE(own.stat().st_mode) == 0o600
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)  # Ray reads a token from there too
    address = ray.get_runtime_context().gcs_address
    code = f"from ray._raylet import GcsClient; print(GcsClient(address={address!r}).get_all_node_info())"
    for change, welcome in (
        ({}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(own)}, True),
    ):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment | change, capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0) == welcome, done.stderr
        assert welcome or "RAY_AUTH_TOKEN" in done.stderr, done.stderr
        assert own.read_text() not in done.stdout + done.stderr


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


DRIVER = """
    import sys
    from cluster.ray_group import RayWorkerGroup
    from configs.schema import ResourcesConfig
    store, address = sys.argv[1], sys.argv[2] or None
    body = "tests.cluster.bodies:endless"
    group = RayWorkerGroup(ResourcesConfig(workers=2), store, "demo", address=address, body=body, imports=[])
    group.open()
    group.prepare(1)
    group.start(lambda: False)
    while True:
        group.poll(0.1)
"""


@pytest.mark.parametrize("joined", [False, True], ids=["own Ray", "joined cluster"])
def test_no_worker_outlives_a_killed_driver(ray_here: EmbeddedRay, tmp_path: Path, joined: bool) -> None:
    import ray

    (tmp_path / RUN).mkdir()
    address = ray.get_runtime_context().gcs_address if joined else ""
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path), address]
    driver = subprocess.Popen(command, cwd=ROOT)
    try:
        written = [tmp_path / RUN / f"facts-1-{rank}" for rank in range(2)]
        wait_for(lambda: all(path.exists() and path.read_text() for path in written), "training")
        workers = [int(facts(tmp_path, 1, rank)[3]) for rank in range(2)]
        below = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
        if not joined:
            os.kill(workers[1], signal.SIGSTOP)  # not even one that cannot notice
    finally:
        driver.kill()
        driver.wait()
    # Ray's agents would stay for a minute.
    wait_for(lambda: not any(map(alive, [*workers, *below])), "the end of all its processes", 30.0)
    wait_for(
        lambda: not list(Path(tempfile.gettempdir()).glob(f"shardyard-ray-{driver.pid}-*")), "the end of its folder"
    )


def test_what_a_killed_driver_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_ray.tempfile, "gettempdir", lambda: str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"shardyard-ray-{dead.pid}-abc"
    mine = tmp_path / f"shardyard-ray-{os.getpid()}-abc"
    for folder in (left, mine):
        (folder / "session").mkdir(parents=True)
    embedded_ray._remove_leftovers()
    assert not left.exists()
    assert mine.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:10001"])
def test_a_cluster_that_is_not_there(address: str) -> None:
    with pytest.raises(Unreachable) as caught:
        join(address)
    assert address in str(caught.value)
