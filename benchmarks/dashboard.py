"""What the dashboard costs and how long it takes, and MLflow's UI beside it on the same runs.

    python benchmarks/dashboard.py [--parts pages,million,browser,...] [--work FOLDER] [--out benchmarks/results]

pages    100 runs of 100 metrics and 10,000 steps: each page's data from a cold cache and from a warm one
million  one chart of a run of 1,000,000 steps, and whether its one step that stands out is in it
browser  every page with the first of these stores, and the second's chart, until they are drawn in Chromium
streams  50 open streams on a run that trains: how late a step is told, and what they take of the training's speed
mlflow   10 runs of 20,000 steps, each with one step that stands out, in both: seconds and bytes to content in Chromium

Each part's figures are kept in <out>/dashboard.json with the machine's load, and <out>/dashboard.md is written anew
from it. On a machine that does other work, too, seconds are those of waiting; CPU seconds are the server's own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.dashboard_browser import PAGES, drawn, long_run  # noqa: E402
from benchmarks.dashboard_mlflow import peer  # noqa: E402
from benchmarks.dashboard_server import START_S, Figures, Server, dashboard  # noqa: E402
from benchmarks.dashboard_store import metric_names, spike_of, write_store  # noqa: E402
from benchmarks.provenance import commit  # noqa: E402
from trainer.record import RunRecord  # noqa: E402

RUNS, METRICS, STEPS = 100, 100, 10_000
STREAMS, WATCH_S, TURNS = 50, 10.0, 24


# --- the parts


def pages(work: Path) -> Figures:
    """Data of pages with a full store."""
    store, cache = work / "store", work / "cache"
    if not store.exists():
        write_store(store, RUNS, METRICS, STEPS)
    shutil.rmtree(cache, ignore_errors=True)
    found: Figures = {}

    def asked(server: Server, heat: str, run: str) -> None:
        paths = {
            "overview page": "/",
            "overview data": "/api/runs",
            "run page": f"/runs/{run}",
            "run data": f"/api/runs/{run}",
            "one chart": f"/api/runs/{run}/series?metric=loss",
            "one sparkline": f"/api/runs/{run}/sparkline",
            "events": f"/api/runs/{run}/events",
        }
        for name, path in paths.items():
            content, seconds, cpu_s = server.get(path)
            found.setdefault(name, {})[heat] = {"s": seconds, "cpu_s": cpu_s, "bytes": len(content)}
        began, used = time.monotonic(), server.cpu_s()
        for metric in metric_names(METRICS)[:20]:
            server.get(f"/api/runs/{run}/series?metric={metric}")
        found.setdefault("20 charts", {})[heat] = {"s": time.monotonic() - began, "cpu_s": server.cpu_s() - used}
        began, used = time.monotonic(), server.cpu_s()
        for number in range(RUNS):
            server.get(f"/api/runs/run-{number:03d}/sparkline")
        found.setdefault(f"{RUNS} sparklines", {})[heat] = {
            "s": time.monotonic() - began,
            "cpu_s": server.cpu_s() - used,
        }

    with dashboard(store, cache) as server:
        start = server.memory_mb() | {"start_s": server.start_s}
        asked(server, "cold", "run-050")
        asked(server, "warm", "run-050")
        chart = json.loads(server.get("/api/runs/run-051/series?metric=loss")[0])
        return {
            "start": start,
            "pages": found,
            "after": server.memory_mb(),
            "spike_kept": spike_of(METRICS, STEPS) in chart["max"],
        }


def million(work: Path) -> Figures:
    """One long run."""
    store, cache = work / "million", work / "million-cache"
    if not store.exists():
        write_store(store, 1, 5, 1_000_000)
    shutil.rmtree(cache, ignore_errors=True)
    path, found = "/api/runs/run-000/series?metric=loss&buckets=600", {}
    for heat in ("cold", "warm", "again"):
        with dashboard(store, cache) as server:
            if heat == "again":
                server.get(path)
            content, seconds, cpu_s = server.get(path)
            kept = spike_of(5, 1_000_000) in json.loads(content)["max"]
            found[heat] = {"s": seconds, "cpu_s": cpu_s, "spike_kept": kept, **server.memory_mb()}
    return found


def browser(work: Path) -> Figures:
    """Every page, and one long run, in Chromium."""
    full, long = work / "store", work / "million"
    if not full.exists():
        write_store(full, RUNS, METRICS, STEPS)
    if not long.exists():
        write_store(long, 1, 5, 1_000_000)
    return {
        "pages": drawn(full, work / "browser-cache", PAGES),
        "a million steps": long_run(long, work / "browser-cache", 5, 1_000_000),
    }


def streams(work: Path) -> Figures:
    """Open streams on a run that trains; with them and without, in turns."""
    store = work / "live"
    shutil.rmtree(store, ignore_errors=True)
    recipe = ["language_modeling-gpt-tiny", "name=live", f"store={store}", "steps=1000000", "tracking.mlflow=null"]
    recipe += ["resources.workers=1", "evaluation.every=1000000", "checkpoint.every=1000000"]
    command = [sys.executable, "-m", "cluster.cli", "train", *recipe]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not list(store.glob("live/metrics/*")):
            if training.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the training does not begin")
            time.sleep(0.5)
        time.sleep(10)
        record = RunRecord.open(str(store), "live")
        alone, watched, cpu, late = [steps_per_s(record)], [], [], []
        for _ in range(TURNS):
            with dashboard(store, work / "live-cache") as server, opened(server.port, late):
                time.sleep(2)
                used = server.cpu_s()
                watched.append(steps_per_s(record))
                cpu.append((server.cpu_s() - used) / WATCH_S)
            alone.append(steps_per_s(record))
        # Each beside what was before and after it, since the machine is now quicker and now slower.
        ratios = [2 * seen / sum(both) for seen, both in zip(watched, itertools.pairwise(alone), strict=True)]
        return {
            "steps_per_s_alone": alone,
            "steps_per_s_watched": watched,
            "watched_to_alone": {
                "median": statistics.median(ratios),
                "mean": statistics.mean(ratios),
                "standard_error": statistics.stdev(ratios) / len(ratios) ** 0.5,
            },
            "cpu_s_per_s": statistics.median(cpu),
            "late_s": {"median": statistics.median(late), "most": max(late), "rows": len(late)},
        }
    finally:
        training.send_signal(signal.SIGINT)
        training.wait(120)


def steps_per_s(record: RunRecord) -> float:
    """By the record's own times, over a while."""
    began = time.time()
    time.sleep(WATCH_S)
    ended = time.time()
    time.sleep(1.5)  # until what was recorded is on disk
    times = [row["time"] for row in record.metrics_table() if began <= row["time"] < ended]
    return (len(times) - 1) / (times[-1] - times[0])


