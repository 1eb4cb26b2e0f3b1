"""How soon a page is drawn in Chromium: a part of benchmarks/dashboard.py."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.dashboard_server import Figures, dashboard
from benchmarks.dashboard_store import spike_of

REPEATS = 5
WAIT_S = 120.0

# Of the 100 runs; what is to be seen when the page is drawn.
_CURVES = "document.querySelector('#curves .chart[data-metric=loss]')?.chart?.plot"
PAGES = {
    "overview": ("/", "document.querySelector('[data-sparkline] polyline')"),
    "run: curves": ("/runs/run-001", _CURVES),
    "run: speed": ("/runs/run-002#speed", "document.querySelector('#speed .uplot')"),
    "run: timeline": ("/runs/run-003#timeline", "document.querySelector('#timeline')?.innerText.includes('finished')"),
    "run: config": ("/runs/run-004#config", "document.querySelector('#config')?.innerText.includes('optimizer')"),
    "run: data": ("/runs/run-005#data", "document.querySelector('#data')?.innerText.length > 100"),
    "compare 2": ("/compare?runs=run-010,run-011", "document.querySelector('#chart .uplot')"),
    "compare 8": (
        "/compare?runs=" + ",".join(f"run-{number:03d}" for number in range(20, 28)),
        "document.querySelector('#chart .uplot')",
    ),
    "cluster": ("/cluster", "document.querySelector('main')?.innerText.length > 50"),
    "checkpoints": ("/checkpoints", "document.querySelector('main')?.innerText.length > 50"),
    "data sets": ("/datasets", "document.querySelector('main')?.innerText.length > 50"),
    "sweeps": ("/sweeps", "document.querySelector('main')?.innerText.length > 50"),
}


def drawn(store: Path, cache: Path, pages: dict[str, tuple[str, str]]) -> Figures:
    """Seconds until each page is drawn: the first time, with nothing computed yet, and the median of later ones."""
    shutil.rmtree(cache, ignore_errors=True)
    found: Figures = {}
    with dashboard(store, cache) as server:
        for name, (path, content) in pages.items():
            times = [in_browser(f"http://127.0.0.1:{server.port}{path}", content)["s"] for _ in range(1 + REPEATS)]
            found[name] = {"cold_s": times[0], "warm_s": statistics.median(times[1:]), "most_s": max(times)}
    return found


def long_run(store: Path, cache: Path, metrics: int, steps: int) -> Figures:
    """Seconds until the chart of a long run is drawn with the loss that stands out; without a cache in each of some
    servers, then with one."""
    spike = spike_of(metrics, steps)
    seen = f"{_CURVES} && [...{_CURVES}.data[1]].includes({spike!r})"
    times: dict[str, list[float]] = {"cold_s": [], "warm_s": []}
    for _ in range(REPEATS):
        shutil.rmtree(cache, ignore_errors=True)
        with dashboard(store, cache) as server:
            for kept in times.values():
                kept.append(in_browser(f"http://127.0.0.1:{server.port}/runs/run-000", seen)["s"])
    return {heat: statistics.median(each) for heat, each in times.items()} | {"cold_most_s": max(times["cold_s"])}


def in_browser(address: str, content: str) -> Figures:
    """Seconds until something is to be seen, by a browser with an empty cache, and what came over the network.

    content: an expression of the page that is true then.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto("about:blank")
        received: list[float] = []
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
        began = time.monotonic()
        page.goto(address, wait_until="commit")
        until(page, content)
        seconds = time.monotonic() - began
        page.wait_for_timeout(1000)  # what it goes on to load
        browser.close()
    return {"s": seconds, "bytes": sum(received), "requests": len(received)}


def until(page: Any, content: str) -> None:
    """Asked from here: Playwright's own way to wait evaluates text in the page, which our policy refuses."""
    deadline = time.monotonic() + WAIT_S
    while not page.evaluate(f"Boolean({content})"):
        if time.monotonic() > deadline:
            raise SystemExit(f"never so: {content}")
        time.sleep(0.01)
