"""`shardyard metrics`: what Prometheus reads, against readers of its format that are not ours."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import prometheus
from cluster.cli import main
from cluster.commands.metrics import MetricsServer
from cluster.prometheus import FAMILIES, Sample, StorePage, exposition
from configs.errors import Unreachable
from configs.load import load
from data_pipelines.storage import Store
from tests.trainer.test_record import RECIPE
from trainer.lease import Lease
from trainer.record import RunRecord

Page = dict[tuple[str, frozenset[tuple[str, str]]], float]
_LINE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)*)\})? (\S+)')
_UNESCAPED = {"\\\\": "\\", "\\n": "\n", '\\"': '"'}
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


def parsed(text: str) -> Page:
    """The page by a reader that takes the format at its word, and refuses what occurs twice or stands apart."""
    page: Page = {}
    described: list[str] = []
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            described.append(line.split(" ")[2])
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert described[-1] == name and kind in ("gauge", "counter")
            continue
        match = _LINE.fullmatch(line)
        assert match is not None, line
        assert match[1] == described[-1], f"{match[1]} stands below {described[-1]}"
        labels = {
            name: re.sub(r"\\.", lambda found: _UNESCAPED[found[0]], value)
            for name, value in _LABEL.findall(match[2] or "")
        }
        key = (match[1], frozenset(labels.items()))
        assert key not in page
        page[key] = float(match[3])
    assert len(described) == len(set(described))
    return page


def of(page: Page, run: str) -> dict[str, Any]:
    """A run's numbers by their name, without the prefix; its status by its word."""
    found: dict[str, Any] = {}
    for (name, labels), value in page.items():
        if dict(labels).get("run") == run:
            found[name.removeprefix("shardyard_run_")] = dict(labels).get("status", value)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "runs").mkdir()
    return Store(tmp_path / "runs")


@pytest.fixture(autouse=True)
def _always_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "KEPT_S", 0.0)


def begin(store: Store, name: str, **changes: Any) -> RunRecord:
    return RunRecord.create(store, load(RECIPE | {"name": name, "store": store.uri} | changes))


def trained(record: RunRecord, step: int, **values: float) -> None:
    record.metrics(step, {"loss": 1.0 / step, "step_s": 0.5, "data_wait_s": 0.1, "tokens_per_s": 64.0} | values)


def restart(record: RunRecord) -> None:
    """What a launcher writes when a worker died."""
    record.event("failed", error="it died", final=False)
    record.next_attempt()
    record.event("restarted", step=2, reason="again")
    record.event("started", step=2)


def test_a_run_that_goes_on(store: Store) -> None:
    record, before = begin(store, "first"), time.time()
    page = StorePage(store)
    assert of(parsed(page.text()), "first") == {
        "status": "queued",
        "steps": 10.0,
        **dict.fromkeys(("restarts_total", "failures_total", "diverged_total", "checkpoint_failures_total"), 0.0),
    }
    with record.acquire_lease():
        record.next_attempt()
        record.event("started", step=0)
        trained(record, 3, examples_per_s=2.0)
        record.event("checkpoint", step=2, path="p")
        record.metrics(3, {"validation/loss": 9.0})
        record.flush()
        found = of(parsed(page.text()), "first")
        assert found["status"] == "running"
        assert (found["step"], found["loss"], found["tokens_per_second"]) == (3, 1 / 3, 64.0)
        assert (found["examples_per_second"], found["data_wait_ratio"]) == (2.0, pytest.approx(0.2))
        assert before <= found["last_step_timestamp_seconds"] <= time.time()
        assert before <= found["last_checkpoint_timestamp_seconds"] <= time.time()

        restart(record)  # from step 2: what comes now replaces step 3
        trained(record, 3, loss=math.nan)
        record.event("diverged", step=3, what="loss", value=math.nan, policy="skip")
        record.event("checkpoint_failed", step=3, error="full")
        record.flush()
        found = of(parsed(page.text()), "first")
        assert math.isnan(found["loss"]) and found["step"] == 3
        assert [found[f"{name}_total"] for name in ("restarts", "failures", "diverged", "checkpoint_failures")] == [
            1
        ] * 4
        record.event("finished", step=3)
    assert of(parsed(page.text()), "first")["status"] == "finished"
    record.close()


