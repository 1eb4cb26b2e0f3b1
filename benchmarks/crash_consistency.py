"""What is left of the checkpoints of Shardyard, DeepSpeed and torch DCP after a crash at any write call, or damage.

    python benchmarks/crash_consistency.py [--random-subsets 4] [--flips 4] [--out benchmarks/results]

Each system saves with two ranks on this machine, while strace (apt-get install strace) records its system calls. From
the recording come the states that a crash before each call may leave (tests/crash/disk.py says which), and states of
the whole with damage; each system's own loader reads each of its states.
tests/crash/outcomes.py says what counts as what.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.provenance import commit  # noqa: E402
from tests.crash import own_saves, peer_saves  # noqa: E402
from tests.crash.disk import Disk, Files, damaged, write_files  # noqa: E402
from tests.crash.outcomes import OUTCOMES, WRONG, Expected, Loaded, classify, differing_paths  # noqa: E402
from tests.crash.recorder import record  # noqa: E402
from tests.pool import WorkerFailed, run_workers  # noqa: E402

Loader = Callable[[list[Files], Path], list[Loaded]]
_AT_ONCE = 100  # states on the disk at a time


def one_by_one(load: Callable[[Path], Loaded]) -> Loader:
    """A loader of many states from one that loads a folder in this process."""

    def loads(states: list[Files], work: Path) -> list[Loaded]:
        found = []
        for files in states:
            write_files(work / "state", files)
            found.append(load(work / "state"))
            shutil.rmtree(work / "state")
        return found

    return loads


def on_two_ranks(states: list[Files], work: Path) -> list[Loaded]:
    """DeepSpeed's loads, in two processes; new ones where the old ones wait for each other."""
    for number, files in enumerate(states):
        write_files(work / f"state-{number}", files)
    folders = [str(work / f"state-{number}") for number in range(len(states))]
    found: list[Loaded] = []
    while len(found) < len(states):
        results = work / f"results-{len(found)}"
        results.mkdir()
        try:
            run_workers(peer_saves.deepspeed_loads, 2, folders[len(found) :], str(results), timeout_s=600)
        except WorkerFailed:
            pass  # what they reported until then counts
        said = 0
        while reports := [json.loads(path.read_text()) for path in sorted(results.glob(f"{said}-[01].json"))]:
            errors = " ".join(report["error"] for report in reports if report["error"])
            nothing = any(report["found"] is None for report in reports) or len(reports) < 2
            digest = None if nothing else "+".join(report["found"] for report in reports)
            found.append(Loaded(digest, error=errors or (None if len(reports) == 2 else "one rank hangs")))
            said += 1
        if said == 0:
            found.append(Loaded(None, error="both ranks hang or die"))
    return found[: len(states)]


SYSTEMS: dict[str, tuple[Any, Loader]] = {
    "Shardyard": (own_saves.save, one_by_one(own_saves.load)),
    "DeepSpeed": (peer_saves.deepspeed_save, on_two_ranks),
    "torch DCP": (peer_saves.dcp_save, one_by_one(peer_saves.dcp_load)),
}


def main() -> None:
    """Measure all systems and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-subsets", type=int, default=4, help="of the unsynced effects, at each call")
    parser.add_argument("--flips", type=int, default=4, help="flipped bits a file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {
        "date": f"{datetime.date.today()}",
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
        "random_subsets": arguments.random_subsets,
        "flips": arguments.flips,
        "systems": {},
    }
    for name, (save, loads) in SYSTEMS.items():
        with tempfile.TemporaryDirectory(prefix="crash-") as folder:
            work = Path(folder)
            disk = Disk(record(save, 2, work / "recording"))
            results["systems"][name] = measure(disk, loads, work, arguments.random_subsets, arguments.flips)
        print(name, json.dumps(results["systems"][name]), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "crash_consistency.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "crash_consistency.md").write_text(page(results))


def measure(disk: Disk, loads: Loader, work: Path, random_subsets: int, flips: int) -> dict[str, Any]:
    """{"calls", "killed": {outcome: number}, "power cut", "damage": the same, "examples": a state of each}."""
    whole, end = disk.files(), len(disk.calls)
    states = [(each.variant, each.files, each.index) for each in disk.crash_states(random_subsets=random_subsets)]
    killed = [state for state in states if state[0].startswith("killed")]
    power_cut = [state for state in states if not state[0].startswith("killed")]
    damages = [(f"{what}: {path}", files, end) for what, path, files in damaged(whole, "", flips)]
    found: dict[str, Any] = {"calls": sum(call.kind != "mark" for call in disk.calls), "examples": {}}
    for kind, states in (("killed", killed), ("power cut", power_cut), ("damage", damages)):
        counts: Counter[str] = Counter()
        for (what, files, index), loaded in zip(states, in_batches([s[1] for s in states], loads, work), strict=True):
            differing = differing_paths(files, whole) | differing_paths(files, disk.files(index))
            outcome = classify(loaded, Expected.at(disk.calls, index), differing, crash=kind != "damage")
            if outcome == WRONG:  # not what an earlier load left in the process
                (loaded,) = in_batches([files], loads, work)
                outcome = classify(loaded, Expected.at(disk.calls, index), differing, crash=kind != "damage")
            counts[outcome] += 1
            said = (loaded.error or "").strip().rpartition("\n")[2].replace(str(work), "")[:200]
            found["examples"].setdefault(f"{kind}: {outcome}", f"{what}: {said}")
        found[kind] = {outcome: counts[outcome] for outcome in OUTCOMES}
    return found


def in_batches(states: list[Files], loads: Loader, work: Path) -> Iterator[Loaded]:
    for first in range(0, len(states), _AT_ONCE):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            yield from loads(states[first : first + _AT_ONCE], Path(folder))


def page(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# What is left after a crash, or damage",
        "",
        f"{results['date']}, commit {results['commit']}, {versions}; `python benchmarks/crash_consistency.py`.",
        "Two ranks save; the system calls are recorded. *Killed*: the processes stop before any of these calls, and",
        "what they wrote arrives. *Power cut*: what was not synced is lost, torn, zeros, or out of order, in every",
        "case of the model (`tests/crash/disk.py`). *Damage*: in the last state each file with a flipped bit, cut off,",
        "or missing. Each system's own loader is asked for the newest checkpoint. States that are alike count once.",
        "",
    ]
    titles = {
        "killed": "Killed at any call",
        "power cut": "Power cut at any call",
        "damage": "Damage when all is saved",
    }
    for kind, title in titles.items():
        lines += [f"## {title}", "", f"| | states | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 2) + "|"]
        for name, found in results["systems"].items():
            counts = [found[kind][outcome] for outcome in OUTCOMES]
            lines.append(f"| {name} | {sum(counts)} | {' | '.join(map(str, counts))} |")
        lines.append("")
    lines += [
        "*Good*: the newest state that was saved, or a newer whole one; before the first save nothing, and no error.",
        "*Older*: an older one because the newest is damaged; the damage is named. *Named error*: refused, with the",
        "name of what is wrong in its text. *Opaque error*: without it (an unpickling error, a missing key, a hang).",
        "*Lost*: an older one or nothing, though the newest had been saved, or for damage without a word. *Silently",
        "wrong*: a state that was never saved was loaded. An error is a start that fails until somebody looks into it.",
        "",
        "Shardyard's recording has six saves (one fails, one repeats a step, two checkpoints are deleted); the others'",
        "have three. DeepSpeed: ZeRO-2, `latest`, no fsync of its own. DCP has no notion of a newest checkpoint: the",
        "folder with the highest step is loaded, as scripts do; a load that falls back by hand would turn its errors",
        "into older states.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
