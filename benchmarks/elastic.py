"""An epoch that two ranks begin, that is interrupted at 37 % and that three ranks end: what is missing, what
came twice, and whether the steps after the interruption are those of a run that nothing disturbed.

Every loader resumes as its documentation says, from what rank 0 saved; each rank is a process with torch.distributed.
"""

from __future__ import annotations

import contextlib
import socket
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from peer_process import PeerFailed

if TYPE_CHECKING:
    from loaders import Bench

NUM_EXAMPLES = 5_003
GLOBAL_BATCH = 12
TIMEOUT_S = 90.0
NO_RANKS = ("torch_memmap_batched", "ray_data")  # as torch_memmap; Ray Data: no state, and no shards by rank


def measure_elastic(bench: Bench) -> dict[str, Any]:
    num_examples = 1_003 if bench.quick else NUM_EXAMPLES
    steps = int(0.37 * num_examples / GLOBAL_BATCH)
    results: dict[str, Any] = {}
    names = [name for name in bench.loaders if name not in NO_RANKS]
    with bench.case("a", names, num_examples=num_examples) as (case, sizes):
        for name in sizes:
            try:
                undisturbed, _ = _ranks(bench, name, case, 2, None, None)
                before, state = _ranks(bench, name, case, 2, steps, None)
                after, _ = _ranks(bench, name, case, 3, None, state)
            except PeerFailed as error:
                results[name] = {"refused": str(error)}
                bench.note(f"{name}: {error}")
                continue
            seen = np.bincount(np.concatenate([*before, *after]).astype(np.int64), minlength=num_examples)
            results[name] = {
                "missing": int((seen == 0).sum()),
                "duplicated": int((seen - 1).clip(0).sum()),
                "taken": sum(map(len, before)) + sum(map(len, after)),
                "steps_after": len(undisturbed) - steps,
                "same_steps": sum(a == b for a, b in zip(after, undisturbed[steps:], strict=False)),
            }
            bench.note(f"{name}: {results[name]}")
    results["examples"] = num_examples
    return {"elastic": results}


def _ranks(
    bench: Bench, name: str, case: Any, world_size: int, steps: int | None, state: Any
) -> tuple[list[list[int]], Any]:
    """The examples of each step, of all ranks, sorted; and what rank 0 saved."""
    port = _free_port()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(bench.process(name)) for _ in range(world_size)]
        for rank, process in enumerate(processes):
            folder = str(bench.stored(case, name))
            process.send("rank", case, folder, rank, world_size, port, GLOBAL_BATCH // world_size, steps, state)
        answers = [process.receive(TIMEOUT_S) for process in processes]
    every_step = zip_longest(*(ids for ids, _ in answers), fillvalue=[])
    return [sorted(chain.from_iterable(parts)) for parts in every_step], answers[0][1]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
