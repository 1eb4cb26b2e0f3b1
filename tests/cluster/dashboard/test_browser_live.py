"""The dashboard in a real browser while a real run trains: it is watched, stopped, resumed and killed.

One run serves all tests, in any order: each that needs it at work starts it where it is not. The file takes minutes.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.dashboard.browser import PARTS, Dashboard, Watch, chart, dashboard, drawn, until, visit
from tests.cluster.dashboard.records import wait_until
from tests.cluster.dashboard.stores import RECIPE, write_run, write_sweep
from trainer.record import RunRecord

pytestmark = pytest.mark.daemon

ROOT = Path(__file__).resolve().parents[3]
TRAINS_WITHIN_S = 180.0
ENDS_WITHIN_S = 90.0
STREAMS, REQUESTS, CLIENTS = 50, 200, 8


class Training:
    """`shardyard train` of one run, begun as often as it has ended. It leaves rows and checkpoints at once."""

    def __init__(self, store: Path, output: Path) -> None:
        self.store, self._output = store, output
        self.process: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()

    @property
    def record(self) -> RunRecord:
        return RunRecord.open(str(self.store), "live")

    def start(self) -> None:
        """Return when steps come."""
        often = ["evaluation.every=10", "evaluation.examples=4", "checkpoint.every=10"]
        recipe = [RECIPE, "name=live", f"store={self.store}", "steps=1000000", "tracking.mlflow=null", *often]
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "train", *recipe], cwd=ROOT, stdout=output, stderr=output
            )
        self.wait_for_steps(1)

    def wait_for_steps(self, attempt: int) -> None:
        """Until an attempt, or a later one, has saved, and gone on."""

        def goes_on() -> bool:
            assert self.process is None or self.process.poll() in {None, 0}, self._output.read_text()
            if not (self.store / "live" / "run.yaml").exists() or self.record.holder() is None:
                return False
            saved = [event["step"] for event in self.record.events() if event["kind"] == "checkpoint"]
            last = self.record.metrics_table()[-1:]
            return bool(saved and last) and last[0]["attempt"] >= attempt and last[0]["step"] > saved[-1]

        wait_until(goes_on, TRAINS_WITHIN_S)
        self.family()

    def family(self) -> set[psutil.Process]:
        """The launcher and all that it has started."""
        holder = self.record.holder()
        assert holder is not None
        launcher = psutil.Process(holder.holder.pid)
        self._family |= {launcher, *launcher.children(recursive=True)}
        return self._family

    def kill(self) -> None:
        """All at once, as when a machine goes."""
        for each in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.wait_until_gone()

    def wait_until_gone(self) -> None:
        """Until nothing that it has ever started is left; what has ended and nobody waits for is gone, too."""
        if self.process is not None:
            self.process.wait(ENDS_WITHIN_S)
        wait_until(lambda: not any(is_alive(each) for each in self._family), ENDS_WITHIN_S)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """The run, and beside it one that has finished, and a sweep."""
    folder = tmp_path_factory.mktemp("live")
    write_run(folder / "store", "done", steps=80, fails_at=44, saved_at=40, spike_at=30)
    write_sweep(folder / "store")
    run = Training(folder / "store", folder / "output")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_CPP_LOG_LEVEL", "INFO")  # with the next: its workers print much
        environment.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
        run.start()
        yield run
    if run.record.holder() is not None:
        run.kill()


@pytest.fixture
def training(run: Training) -> Training:
    """The run, at work."""
    if run.record.holder() is None:
        run.start()
    return run


@pytest.fixture(scope="module")
def server(run: Training, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with dashboard(run.store, tmp_path_factory.mktemp("cache")) as started:
        yield started


def newest_step(page: Any) -> int:
    """As the head of the run's page tells it."""
    return int(page.locator("#steps").inner_text().partition(" of ")[0].replace(",", ""))


