"""The same for others' checkpoints: two ranks that save steps 1 to 3, as their documentation shows it, and the load.

DeepSpeed: ZeRO-2, save_checkpoint with its `latest` file, load_checkpoint on two ranks. torch.distributed.checkpoint
(DCP): a folder a step, save; the folder with the highest step is loaded.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.crash.outcomes import Loaded, state_digest
from tests.distributed.test_checkpoint import Cell, make_engine, train

_PEER_WITHIN_S = 3.0  # for the other rank's word; it may be caught in a collective


# --- DeepSpeed


def deepspeed_save(world: Any, folder: Path, mark: Callable[[str, str], None]) -> None:
    engine = make_engine(world, Cell(2))
    for step in (1, 2, 3):
        train(engine, range(step, step + 1))
        expected = "+".join(_gathered(world, deepspeed_digest(engine)))
        mark("begun", expected)
        engine.deepspeed.save_checkpoint(str(folder), tag=f"global_step{step}")
        mark("saved", expected)


def deepspeed_digest(engine: Any) -> str:
    """Of what this rank holds: weights, its part of the masters and of the optimizer's state."""
    zero = engine.deepspeed.optimizer
    tensors = {f"weights/{name}": value for name, value in engine.module.state_dict().items()}
    for number, flat in enumerate(zero.single_partition_of_fp32_groups):
        tensors[f"master/{number}"] = flat
        state = zero.optimizer.state[flat]
        tensors |= {f"{kind}/{number}": state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}
    return state_digest(engine.deepspeed.global_steps, tensors)


def deepspeed_loads(world: Any, folders: list[str], results: str) -> None:
    """Load each folder; every rank appends {"found", "error"} to results/RANK. Ends early where the ranks part."""
    engine = make_engine(world, Cell(2), seed=1)
    train(engine, range(1))
    for number, folder in enumerate(folders):
        try:
            path, _ = engine.deepspeed.load_checkpoint(folder)
            outcome = {"found": None if path is None else deepspeed_digest(engine), "error": None}
        except Exception as error:
            outcome = {"found": None, "error": f"{type(error).__name__}: {error}"}
        Path(results, f"{number}-{world.rank}.tmp").write_text(json.dumps(outcome))
        os.rename(Path(results, f"{number}-{world.rank}.tmp"), Path(results, f"{number}-{world.rank}.json"))
        deadline = time.monotonic() + _PEER_WITHIN_S
        while not Path(results, f"{number}-{1 - world.rank}.json").exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the other rank hangs")
            time.sleep(0.002)


# --- torch DCP


def dcp_save(world: Any, folder: Path, mark: Callable[[str, str], None]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.size,))
    for step in (1, 2, 3):
        full = _dcp_state(step)
        expected = state_digest(step, full)
        mark("begun", expected)
        state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in full.items()}
        dcp.save({**state, "step": step}, checkpoint_id=folder / f"step-{step}")
        mark("saved", expected)


def _dcp_state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = {"embed": (14, 7), "inner": (8, 7), "norm": (8,)}
    return {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        for kind in ("model", "exp_avg", "exp_avg_sq")
    }


def dcp_load(folder: Path) -> Loaded:
    import torch.distributed.checkpoint as dcp

    steps = [path.name for path in folder.iterdir() if path.name.startswith("step-")]
    if not steps:
        return Loaded(None)
    state: dict[str, Any] = {name: torch.zeros_like(value) for name, value in _dcp_state(0).items()}
    state["step"] = 0
    try:
        dcp.load(state, checkpoint_id=folder / max(steps), no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # which is no Exception
        return Loaded(None, error=f"{type(error).__name__}: {error}")
    return Loaded(state_digest(state.pop("step"), state))


def _gathered(world: Any, text: str) -> list[str]:
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, text)
    return found