@contextlib.contextmanager
def opened(port: int, late: list[float]) -> Iterator[None]:
    """Streams of one run, of which the first tells how old its rows are. Read by one thread, since it takes its time
    from the training, too, which readers on other machines do not."""
    closing, selector = threading.Event(), selectors.DefaultSelector()
    request = f"GET /api/runs/live/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    connections = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(STREAMS)]
    for connection in connections:
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ)

    def read() -> None:
        text = b""
        while not closing.is_set():
            for key, _ in selector.select(0.5):
                received = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if key.fileobj is not connections[0]:
                    continue
                *lines, text = (text + received).split(b"\n")
                now = time.time()
                rows = [json.loads(line[6:]) for line in lines if line.startswith(b"data: [")]  # rows, or events
                late.extend(now - row["time"] for each in rows for row in each if "number" in row)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        closing.set()
        reader.join()
        for connection in connections:
            connection.close()


# --- the table


def write_table(found: Figures, file: Path) -> None:
    lines = [
        "# The dashboard: what it costs, and how long it takes",
        "",
        f"`{' '.join(['python', 'benchmarks/dashboard.py'])}`",
    ]
    for part, figures in found.items():
        said = figures["measured"]
        lines += [
            "",
            f"## {part}",
            "",
            f"{said['date']}, commit {said['commit']}, {said['machine']}, load {said['load']}",
            "",
        ]
        lines += ["| what | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in flat(figures) if not name.startswith("measured")]
    file.write_text("\n".join(lines) + "\n")


def flat(figures: Figures, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}, ")
        else:
            shown = [
                f"{each:.3g}"
                if isinstance(each, float) and abs(each) < 1e4
                else f"{each:,.0f}"
                if isinstance(each, float)
                else str(each)
                for each in (value if isinstance(value, list) else [value])
            ]
            yield f"{prefix}{name}", ", ".join(shown)


def measured() -> Figures:
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


PARTS = {"pages": pages, "million": million, "browser": browser, "streams": streams, "mlflow": peer}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, default=Path("/tmp/shardyard-dashboard"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args(argv)
    file = arguments.out / "dashboard.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for part in arguments.parts.split(","):
        found[part] = PARTS[part](arguments.work) | {"measured": measured()}
        print(part, json.dumps(found[part], indent=1), flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        write_table(found, file.with_suffix(".md"))


if __name__ == "__main__":
    main()