def test_following_a_run_and_reading_it_anew_tell_the_same(store: Store) -> None:
    """And what they tell is what `runs ls` reads of the whole record."""
    record, followed = begin(store, "first"), StorePage(store)
    for attempt in range(3):
        record.next_attempt() if attempt == 0 else restart(record)
        for step in (attempt + 1, attempt + 2, attempt + 3):
            trained(record, step)
            record.flush()
            text = followed.text()
            assert of(parsed(text), "first") == of(parsed(StorePage(store).text()), "first")
            curve = record.stitched()
            assert of(parsed(text), "first")["step"] == curve[-1]["step"]
            assert of(parsed(text), "first")["loss"] == curve[-1]["loss"]
    record.close()


@pytest.mark.parametrize("seen_gone", [True, False])
def test_a_run_that_was_begun_anew_under_the_same_name(store: Store, seen_gone: bool) -> None:
    page = StorePage(store)
    record = begin(store, "first")
    record.next_attempt()
    restart(record)
    record.close()
    assert of(parsed(page.text()), "first")["restarts_total"] == 1
    store.delete_dir("first")
    if seen_gone:
        assert of(parsed(page.text()), "first") == {}
    begin(store, "first", steps=7).close()
    found = of(parsed(page.text()), "first")
    assert (found["steps"], found["restarts_total"]) == (7, 0)


