"""What the heap holds beside tensors, against processes that really do it: DeepSpeed at stage 3, and oneDNN."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import dump, load
from tests.tiny import tiny_config
from trainer import memory
from trainer.malloc import Heap
from trainer.memory import predict_memory
from trainer.storages import Storages
from trainer.validate import validate

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 38),
    reason="malloc as in glibc before 2.38",
)

# The heaps of all threads and what is mapped, in bytes, that making an engine adds.
MADE = """
import ctypes, json, sys
import torch
from configs.load import load_resolved
from trainer.distributed import init_world
from trainer.validate import validate

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

c = ctypes.CDLL(None)
c.mallinfo2.restype = Mallinfo
def held():
    found = c.mallinfo2()
    return found.arena + found.hblkhd

plan = validate(load_resolved(open(sys.argv[1]).read()), sees_inputs=False)
world = init_world(0, 1, 0, "tcp://127.0.0.1:0", use_gpu=False, threads=1, timeout_s=60)
from trainer.engine import Engine, _import_deepspeed
_import_deepspeed()
before = held()
engine = Engine(plan.model, plan.config, world)
print(json.dumps(held() - before))
"""


def _run(program: str, *arguments: str, **variables: str) -> Any:
    command = [sys.executable, "-c", program, *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_making_an_engine_at_stage_3_takes_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more than its tensors: pieces that cannot be given back, gathers, and copies in gloo's threads."""
    model = {"name": "gpt", "num_layers": 4, "hidden_size": 384, "num_heads": 6}
    resolved = load(tiny_config(tmp_path, model=model, zero={"stage": 3}))
    (tmp_path / "config.yaml").write_text(dump(resolved))
    made = _run(MADE, str(tmp_path / "config.yaml"))

    told: list[int] = []

    class Step(memory._Step):
        def __init__(self, storages: Storages, *arguments: Any, **settings: Any) -> None:
            super().__init__(storages, *arguments, **settings)
            assert storages._heap is not None
            told.append(storages._heap.resident)

    monkeypatch.setattr(memory, "_Step", Step)
    plan = validate(resolved, sees_inputs=False)
    predict_memory(plan.model, plan.task, plan.config, 1, on_gpu=False)
    assert told == [pytest.approx(made, rel=0.13)]  # gloo's threads share the copies as they come


# What a convolution takes at most beside its results, forward and backward, in bytes.
CONVOLVED = """
import json, sys
import torch
def now(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))
def most(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = now("VmRSS")
    result = work()
    return now("VmHWM") - before, result
inputs, outputs, kernel, stride, size = json.loads(sys.argv[1])
torch.set_num_threads(1)
x = torch.randn(256, inputs, size, size, requires_grad=True)
weight = torch.randn(outputs, inputs, kernel, kernel, requires_grad=True)
for _ in range(2):  # the first time kernels are made
    forward, y = most(lambda: torch.nn.functional.conv2d(x, weight, padding=kernel // 2, stride=stride))
    gradient = torch.ones_like(y)
    backward, results = most(lambda: torch.autograd.grad(y, (x, weight), gradient))
    made = y.nbytes, sum(each.nbytes for each in results)
    del y, results
print(json.dumps([forward - made[0], backward - made[1]]))
"""


@pytest.mark.parametrize("shape", [(64, 64, 3, 1, 16), (64, 128, 3, 1, 16), (128, 64, 3, 1, 16), (64, 128, 1, 2, 32)])
def test_a_convolution_takes_as_much_for_a_moment(shape: tuple[int, ...]) -> None:
    real = _run(CONVOLVED, json.dumps(shape), MALLOC_MMAP_THRESHOLD_="65536")
    taken: list[int] = []

    class Noted(Storages):
        def for_a_moment(self, size: int) -> None:
            taken.append(size)

    inputs, outputs, kernel, stride, size = shape
    storages = Noted(one_memory=True, follow_malloc=True)
    x = torch.randn(256, inputs, size, size, requires_grad=True)
    weight = torch.randn(outputs, inputs, kernel, kernel, requires_grad=True)
    with storages, memory._OneDnn(storages):
        torch.nn.functional.conv2d(x, weight, padding=kernel // 2, stride=stride).sum().backward()
    assert taken == pytest.approx(real, rel=0.1)


def test_threads_of_a_process_share_its_thresholds() -> None:
    """malloc's are of the process: what one thread frees decides what the others map."""
    main = Heap()
    thread = Heap(process=main)
    mapped = main.tensor(8 * MIB)
    main.free(mapped)
    assert main.resident == 0
    thread.free(thread.tensor(4 * MIB))  # below the threshold of now: it has grown the heap, and its end is kept
    assert thread.resident >= 4 * MIB
    assert main.resident == 0