def chart_reaches(page: Any, step: int) -> Any:
    """The chart of the loss, once it has come so far: every step up to its last one must be in it once."""
    loss = chart(page, "loss")
    until(page, "([chart, step]) => chart.chart.curve.x.at(-1) >= step", [loss.element_handle(), step])
    counted, last, places = loss.evaluate(
        "({chart: {curve}}) => [curve.count.reduce((sum, each) => sum + each, 0), curve.x.at(-1), curve.x]"
    )
    assert counted == last and all(one < other for one, other in itertools.pairwise(places))
    return loss


def stop(page: Any) -> None:
    """By the button on the run's page."""
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Stop it").click()
    page.get_by_text("Asked 'live' to save and stop.").wait_for()
    until(page, "document.getElementById('status').textContent === 'stopped'")


def see_every_page(page: Any, address: str, status: str) -> None:
    """Each shows what it is for, of a run that has this status."""
    seen = {
        "curves": "document.querySelector('.chart[data-metric=loss]')?.chart.plot?.data[1].length > 5",
        "speed": "document.querySelectorAll('#speed .side')[1].querySelectorAll('tbody tr').length === 2",
        "timeline": "/Attempt 1[^]*checkpoint/.test(document.querySelector('#timeline').textContent)",
        "logs": "document.querySelectorAll('#logs .line').length > 0",
        "config": "/1000000/.test(document.querySelector('#config [data-key=steps]')?.textContent)",
        "media": "/no text/.test(document.querySelector('#media').textContent)",
        "data": "document.querySelector('#data .chart[data-metric=data_wait_s]')?.chart.plot?.data[1].length > 5",
    }
    for part in PARTS:
        visit(page, f"{address}/runs/live#{part}")
        until(page, seen[part])
        until(page, "status => document.getElementById('status').textContent === status", status)

    data_set = "document.querySelector('main a[href^=\"/datasets/\"]')"
    for path, shows in {
        "/": "document.querySelector('[data-sparkline=live] polyline')",
        "/compare?runs=live,done": "document.querySelector('#chart canvas') && document.querySelector('.equal td')",
        "/cluster": f"/{status}/.test(document.querySelector('tr[data-key=live]')?.textContent)",
        "/checkpoints?run=live": "document.querySelector('tr[data-key^=\"live/\"] .badge')",
        "/sweeps": "document.querySelector('tr[data-key=lr]')",
        "/sweeps/lr": "document.querySelectorAll('#lines polyline').length === 4",
        "/datasets": data_set,
    }.items():
        page.goto(address + path)
        until(page, f"Boolean({shows})")
    page.goto(address + page.evaluate(f"{data_set}.getAttribute('href')"))
    until(page, "document.querySelectorAll('article.example').length > 0")


def test_every_page_is_complete_and_quiet_while_a_run_trains(training: Training, server: Dashboard, page: Any) -> None:
    watch = Watch(page, server.address)
    see_every_page(page, server.address, "running")
    assert (watch.errors, watch.elsewhere) == ([], [])


def test_new_steps_appear_by_themselves(training: Training, server: Dashboard, page: Any) -> None:
    page.goto(f"{server.address}/runs/live")
    page.evaluate("window.loadedOnce = true")
    begun = drawn(chart_reaches(page, newest_step(page)))["x"][-1]
    until(page, "step => document.getElementById('progress').value > step + 5", begun)
    assert newest_step(page) > begun
    found = drawn(chart_reaches(page, begun + 5))
    losses = {row["step"]: row["loss"] for row in training.record.metrics_table() if "loss" in row}
    assert found["max"][-5:] == pytest.approx([losses[step] for step in found["x"][-5:]])
    assert page.evaluate("window.loadedOnce")


