"""What the dashboard does to runs, and what it refuses."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.testclient import TestClient

from cluster.dashboard import actions
from cluster.dashboard.actions import Actions
from cluster.dashboard.app import create_app
from cluster.dashboard.guard import FORGERY_HEADER
from cluster.dashboard.store_view import StoreView
from data_pipelines.storage import Store
from tests.cluster.dashboard.records import new_run, train, wait_until
from trainer.lease import Lease
from trainer.record import RunRecord

# A stand-in for `shardyard`: it does as its script says, and tells what it was asked.
FAKE = """
import json, sys, time
open(sys.argv[1] + "/asked", "a").write(json.dumps(sys.argv[2:]) + "\\n")
exec(open(sys.argv[1] + "/script").read())
"""


class Site:
    """A store, its dashboard, and what the commands answer that it gives."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.store = StoreView(str(folder / "store"), folder / "cache")
        app = create_app(self.store)
        self.actions: Actions = app.state.actions
        self.client = TestClient(app, raise_server_exceptions=False)
        self.token = self.client.get("/").text.split('name="forgery-token" content="')[1].split('"')[0]
        monkeypatch.setattr(actions, "_COMMAND", [sys.executable, "-c", FAKE, str(folder)])
        monkeypatch.setattr(actions, "BEGIN_S", 0.5)
        self.says("print('{}')")

    def says(self, script: str) -> None:
        (self.folder / "script").write_text(script)

    def asked(self) -> list[str]:
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []

    def post(self, path: str) -> tuple[int, Any]:
        answer = self.client.post(f"/api/runs/{path}", headers={FORGERY_HEADER: self.token})
        return answer.status_code, answer.json()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path, monkeypatch)
    yield site
    for process in site.actions._resumed.values():
        process.kill()
        process.wait()


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return new_run(tmp_path / "store")


def failing(kind: str, code: int, text: str = "no") -> str:
    return (
        f"print(json.dumps({{'error': {text!r}, 'kind': {kind!r}}})); print('told', file=sys.stderr); sys.exit({code})"
    )


def test_nothing_is_done_without_the_forgery_token(site: Site, record: RunRecord) -> None:
    for what in ("stop", "resume", "checkpoints/1/verify", "checkpoints/1/export"):
        assert site.client.post(f"/api/runs/run/{what}").status_code == 403
        assert site.client.get(f"/api/runs/run/{what}").status_code == 405
        assert site.post(f"../{what}")[0] in {404, 405} and site.post(f"nothing/{what}")[0] == 404
    assert site.asked() == [] and not record.stop_requested()


def test_a_run_that_runs_is_asked_to_stop(site: Site, record: RunRecord) -> None:
    with Lease.acquire(record.store):
        status, answer = site.post("run/stop")
        assert status == 200 and "'run'" in answer["message"]
        assert record.stop_requested() == "asked in the dashboard"


@pytest.mark.parametrize("kind", ["finished", "stopped", "failed"])
def test_one_that_does_not_run_is_not(site: Site, record: RunRecord, kind: str) -> None:
    record.event(kind, step=3)
    status, answer = site.post("run/stop")
    assert status == 409 and kind in answer["error"] and record.stop_requested() is None


def test_a_job_that_waits_is_taken_back(site: Site, tmp_path: Path) -> None:
    record = new_run(tmp_path / "store", "waits")
    for path in record.store.list("events"):
        record.store.delete(f"events/{path}")
    record = RunRecord.open(str(tmp_path / "store"), "waits")
    record.event("submitted", target="site")
    assert site.post("waits/stop")[0] == 200
    assert site.asked() == [f'["runs", "stop", "waits", "--json", "--store", "{tmp_path}/store"]']
    site.says(failing("Unreachable", 3, "the site is away"))
    assert site.post("waits/stop") == (503, {"error": "the site is away"})


def test_a_run_is_resumed_by_a_process_that_outlives_the_server(site: Site, record: RunRecord) -> None:
    record.event("stopped", step=3)
    (site.folder / "recipes").mkdir()
    record.update_lineage(folder=str(site.folder / "recipes"))
    site.says("print('begins', flush=True); time.sleep(60)")
    status, answer = site.post("run/resume")
    assert status == 200
    process = site.actions._resumed["run"]
    assert str(process.pid) in answer["message"] and os.getsid(process.pid) == process.pid
    (output,) = (site.folder / "store" / "jobs").glob("run-*.log")
    assert str(output) in answer["message"]
    wait_until(lambda: output.read_text() == "begins\n")
    assert site.asked() == [f'["runs", "resume", "run", "--store", "{site.folder}/store"]']
    assert psutil.Process(process.pid).cwd() == record.lineage()["folder"]
    status, answer = site.post("run/resume")  # before it has its lease
    assert status == 409 and len(site.asked()) == 1
    site.actions.end()
    assert process.poll() is None


