"""MLflow's real server on loopback, which can be killed or stopped and comes back; and an outage in a run's course."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import psutil

from cluster.mlflow_copy import MlflowCopy, sync
from tests.chaos.harm import MLFLOW, Harm
from tests.cluster.test_mlflow_copy import end_with_children, free_port
from tests.cluster.waiting import wait_for
from trainer.record import RunRecord

START_S = 120.0
REQUEST_TIMEOUT_S = 2


class MlflowServer:
    """A server with a database in `folder`; `end()` ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", f"{self._folder}/artifacts"]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)
        wait_for(lambda: self.answers() or process.poll() is not None, "MLflow's start", START_S)
        assert process.poll() is None, (self._folder / "server.log").read_text()
        return process

    def answers(self) -> bool:
        """Whether it does, within REQUEST_TIMEOUT_S."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=REQUEST_TIMEOUT_S):
            return True
        return False

    def pids(self) -> list[int]:
        """Its processes."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [self._process.pid, *(child.pid for child in children)]

    def wait_for_death(self) -> None:
        """After a SIGKILL, which takes a while on a machine that is at work."""
        self._process.wait(START_S)
        wait_for(lambda: not self.answers(), "the end of MLflow's last process", START_S)

    def bring_back(self) -> None:
        """Undo a SIGSTOP or a SIGKILL, if there was one."""
        if self._process.poll() is None:
            for pid in self.pids():
                os.kill(pid, signal.SIGCONT)
            wait_for(self.answers, "MLflow's answer", START_S)
        else:
            self._process = self._start()

    def end(self) -> None:
        """Kill it."""
        end_with_children(self._process)


class Outage:
    """The outage of one schedule, followed from the side of the launcher: a stopped server comes back after the run, a
    killed one as soon as the copy has missed it.
    """

    def __init__(self, server: MlflowServer, store: Path, harm: Harm) -> None:
        server.bring_back()  # from a schedule that failed in its outage
        (store / MLFLOW).write_text(json.dumps(server.pids()))
        self._server = server
        self._landed = store / f"landed-{harm.kind}.json"
        self._stays = harm.kind == "stop_mlflow"
        self._copies: list[MlflowCopy] = []
        self._missed = False
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def copy(self, record: RunRecord) -> MlflowCopy:
        """To be called in place of MlflowCopy: it looks more often, and is looked at."""
        self._copies.append(MlflowCopy(record, poll_every_s=0.5))
        return self._copies[-1]

    def _follow(self) -> None:
        wait_for(lambda: self._landed.exists() and self._copies[-1].last_error, "a copy that misses MLflow", 120.0)
        self._missed = True
        if not self._stays:
            self._server.wait_for_death()
            self._server.bring_back()

    def prove(self, record: RunRecord, expected: list[tuple[float, float]]) -> None:
        """The copy missed the server, and is complete once it is back; call it after the run."""
        self._thread.join(START_S)
        assert self._missed, "nobody noticed the outage"
        if self._stays:
            sent = json.loads(record.store.read_text("mlflow.json"))["last_step"]
            assert sent.get("loss", 0) < len(expected), "the run was copied whole, so there was no outage"
            self._server.bring_back()
        from mlflow.tracking import MlflowClient

        client, run_id = MlflowClient(self._server.uri), sync(record)
        assert client.get_run(run_id).info.status == "FINISHED"
        for column, key in enumerate(("loss", "grad_norm")):
            points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))
            assert points == [(step, values[column]) for step, values in enumerate(expected, start=1)], key