def test_many_readers_leave_nothing_behind(training: Training, server: Dashboard) -> None:
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    paths = [
        "/api/runs", "/api/overview", "/api/runs/live", "/api/runs/live/events", "/api/runs/live/sparkline",
        "/api/runs/live/series?metric=loss", "/api/runs/live/performance", "/api/runs/live/ranks?metric=own_s",
        "/api/runs/live/logs?attempt=1&rank=0", "/api/runs/live/config", "/api/cluster", "/api/checkpoints",
        "/api/compare?runs=live,done&metric=loss", "/runs/live",
    ]  # fmt: skip

    def ask(path: str) -> tuple[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            return path, answer.status

    for path in paths:  # what it keeps for good is there
        assert ask(path) == (path, 200)
    threads, files = process.num_threads(), process.num_fds()

    rows = [threading.Event() for _ in range(STREAMS)]
    closing = threading.Event()

    def read(told: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/api/runs/live/stream")
            for line in connection.getresponse():
                if line == b"event: rows\n":
                    told.set()
                if closing.is_set():
                    return

    with ThreadPoolExecutor(STREAMS) as readers, ThreadPoolExecutor(CLIENTS) as clients:
        try:
            streams = [readers.submit(read, told) for told in rows]
            wait_until(lambda: all(told.is_set() for told in rows), 60)
            answers = list(clients.map(ask, itertools.islice(itertools.cycle(paths), REQUESTS)))
        finally:
            closing.set()
    for stream in streams:
        stream.result()
    assert {status for _, status in answers} == {200}

    def is_quiet() -> bool:
        assert ask("/api/runs/live")[1] == 200
        return process.num_threads() <= threads + 8 and process.num_fds() <= files + 8

    wait_until(is_quiet, 60)


def test_a_server_that_was_killed_and_started_again_is_found(training: Training, server: Dashboard, page: Any) -> None:
    page.goto(f"{server.address}/runs/live")
    page.evaluate("window.loadedOnce = true")
    chart_reaches(page, newest_step(page) + 2)
    server.stop()
    until(page, "document.getElementById('connection').dataset.state === 'lost'")
    missed = training.record.metrics_table()[-1]["step"] + 5
    wait_until(lambda: training.record.metrics_table()[-1]["step"] > missed, 60)
    server.start()
    until(page, "document.getElementById('connection').dataset.state === 'live'")
    chart_reaches(page, missed + 10)
    assert page.evaluate("window.loadedOnce")


def test_the_buttons_stop_and_resume_it_and_it_outlives_the_server(
    training: Training, server: Dashboard, page: Any
) -> None:
    process, attempt = training.process, training.record.attempt
    page.goto(f"{server.address}/runs/live")
    stop(page)
    if process is not None:
        assert process.wait(ENDS_WITHIN_S) == 0
    training.wait_until_gone()
    (*_, stopped) = training.record.events()
    assert (stopped["kind"], stopped["step"]) == ("stopped", training.record.checkpoints()[-1]["step"])

    assert server.process is not None
    ui = psutil.Process(server.process.pid)
    page.get_by_role("button", name="Resume").click()
    wait_until(lambda: any("resume" in child.cmdline() for child in ui.children()))
    server.stop()
    training.wait_for_steps(attempt + 1)
    again = [row["step"] for row in training.record.metrics_table() if row["attempt"] == attempt + 1]
    assert again[0] == stopped["step"] + 1

    server.start()
    until(page, "document.getElementById('status').textContent === 'running'")
    chart_reaches(page, again[-1] + 5)

    stop(page)  # on a page that another server has given
    training.wait_until_gone()


def test_of_a_run_whose_cluster_is_gone_everything_is_told(training: Training, server: Dashboard, page: Any) -> None:
    training.kill()
    record = training.record
    watch = Watch(page, server.address)
    see_every_page(page, server.address, "lost")
    page.goto(server.address)
    page.locator("tr[data-key=live] .badge", has_text="lost").wait_for()

    visit(page, f"{server.address}/runs/live")
    last = record.metrics_table()[-1]["step"]
    assert drawn(chart_reaches(page, last))["x"][-1] == newest_step(page) == last
    assert page.get_by_role("button", name="Resume").is_visible()
    assert page.get_by_role("button", name="Stop", exact=True).is_hidden()

    log = record.store.read_text(f"attempts/{record.attempt:04d}/rank-00000.log")
    visit(page, f"{server.address}/runs/live#logs?attempt={record.attempt}&rank=0")
    page.get_by_role("log").get_by_text(log.splitlines()[-1], exact=True).first.wait_for()
    assert (watch.errors, watch.elsewhere) == ([], [])