def test_a_resume_that_fails_at_once_says_why(site: Site, record: RunRecord) -> None:
    record.event("failed", final=True)
    site.says("sys.exit('shardyard: the data set is gone')")
    assert site.post("run/resume") == (500, {"error": "shardyard: the data set is gone"})
    site.says("time.sleep(60)")
    assert site.post("run/resume")[0] == 200


def test_what_runs_or_has_finished_is_not_resumed(site: Site, record: RunRecord) -> None:
    with Lease.acquire(record.store):
        assert site.post("run/resume")[0] == 409
    record.event("finished", step=3)
    status, answer = site.post("run/resume")
    assert status == 409 and "finished" in answer["error"] and site.asked() == []


def test_a_run_of_a_target_is_sent_there_again(site: Site, record: RunRecord) -> None:
    record.event("submitted", target="old")
    record.event("submitted", target="site")
    record.event("stopped", step=3)
    site.says("print(json.dumps({'job': 'job-7', 'recipe': open(sys.argv[3]).read()}))")
    status, answer = site.post("run/resume")
    assert (status, answer["message"]) == (200, "Sent 'run' to site again, as job job-7.")
    (asked,) = site.asked()
    assert '"train"' in asked and f'"name=run", "store={site.folder}/store", "--on", "site", "--detach"' in asked
    site.says(failing("UsageError", 2, "it waits already"))
    assert site.post("run/resume") == (409, {"error": "it waits already"})


@pytest.mark.usefixtures("record")
def test_a_verification_says_what_it_found(site: Site) -> None:
    status, answer = site.post("run/checkpoints/1000/verify")
    assert status == 200 and "1,000" in answer["message"]
    site.says(failing("Damaged", 1))
    assert site.post("run/checkpoints/2000/verify") == (409, {"error": "told"})
    site.says(failing("NotFound", 4, "none"))
    assert site.post("run/checkpoints/7/verify") == (404, {"error": "none"})
    assert site.asked()[0] == f'["ckpt", "verify", "run@1000", "--json", "--store", "{site.folder}/store"]'


def test_an_export_lies_in_the_runs_folder(site: Site, record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    status, answer = site.post("run/checkpoints/5/export")
    folder = record.store.path("exports/step-00000005")
    assert status == 200 and folder in answer["message"] and f'"run@5", "{folder}"' in site.asked()[0]
    site.says(failing("UsageError", 2, "it is there already"))
    assert site.post("run/checkpoints/5/export") == (409, {"error": "it is there already"})
    monkeypatch.setattr(Store, "local_path", lambda *_: None)
    status, answer = site.post("run/checkpoints/5/export")
    assert status == 409 and "shardyard export run@5" in answer["error"]
    assert site.post("run/checkpoints/x/export")[0] == 422


def test_a_command_that_answers_nothing_is_told_of(site: Site, record: RunRecord) -> None:
    site.says("sys.exit('Killed')")
    assert site.post("run/checkpoints/5/verify") == (500, {"error": "Killed"})
    site.says("sys.exit(7)")
    assert "7" in site.post("run/checkpoints/5/verify")[1]["error"]


def test_the_same_is_not_done_twice_at_once_and_ends_with_the_server(site: Site, record: RunRecord) -> None:
    site.says("time.sleep(60)")
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(site.post("run/checkpoints/5/verify")))
    thread.start()
    wait_until(site.asked)
    began = time.monotonic()
    assert site.post("run/checkpoints/5/verify")[0] == 409
    site.actions.end()
    thread.join(20)
    assert answers[0][0] == 500 and time.monotonic() - began < 20
    site.says("print('{}')")
    assert site.post("run/checkpoints/5/verify")[0] == 200


def test_the_commands_themselves_answer(tmp_path: Path) -> None:
    """Not a stand-in: what the commands print is what is read here."""
    record = new_run(tmp_path / "store")
    train(record, 1, 3)
    record.event("stopped", step=3)
    found = Actions(StoreView(str(tmp_path / "store"), tmp_path / "cache"))
    with pytest.raises(actions.NotFound, match="no checkpoint of step 5"):
        found.verify("run", 5)


def test_processes_are_not_signalled_by_the_terminal(site: Site, record: RunRecord) -> None:
    record.event("stopped", step=3)
    site.says("time.sleep(60)")
    site.post("run/resume")
    process = site.actions._resumed["run"]
    assert os.getpgid(process.pid) != os.getpgid(0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert site.post("run/resume")[0] == 200
