"""A real browser, and a real server for it to look at."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
# The system's browser, asking nobody on the network for anything.
QUIET = (
    "--no-sandbox --disable-background-networking --disable-component-update --disable-default-apps --disable-sync "
    "--disable-domain-reliability --no-first-run --no-default-browser-check --disable-gpu --disable-dev-shm-usage"
)
STARTS_WITHIN_S = 60.0
TRUE_WITHIN_S = 60.0
PARTS = ("curves", "speed", "timeline", "logs", "config", "media", "data")  # of a run's page


class Dashboard:
    """`shardyard ui` over a store, as a process; it may be stopped and started again at the same address."""

    def __init__(self, store: Path, cache: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._store, self._cache = store, cache
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "cluster.cli", "ui", "--store", str(self._store), "--port", str(self.port)]
        self.process = subprocess.Popen(command, env={**os.environ, "XDG_CACHE_HOME": str(self._cache)})
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/api/runs", timeout=5).read()
                return
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)

    def stop(self) -> None:
        """Kill the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextmanager
def dashboard(store: Path, cache: Path) -> Iterator[Dashboard]:
    """A server for as long as the block."""
    server = Dashboard(store, cache)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; skips where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        try:
            yield started
        finally:
            started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A window of its own."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.set_default_timeout(TRUE_WITHIN_S * 1000)
    yield context.new_page()
    context.close()


def until(page: Any, told: str, argument: Any = None) -> None:
    """Wait until an expression, or a function of an argument, is true in the page.

    Asked from here: Playwright's own way to wait evaluates text in the page, which the page's policy refuses.
    """
    deadline = time.monotonic() + TRUE_WITHIN_S
    while not page.evaluate(told, argument):
        assert time.monotonic() < deadline, f"still not so: {told}"
        time.sleep(0.05)


def visit(page: Any, address: str) -> None:
    """Load a page anew, also where the address differs behind the # alone."""
    page.goto("about:blank")
    page.goto(address)


def chart(page: Any, metric: str) -> Any:
    """The first chart of a metric, scrolled into view and drawn."""
    found = page.locator(f"#curves .chart[data-metric={json.dumps(metric)}]")
    found.scroll_into_view_if_needed()
    until(page, "chart => chart.dataset.state === 'shown' && chart.chart.plot", found.element_handle())
    return found


def drawn(of: Any) -> dict[str, Any]:
    """What uPlot was given to draw, and between which heights it draws it."""
    found: dict[str, Any] = of.evaluate(
        """({chart}) => ({
            x: [...chart.plot.data[0]], max: [...chart.plot.data[1]], min: [...chart.plot.data[2]],
            line: [...chart.plot.data[3]], low: chart.plot.scales.y.min, high: chart.plot.scales.y.max,
            from: chart.plot.scales.x.min, to: chart.plot.scales.x.max,
            shown: chart.plot.series.map((each) => each.show !== false)})"""
    )
    return found


class Watch:
    """What a page did that it should not: errors, and requests to elsewhere. `series`: curves that it fetched."""

    def __init__(self, page: Any, address: str) -> None:
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.series: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._see(request.url, address))

    def _see(self, url: str, address: str) -> None:
        if not url.startswith((f"{address}/", "data:")):
            self.elsewhere.append(url)
        if "/series?" in url:
            self.series.append(url)
