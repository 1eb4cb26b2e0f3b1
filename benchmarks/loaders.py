"""This project's loader beside its peers, in one call: each in a process of its own, measured in turn, again and again.

    python benchmarks/loaders.py [--parts ...] [--cases abcd] [--peers ...] [--repeats 5] [--megabytes 48]
        [--out benchmarks/results]

Needs the peers (benchmarks/peers/requirements.txt says how to install them). Data is random and lies in a temporary
folder; the page cache is warm. Each part writes its results into <out>/loaders.json at its end, next to what is there
from other parts, and the tables of loaders.md anew.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from elastic import measure_elastic
from loader_tables import tables
from peer_process import ROOT, PeerFailed, PeerProcess
from peers.cases import Case, make_case
from provenance import commit
from text_build import measure_text

OURS, CEILING = "shardyard", "copy_ceiling"
PEERS = (
    "torch_memmap",
    "torch_memmap_batched",
    "lit_data",
    "mosaicml",
    "hf_datasets",
    "web_dataset",
    "ray_data",
    "google_grain",
)
PACKAGES = ("torch", "mosaicml-streaming", "litdata", "datasets", "webdataset", "ray", "grain", "pyarrow", "numpy")
ALONE = ("ray_data",)
COMPUTE_S = 0.0025
MOST = {"ray_data": 2}  # repeats, since an epoch of it takes seconds to begin


class Bench:
    """Where things lie, and what was asked for."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.peers: list[str] = arguments.peers
        self.loaders = [OURS, *self.peers]
        self.cases: str = arguments.cases
        self.repeats: int = arguments.repeats
        self.num_bytes: int = arguments.megabytes << 20
        self.quick: bool = arguments.quick

    def note(self, line: str) -> None:
        note(line)

    def process(self, name: str) -> PeerProcess:
        return PeerProcess(name, self.folder / f"{name}.log")

    def stored(self, case: Case, name: str) -> Path:
        return self.folder / f"{case.key}-{name}"

    @contextlib.contextmanager
    def case(self, key: str, loaders: list[str], **size: int) -> Iterator[tuple[Case, dict[str, int]]]:
        """A case's data in the format of every loader, and its bytes on disk; removed at the end."""
        case = make_case(key, self.folder / f"{key}-raw", **(size or {"num_bytes": self.num_bytes}))
        sizes = {}
        try:
            for name in loaders:
                if key == "b" and name == "ray_data":
                    continue
                try:
                    with self.process(name) as process:
                        sizes[name] = process.call("write", case, str(self.stored(case, name)))
                except PeerFailed as error:
                    note(f"{name} cannot write {key}: {error}")
            yield case, sizes
        finally:
            for path in self.folder.glob(f"{key}-*"):
                shutil.rmtree(path, ignore_errors=True)


def note(line: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)


def in_turn(names: list[str], repeats: int, measure: Callable[[str], Any]) -> dict[str, list[Any]]:
    """`repeats` rounds over the names, each in another order; a name that fails once is left out from then on."""
    results: dict[str, list[Any]] = {name: [] for name in names}
    shuffler = random.Random(0)
    for _ in range(repeats):
        for name in shuffler.sample(names, len(names)):
            if name not in results or len(results[name]) >= MOST.get(name, repeats):
                continue
            try:
                results[name].append(measure(name))
            except PeerFailed as error:
                note(f"{name}: {error}")
                del results[name]
    return results


