"""The pictures of the dashboard in docs/images: pages over a store that is made up here, in Chromium.

    make screenshots

Nothing is trained: the runs are written as a run writes itself, and a target's answer is a stand-in.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import uvicorn
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cluster.dashboard import resources  # noqa: E402
from cluster.dashboard.app import create_app  # noqa: E402
from cluster.dashboard.store_view import StoreView  # noqa: E402
from cluster.sweep_folder import Spec, SweepFolder  # noqa: E402
from configs.load import load  # noqa: E402
from data_pipelines.storage import Store  # noqa: E402
from tests.cluster.dashboard.browser import CHROMIUM, QUIET, until  # noqa: E402
from tests.cluster.dashboard.stores import RECIPE, clock, create  # noqa: E402
from trainer.record import RunRecord  # noqa: E402

IMAGES = ROOT / "docs" / "images"
LARGEST = 250_000  # bytes, of a picture
STEP_S, SLOW_STEP_S = 0.8, 0.92
WAIT_S = 300.0  # of an attempt, until its first step
MAIN, SLOW_RANK = "gpt-1b-web", 5
HOURS = 3600.0
NODES = ("gpu-1", "gpu-2")
PLACES = [{"node": node, "gpus": [str(gpu)]} for node in NODES for gpu in range(4)]
WORKERS = ("resources.workers=8", "batch.global_batch_size=64", "batch.micro_batch_size=8")


class Shot(NamedTuple):
    """A picture: its name, the page, and what is true in it once it is complete."""

    name: str
    path: str
    ready: str
    scheme: Literal["light", "dark"] = "light"
    size: tuple[int, int] = (1280, 800)


CHARTS = "[...document.querySelectorAll('#curves .chart')].slice(0, 6).every((chart) => chart.chart?.plot)"
SHOTS = [
    Shot("overview", "/", "document.querySelectorAll('.sparkline').length >= 8"),
    Shot("run", f"/runs/{MAIN}#curves?smooth=100", CHARTS),
    Shot("run-dark", f"/runs/{MAIN}#curves?smooth=100", CHARTS, "dark"),
    Shot(
        "speed", f"/runs/{MAIN}#speed?from=11000&to=13500", "document.querySelector('#speed .uplot')", size=(1280, 1000)
    ),
    Shot("timeline", f"/runs/{MAIN}#timeline", "document.querySelector('#timeline svg rect')"),
    Shot(
        "compare",
        "/compare?runs=gpt-1b-lr-3e-4,gpt-1b-lr-1e-3,gpt-1b-lr-3e-3",
        "document.querySelector('#chart canvas')",
    ),
    Shot("cluster", "/cluster", "document.querySelector('[data-key=gpu-1]')"),
    Shot("sweep", "/sweeps/width-and-rate", "document.querySelector('#lines polyline.best')"),
]


# --- the store


def write_store(store: Path) -> RunRecord:
    """Runs of all kinds; the one that is at work."""
    now = time.time()
    write_sweep(store, now - 40 * HOURS)
    for number, (lr, floor, speed) in enumerate([("3e-4", 2.52, 6.0), ("1e-3", 2.31, 8.0), ("3e-3", 2.44, 7.0)]):
        with written(store, f"gpt-1b-lr-{lr}", now - (12 - 3 * number) * HOURS, f"optimizer.lr={lr}") as (record, told):
            train(record, told, 0, 4000, floor=floor, speed=speed)
            record.event("finished", step=4000)
    with written(store, "bert-base", now - 5 * HOURS) as (record, told):
        train(record, told, 0, 1500, floor=1.9)
        text = "Rank 3 on gpu-1 failed after step 1500: CUDA error: an illegal memory access was encountered"
        record.event("failed", rank=3, node="gpu-1", step=1500, error=text, summary=text, final=True)
    with written(store, "vit-large", now - 2.5 * HOURS) as (record, told):
        train(record, told, 0, 2400, floor=0.8)
        record.event("stopped", step=2400)
    with written(store, "whisper-es", now - 1.5 * HOURS) as (record, told):
        train(record, told, 0, 2000, floor=1.2)
    with clock(now - 300):
        create(store, "gpt-7b-books", "steps=30000", *WORKERS).close()
    return write_main(store)


@contextlib.contextmanager
def written(store: Path, name: str, begun: float, *overrides: str) -> Iterator[tuple[RunRecord, Any]]:
    """A run in its first attempt, and the clock that it goes by."""
    with clock(begun) as told:
        record = create(store, name, "steps=4000", *WORKERS, *overrides)
        begin_attempt(record, told, 0)
        yield record, told
        record.close()


def begin_attempt(record: RunRecord, told: Any, step: int) -> None:
    """Up to its first step."""
    record.next_attempt()
    record.event("queued")
    told.now += 0.6 * WAIT_S
    record.event("placed", workers=PLACES, placed_s=0.6 * WAIT_S)
    told.now += 0.4 * WAIT_S
    record.event("started", step=step, world_size=len(PLACES), parameters=1_100_000_000)


def write_main(store: Path) -> RunRecord:
    """A run that has lost a node, had a spike, and is held up by a rank."""
    lasts_s = 12_600 * STEP_S + 1500 * SLOW_STEP_S + 2 * WAIT_S + 30
    with clock(time.time() - lasts_s) as told:
        record = create(store, MAIN, "steps=20000", *WORKERS)
        told.now += 30  # its data is looked up
        begin_attempt(record, told, 0)
        train(record, told, 0, 10_100)
        text = "Rank 6 on gpu-2 failed after step 10100: its node has not answered for 30 s"
        record.event(
            "failed",
            rank=6,
            node="gpu-2",
            step=10_100,
            error=text,
            summary=text,
            decision="once more, 1 of 3",
            final=False,
        )
        record.event("restarted", step=9500, reason="a node was lost: once more, 1 of 3")
        begin_attempt(record, told, 9500)
        train(record, told, 9500, 13_500, spike_at=12_480, slow_from=12_000)
        record.close()
    return record


def train(
    record: RunRecord,
    told: Any,
    first: int,
    last: int,
    *,
    floor: float = 2.2,
    speed: float = 6.0,
    spike_at: int = -1,
    slow_from: int = 1 << 40,
) -> None:
    """Rows of the steps from one to another, of the training and of its ranks, with a checkpoint every 500."""
    rng = random.Random(record.attempt)
    ranks = [RunRecord.open(record.config.store, record.config.name) for _ in PLACES]
    for rank, (each, place) in enumerate(zip(ranks, PLACES, strict=True)):
        each.attempt = record.attempt
        each.begin_rank(rank, len(PLACES), first, host=place["node"], device=f"cuda:{rank % 4}", local_rank=rank % 4)
    for step in range(first + 1, last + 1):
        is_slow = step > slow_from
        step_s = SLOW_STEP_S if is_slow else STEP_S
        told.now += step_s
        times = {
            "data_wait_s": 0.004 + 0.004 * rng.random() + (0.06 if rng.random() < 0.01 else 0.0),
            "forward_s": 0.21 + 0.01 * rng.random(),
            "backward_s": 0.38 + 0.02 * rng.random(),
            "optimizer_s": 0.06 + 0.005 * rng.random(),
            "checkpoint_s": 0.0,
        }
        times["collective_s"] = step_s - sum(times.values()) - 0.01
        loss = floor + 8.5 * math.exp(-speed * math.sqrt(step / 4000)) + 0.05 * rng.gauss(0, 1)
        values = {
            "loss": 7.9 if step == spike_at else loss,
            "lr": 3e-4 * min(1.0, step / 400) * (0.1 + 0.9 * math.cos(math.pi * min(1.0, step / 20_000) / 2)),
            "grad_norm": 9.5 if step == spike_at else 0.6 + 0.3 * rng.random() + 2 * math.exp(-step / 300),
            "step_s": step_s,
            **times,
            "tokens_per_s": 65_536 / step_s,
            "examples_per_s": 64 / step_s,
            "mfu": 0.36 / step_s,
            "items": 65_536.0,
            "examples": 64.0 * step,
            "memory_bytes": 61e9 + 5e8 * rng.random(),
            "memory_peak_bytes": 68e9,
        }
        record.metrics(step, values)
        if step % 500 == 0:
            record.metrics(step, {"validation/loss": loss + 0.08})
            path = record.store.path(f"checkpoints/step-{step:08d}")
            record.event("checkpoint", step=step, path=path, size_bytes=13_200_000_000, stall_s=0.4, write_s=21.0)
        if step % 20 == 0:
            for rank, each in enumerate(ranks):
                more = times["collective_s"] - 0.01 if is_slow and rank == SLOW_RANK else 0.0
                own = times | {"backward_s": times["backward_s"] + more}
                own["collective_s"] = times["collective_s"] - more + 0.01 * rng.random()
                memory = {"memory_used_bytes": 6.1e10, "memory_peak_bytes": 6.8e10, "memory_free_bytes": 1.7e10}
                each.rank_row(step, {"step_s": step_s, "step_s_max": 1.1 * step_s, **own, **memory})
    for each in ranks:
        each.close()


def write_sweep(store: Path, begun: float) -> None:
    """Some trials of which a rate in the middle does best."""
    rng = random.Random(7)
    base = load(RECIPE, [f"store={store}", "name=base", "steps=400", "tracking.mlflow=null"])
    trials = [
        {
            "optimizer.lr": float(f"{10 ** rng.uniform(-4, -1.5):.2g}"),
            "model.num_layers": rng.choice([2, 4, 6, 8]),
            "optimizer.weight_decay": round(rng.uniform(0, 0.3), 2),
        }
        for _ in range(14)
    ]
    values = ["optimizer.lr=log:1e-4:3e-2", "model.num_layers=2,4,6,8", "optimizer.weight_decay=0:0.3"]
    folder = SweepFolder.create(
        Store(store), "width-and-rate", Spec("random", values, "validation/loss", "min", 0, trials), base
    )
    with clock(begun):
        for number, trial in enumerate(trials, start=1):
            record = folder.create_run(folder.trial(number))
            record.next_attempt()
            record.event("started", step=0, world_size=1)
            off = math.log10(trial["optimizer.lr"]) + 2.7
            for step in range(20, 401, 20):
                loss = 2.2 + 0.5 * off**2 - 0.04 * trial["model.num_layers"] + 4 * math.exp(-step / 80)
                record.metrics(step, {"loss": loss, "step_s": 0.1, "tokens_per_s": 10_240.0})
            record.metrics(400, {"validation/loss": loss + 0.05 * rng.random()})
            record.event("finished", step=400)
            record.close()


def answer(_: str) -> dict[str, Any]:
    """What a target says."""
    now = time.time()
    gib = 1 << 30

    def node(name: str, gpus: int, state: str = "mixed") -> dict[str, Any]:
        used = {"used_cpus": 8 * gpus, "used_gpus": gpus, "used_bytes": 96 * gib * gpus}
        return {"node": name, "state": state, "cpus": 64, "gpus": 4, "memory_bytes": 512 * gib, **used}

    def job(number: int, run: str, state: str, why: str, **more: Any) -> dict[str, Any]:
        facts = {"user": "ada", "priority": 5, "asks": "2 nodes, 4 GPUs each", "position": None, "may_start": None}
        return {"job": str(number), "run": run, "state": state, "why": why, "submitted_at": now - 900, **facts, **more}

    jobs = [
        job(811, MAIN, "running", "", submitted_at=now - 3.2 * HOURS),
        job(815, "gpt-7b-books", "waiting", "2 nodes are asked for, 1 is free", position=1, may_start=now + 2 * HOURS),
        job(816, "ablation-rope", "waiting", "behind gpt-7b-books", position=2, user="grace", priority=3),
    ]
    nodes = [node("gpu-1", 4, "allocated"), node("gpu-2", 4, "allocated"), node("gpu-3", 2), node("gpu-4", 0, "idle")]
    return {"answered_at": now - 2, "jobs": jobs, "nodes": nodes, "error": None}


# --- the pictures


@contextlib.contextmanager
def served(store: Path, cache: Path) -> Iterator[str]:
    """The address of a server over a store."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(StoreView(str(store), cache))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        app.state.hubs.end()
        server.should_exit = True
        thread.join()