def test_a_scrape_reads_what_is_new_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record, read = begin(store, "first"), []
    record.next_attempt()

    class Counted:
        """A file that says how many bytes are read of it."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self._file.close()

        def seek(self, offset: int) -> None:
            self._file.seek(offset)

        def read(self, *size: int) -> bytes:
            data: bytes = self._file.read(*size)
            read.append(len(data))
            return data

    opened = Store.open_input
    monkeypatch.setattr(Store, "open_input", lambda self, path: Counted(opened(self, path)))
    page = StorePage(store)
    for step in range(1, 30):
        trained(record, step)
        record.flush()
        read.clear()
        assert of(parsed(page.text()), "first")["step"] == step
        assert sum(read) < 600
    record.close()


def test_what_is_damaged_is_counted_and_hides_nothing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "bad-config", "bad-rows", "bad-folder"):
        record = begin(store, name)
        record.next_attempt()
        trained(record, 4)
        record.close()
    store.write_atomic("bad-config/run.yaml", "steps: [")
    rows = store.list("bad-rows/metrics")[0]
    torn = b'{"attempt": 1}\n[]\n{"attempt": "x", "time": 1, "step": 5, "values": {}}\nnot JSON\n{"attempt": 1, "ti'
    store.write_atomic(f"bad-rows/metrics/{rows}", store.read_bytes(f"bad-rows/metrics/{rows}") + torn)
    shutil.rmtree(store.path("bad-folder/events"))
    Path(store.path("bad-folder/events")).write_text("no folder")
    page = StorePage(store)
    for _ in range(2):
        found = parsed(page.text())
        assert found["shardyard_scrape_errors", frozenset()] == 3
        assert of(found, "good")["step"] == of(found, "bad-rows")["step"] == 4
        assert of(found, "bad-config") == {"status": "damaged"}
        assert of(found, "bad-folder") == {}
        assert found["shardyard_store_free_bytes", frozenset()] > 0
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "Run 'bad-config'" in said and "Run 'bad-folder'" in said


def test_a_store_out_of_reach(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, "first").close()
    page = StorePage(store)
    os.rename(tmp_path / "runs", tmp_path / "unmounted")
    assert parsed(page.text()) == {("shardyard_scrape_errors", frozenset()): 1}
    os.rename(tmp_path / "unmounted", tmp_path / "runs")
    assert of(parsed(page.text()), "first")["status"] == "queued"

    def unreachable(*_: Any) -> None:
        raise Unreachable("s3://bucket has not answered")

    monkeypatch.setattr(Store, "exists", unreachable)
    assert parsed(page.text()) == {("shardyard_scrape_errors", frozenset()): 1}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats())
def test_any_label_and_number_are_read_as_they_were(label: str, value: float) -> None:
    text = exposition([Sample("shardyard_run_loss", value, {"run": label})])
    ((found_labels, found),) = [(dict(labels), number) for (_, labels), number in parsed(text).items()]
    assert found_labels == {"run": label}
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_a_name_that_is_no_text_can_be_sent() -> None:
    text = exposition([Sample("shardyard_run_loss", 1, {"run": os.fsdecode(b"bad\xff")})])
    assert ("shardyard_run_loss", frozenset({("run", "bad\\udcff")})) in parsed(text.encode().decode())


@pytest.mark.daemon
def test_prometheus_itself_accepts_the_page() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian: apt-get install prometheus)")
    samples = [Sample(name, 1.5, {"run": 'a"b\\c\nd'}) for name in FAMILIES]
    page = exposition([*samples, Sample("shardyard_run_loss", math.nan), Sample("shardyard_run_step", -math.inf)])
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_once(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store, "first").close()
    capsys.readouterr()
    assert main(["metrics", "--once", "--store", store.uri]) == 0
    text = capsys.readouterr().out
    assert of(parsed(text), "first")["status"] == "queued"
    assert main(["metrics", "--once", "--store", store.uri, "--json"]) == 0
    assert of(parsed(json.loads(capsys.readouterr().out)["page"]), "first")["status"] == "queued"


def test_nobody_else_may_read_it_without_a_token(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3", "a-host"):
        assert main(["metrics", "--store", store.uri, "--host", host]) == 2
        assert "--token-file" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert main(["metrics", "--store", store.uri, "--token-file", str(empty)]) == 2
    assert main(["metrics", "--store", store.uri, "--token-file", str(tmp_path / "none")]) == 4


@pytest.fixture(params=["127.0.0.1", "::1"])
def served(request: pytest.FixtureRequest, store: Store) -> Iterator[str]:
    """A server that asks for the token."""
    begin(store, "first").close()
    try:
        server = MetricsServer((request.param, 0), StorePage(store), b"the-right-one")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        host = f"[{request.param}]" if ":" in request.param else request.param
        yield f"http://{host}:{server.server_address[1]}"
        server.shutdown()


def ask(url: str, authorization: str | None = None) -> tuple[int, str, str]:
    """(status, type, text)"""
    request = urllib.request.Request(url, headers={} if authorization is None else {"Authorization": authorization})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def test_a_server_answers_who_shows_the_token(served: str) -> None:
    status, kind, text = ask(f"{served}/metrics", "Bearer the-right-one")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert of(parsed(text), "first")["status"] == "queued"
    assert ask(f"{served}/other", "Bearer the-right-one")[0] == 404
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer the-right-onE",
        "Bearer the-right-one2",
        "Basic the-right-one",
        "Bearer ÿ",
    ):
        status, _, text = ask(f"{served}/metrics", wrong)
        assert status == 401 and "first" not in text


def test_a_taken_port_is_said(store: Store, served: str, capsys: pytest.CaptureFixture[str]) -> None:
    host, _, port = served.removeprefix("http://").rpartition(":")
    assert main(["metrics", "--store", store.uri, "--host", host.strip("[]"), "--port", port]) == 3
    assert "--port" in capsys.readouterr().err


def test_scrapes_that_come_close_read_the_store_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "KEPT_S", 60.0)
    page, reads = StorePage(store), []
    monkeypatch.setattr(page, "_names", lambda: reads.append(1) or [])
    threads = [threading.Thread(target=page.text) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1


def test_a_launcher_that_died_is_told(store: Store) -> None:
    from trainer.lease import Holder

    record = begin(store, "first")
    record.next_attempt()
    record.event("started", step=0)
    record.close()
    with Lease.acquire(record.store, Holder("another-host", 1, 0.0)):
        assert of(parsed(StorePage(store).text()), "first")["status"] == "running"
    assert of(parsed(StorePage(store).text()), "first")["status"] == record.status() == "lost"