def measure_throughput(bench: Bench) -> dict[str, Any]:
    """MB/s of each case, disk bytes over raw bytes, the wait of a step for its data, and what the order is like."""
    seconds, steps = (0.1, 20) if bench.quick else (0.5, 200)
    results: dict[str, Any] = {}
    for key in bench.cases:
        with bench.case(key, [*bench.loaders]) as (case, sizes):
            count = min(case.num_batches, 300)
            rates, waits, neighbours = {}, {}, {}
            there = [name for name in [CEILING, *bench.loaders] if name == CEILING or name in sizes]
            # Ray Data's processes would take the cores from the others while these are measured.
            for together in ([name for name in there if name not in ALONE], [name for name in there if name in ALONE]):
                with contextlib.ExitStack() as stack:
                    processes = {name: stack.enter_context(bench.process(name)) for name in together}

                    def ask(*call: Any, processes: Any = processes) -> Callable[[str], Any]:
                        return lambda loader: processes[loader].call(*call)

                    def start(loader: str, processes: Any = processes, case: Case = case) -> Any:
                        return processes[loader].call("open", case, str(bench.stored(case, loader)))

                    names = list(in_turn(together, 1, start))
                    rates |= in_turn(names, bench.repeats, ask("throughput", seconds))
                    others = [name for name in names if name in rates and name != CEILING]
                    waits |= in_turn(others, max(1, bench.repeats // 2), ask("waits", steps, COMPUTE_S))
                    neighbours |= in_turn(others, 1, ask("neighbours", count)) if key == "a" else {}
            results[key] = {
                "mb_per_s": rates,
                "waits_s": {name: wait_figures(runs) for name, runs in waits.items()},
                "neighbours": {name: value[0] for name, value in neighbours.items() if value},
                "disk": {name: size / case.raw_bytes for name, size in sizes.items() if not name.startswith("torch")},
                "batch_bytes": case.batch_bytes,
                "raw_bytes": case.raw_bytes,
            }
            note(key + ": " + ", ".join(f"{n} {statistics.median(r):.0f}" for n, r in rates.items()) + " MB/s")
    return {"throughput": results}


def wait_figures(runs: list[list[float]]) -> dict[str, float]:
    """Mean and 99th percentile over a steady run: the median of the repeats."""
    return {
        "mean": statistics.median(statistics.fmean(run) for run in runs),
        "p99": statistics.median(statistics.quantiles(run, n=100)[98] for run in runs),
    }


def measure_start(bench: Bench) -> dict[str, Any]:
    """Seconds to the first batch and to the first batch of a run resumed in the middle of an epoch; memory.

    Each time in a new process that has imported its modules.
    """
    results: dict[str, Any] = {}
    with bench.case("a", bench.loaders) as (case, sizes):
        with bench.process("bare") as process:
            results["bare_mib"] = process.call("memory", str(bench.folder))
        states: dict[str, Any] = {}
        memory: dict[str, Any] = {}
        for name in sizes:
            with contextlib.suppress(PeerFailed), bench.process(name) as process:
                process.call("open", case, str(bench.stored(case, name)))
                states[name] = process.call("half_an_epoch")
                process.call("throughput", 0.2)
                memory[name] = process.call("memory", str(bench.folder))

        def opened(state: Callable[[str], Any]) -> dict[str, list[float]]:
            def once(name: str) -> float:
                with bench.process(name) as process:
                    return float(process.call("open", case, str(bench.stored(case, name)), state(name)))

            return in_turn(list(states), 1 if bench.quick else 3, once)

        results.update(
            first_s=opened(lambda _: None),
            resume_s=opened(states.__getitem__),
            memory_mib=memory,
            raw_bytes=case.raw_bytes,
        )
    return {"start": results}


def measure_seek(bench: Bench) -> dict[str, Any]:
    """Seconds to make an order of so many examples and be in its middle."""
    sizes = {OURS: 10**9, "google_grain": 10**9, "torch_memmap": 2 * 10**7, "mosaicml": 2 * 10**7}
    if bench.quick:
        sizes = {name: size // 100 for name, size in sizes.items()}
    results = {}
    for name, size in sizes.items():
        if name in bench.loaders:
            with contextlib.suppress(PeerFailed), bench.process(name) as process:
                process.call("seek", 1000)  # imports
                times = [process.call("seek", size) for _ in range(3 if size >= 10**8 or bench.quick else 1)]
                results[name] = {"examples": size, "seconds": times}
    return {"seek": results}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "throughput": measure_throughput,
    "start": measure_start,
    "seek": measure_seek,
    "elastic": measure_elastic,
    "text": measure_text,
}


def settings(names: list[str]) -> dict[str, str]:
    """SETTINGS of each module, without importing it (that would import the loader)."""
    import ast

    found = {}
    for name in names:
        tree = ast.parse((ROOT / "benchmarks/peers" / f"{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SETTINGS":
                found[name] = ast.literal_eval(node.value)
    return found


def facts(bench: Bench) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "date": str(datetime.date.today()),
        "commit": commit(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_before": os.getloadavg()[0],
        "versions": {package: version(package) for package in PACKAGES},
        "settings": settings([CEILING, OURS, *PEERS]),
        "repeats": bench.repeats,
        "quick": bench.quick,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--cases", default="abcd", help="of the part throughput: some of abcd")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=128, help="of raw data a case")
    parser.add_argument("--quick", action="store_true", help="only to see whether all runs: the figures mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "loaders.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory(prefix="loaders-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), arguments)
        results["facts"] = facts(bench)
        for part in arguments.parts:
            note(part)
            for name, found in PARTS[part](bench).items():
                merged = {**results.get(name, {}), **found} if name == "throughput" else found
                results[name] = dict(sorted(merged.items())) if name == "throughput" else found
            path.write_text(json.dumps(results, indent=1) + "\n")
            (arguments.out / "loaders.md").write_text(tables(results))
    print((arguments.out / "loaders.md").read_text())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    assert import_module("peers")
    main()