def take(address: str, folder: Path) -> None:
    """All of them."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        for shot in SHOTS:
            width, height = shot.size
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=shot.scheme)
            page = context.new_page()
            page.goto(address + shot.path)
            until(page, f"Boolean({shot.ready})")
            page.wait_for_timeout(1500)  # frames, and what moves into its place
            file = folder / f"dashboard-{shot.name}.png"
            page.screenshot(path=file)
            if file.stat().st_size > LARGEST:
                raise SystemExit(
                    f"{file} has {file.stat().st_size:,} bytes, more than {LARGEST:,}: make its view smaller"
                )
            context.close()
        browser.close()


def main() -> None:
    """Write the store, and take the pictures."""
    if CHROMIUM is None:
        raise SystemExit("There is no chromium, which takes the pictures: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="shardyard-") as folder, contextlib.ExitStack() as stack:
        os.chdir(folder)  # where targets.yaml is looked for
        Path("targets.yaml").write_text("hpc: {type: slurm}\n")
        stack.enter_context(mock.patch.object(socket, "gethostname", lambda: NODES[0]))
        stack.enter_context(mock.patch.object(resources, "_question", answer))
        stack.enter_context(mock.patch.object(resources, "_num_gpus", lambda: 4))
        store = Path(folder, "runs")
        record = write_store(store)
        with record.acquire_lease(), served(store, Path(folder, "cache")) as address:
            take(address, IMAGES)


if __name__ == "__main__":
    main()
