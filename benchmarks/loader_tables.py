"""loaders.json as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

NAMES = {
    "shardyard": "**Shardyard**",
    "torch_memmap": "memmap + DataLoader",
    "torch_memmap_batched": "memmap, one index a batch (hand-written)",
    "lit_data": "litdata",
    "mosaicml": "MosaicML streaming",
    "hf_datasets": "HF datasets (map)",
    "web_dataset": "webdataset",
    "ray_data": "Ray Data",
    "google_grain": "grain",
    "copy_ceiling": "sequential copy (ceiling)",
}
OURS, CEILING, BY_HAND = "shardyard", "copy_ceiling", "torch_memmap_batched"
BARS = {"a": (2.0, 0.65), "b": (2.0, 0.25), "c": (2.0, 0.55), "d": (1.3, 0.60)}
CASES = {
    "a": "8 x 2,048 uint16 tokens",
    "b": "8 x 2,048 packed documents, boundaries",
    "c": "256 images 3x32x32",
    "d": "64 blobs of 20 KB",
}


def tables(results: dict[str, Any]) -> str:
    parts = [heading(results["facts"])]
    for name, function in (
        ("throughput", throughput),
        ("throughput", waiting),
        ("start", starting),
        ("seek", seeking),
        ("throughput", order_and_disk),
        ("elastic", elastic),
        ("text", text),
    ):
        if name in results:
            parts.append(function(results[name]))
    parts.append(chosen(results["facts"]))
    return "\n\n".join(parts) + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(header), *(list(row) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def heading(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    warning = "\n\n**A quick run to see whether all works: its figures mean nothing.**" if facts["quick"] else ""
    return (
        f"# Loaders{warning}\n\n{facts['date']}, commit {facts['commit']}, {facts['cpus']} CPU cores "
        f"({facts['machine']}), load average before: {facts['load_average_before']:.1f}. {versions}.\n\n"
        "Random data, shuffled, page cache warm, no loader worker processes (Ray Data cannot do without); each loader "
        "in a process of its own, measured in turn, in another order each time (Ray Data after them); medians of "
        f"{facts['repeats']} repeats. `python benchmarks/loaders.py`; every single measurement is in loaders.json."
    )


def throughput(results: dict[str, Any]) -> str:
    medians = {
        key: {name: statistics.median(rates) for name, rates in result["mb_per_s"].items()}
        for key, result in results.items()
    }
    names = [name for name in NAMES if any(name in case for case in medians.values())]
    rows = [
        [NAMES[name], *(f"{case[name]:,.0f}" if name in case else "-" for case in medians.values())] for name in names
    ]
    ratios: dict[str, list[str]] = {
        "over the best loader": [],
        "... bar": [],
        "over memmap, one index a batch": [],
        "share of the ceiling": [],
        "... aim": [],
    }
    for key, case in medians.items():
        others = [rate for name, rate in case.items() if name not in (OURS, CEILING, BY_HAND)]
        ours, (bar, aim) = case.get(OURS), BARS[key]
        values = [None, bar, None, None, aim]
        if ours is not None:
            values[0] = ours / max(others) if others else None
            values[2] = ours / case[BY_HAND] if BY_HAND in case else None
            values[3] = ours / case[CEILING] if CEILING in case else None
        for cells, value, percent in zip(ratios.values(), values, (False, False, False, True, True), strict=True):
            cells.append("-" if value is None else f"{value:.0%}" if percent else f"{value:.2f}x")
    rows += [[name, *cells] for name, cells in ratios.items()]
    legend = "; ".join(f"{key}: {CASES[key]}" for key in medians)
    return f"## MB/s\n\n{legend}.\n\n" + table(["", *medians], rows)


def waiting(results: dict[str, Any]) -> str:
    names = [name for name in NAMES if any(name in case["waits_s"] for case in results.values())]
    rows = [
        [
            NAMES[name],
            *(
                f"{figures['mean'] * 1e3:.3f} / {figures['p99'] * 1e3:.3f}"
                if (figures := case["waits_s"].get(name))
                else "-"
                for case in results.values()
            ),
        ]
        for name in names
    ]
    return (
        "## Wait of a step for its data, ms: mean / p99\n\nThe consumer computes for 2.5 ms (matrix products on one "
        "core). Bar: 0.05 / 0.25.\n\n" + table(["", *results], rows)
    )


def starting(results: dict[str, Any]) -> str:
    bare = results["bare_mib"]["rss"]
    rows = []
    for name in NAMES:
        if name in results["memory_mib"]:
            memory = results["memory_mib"][name]
            times = [results[kind].get(name) for kind in ("first_s", "resume_s")]
            children = f" + {memory['children']:.0f} in other processes" if memory["children"] > 1 else ""
            rows.append(
                [
                    NAMES[name],
                    *("-" if not seconds else f"{statistics.median(seconds) * 1e3:,.1f}" for seconds in times),
                    f"{memory['rss'] - bare:.0f}{children}",
                ]
            )
    return (
        f"## Start, resume, memory\n\nCase a, {results['raw_bytes'] / 1e6:.0f} MB: ms from nothing but imports to the "
        "first batch of a new process, and of one that resumes in the middle of an epoch (bar: 20); MiB of memory over "
        f"a bare torch process ({bare:.0f} MiB) while it loads, mapped pages of the data not counted (bar: 50).\n\n"
        + table(["", "first batch, ms", "resume at 50 %, ms", "memory, MiB"], rows)
    )


def seeking(results: dict[str, Any]) -> str:
    rows = [
        [NAMES[name], f"{one['examples']:,}", f"{statistics.median(one['seconds']) * 1e3:,.2f}"]
        for name, one in results.items()
    ]
    return "## An order, and a place in its middle\n\nBar: 5 ms at 10^9 examples.\n\n" + table(
        ["", "examples", "ms"], rows
    )


def order_and_disk(results: dict[str, Any]) -> str:
    rows = []
    for name in NAMES:
        near = results.get("a", {}).get("neighbours", {}).get(name)
        disk = [case["disk"].get(name) for case in results.values()]
        if near is not None or any(disk):
            rows.append(
                [
                    NAMES[name],
                    "-" if near is None else f"{near:.3f}",
                    *("-" if not one else f"{one:.3f}" for one in disk),
                ]
            )
    return (
        "## Order and disk\n\nShare of examples that follow one of the same twelfth of the data (ideal 0.083, bar "
        "0.10; case a); bytes on disk over raw bytes (bar 1.01 for tokens).\n\n"
        + table(["", "same twelfth", *(f"disk {key}" for key in results)], rows)
    )


def elastic(results: dict[str, Any]) -> str:
    rows = []
    for name in NAMES:
        if isinstance(one := results.get(name), dict):
            if "refused" in one:
                rows.append([NAMES[name], "-", "-", "-", one["refused"].replace("|", "/")[:120]])
                continue
            same = f"{one['same_steps']} of {one['steps_after']}"
            rows.append([NAMES[name], str(one["missing"]), str(one["duplicated"]), same, f"{one['taken']:,} taken"])
    rows.append([NAMES["ray_data"], "-", "-", "-", "no state: the epoch begins anew, so what was taken comes twice"])
    return (
        f"## Interrupted at 37 % with 2 ranks, resumed with 3\n\nOne epoch of {results['examples']:,} examples, global "
        "batch 12, each loader resumed as it documents, from what rank 0 saved. The last but one column: steps after "
        "the interruption whose global batch holds the same examples as in a run that nothing disturbed.\n\n"
        + table(["", "missing", "duplicated", "same global batch", ""], rows)
    )


def text(results: dict[str, Any]) -> str:
    megabytes = results["text_bytes"] / 1e6
    rows = [
        [
            kind,
            f"{run['seconds']:.1f}",
            f"{megabytes / run['seconds']:.2f}",
            f"{run['ray_start_s']:.1f}" if run.get("ray_start_s") else "-",
            f"{run['disk_over_tokens']:.4f}" if "disk_over_tokens" in run else "-",
        ]
        for kind, run in results["runs"].items()
    ]
    runs = results["runs"]
    scaling = runs["shardyard-1"]["seconds"] / runs["shardyard-2"]["seconds"]
    return (
        f"## Text to tokens\n\n{megabytes:.0f} MB of Python sources as JSON lines, BPE of {results['vocab_size']:,}; "
        f"from 1 to 2 Ray workers: {scaling:.2f}x.\n\n"
        + table(
            ["", "seconds", "MB/s of text", "Ray's start apart, s", "disk (but tokenizer.json) over raw tokens"], rows
        )
    )


def chosen(facts: dict[str, Any]) -> str:
    rows = [[NAMES[name], text] for name, text in facts["settings"].items()]
    return "## What each is set to\n\n" + table(["", ""], rows)
