"""The loss of a language model's last layer three ways: time, memory, and how far the gradients are from fp64's.

    python benchmarks/linear_cross_entropy.py [--repeats 7] [--dtypes float32 bfloat16] [--device cpu]

torch: F.cross_entropy of F.linear. summed: trainer/parts/cross_entropy.py's of F.linear. linear: its
linear_cross_entropy, which holds no logits. Forward and backward; times taken in turn, medians; memory at its peak in a
process of its own, above what it had before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import provenance  # noqa: E402
from trainer import peak_memory  # noqa: E402
from trainer.parts.cross_entropy import linear_cross_entropy, summed_cross_entropy  # noqa: E402

CASES = {  # rows, width, classes
    "GPT 4M: 1,024 x 224, 4,096 classes": (1024, 224, 4096),
    "GPT-2 124M: 1,024 x 768, 50,304 classes": (1024, 768, 50304),
}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, Loss] = {
    "torch": lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum"),
    "summed": lambda hidden, weight, labels: summed_cross_entropy(F.linear(hidden, weight), labels),
    "linear": lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, None, labels),
}


def inputs(case: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, classes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = 0.02 * torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), labels.to(device)


def run(way: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    hidden.grad = weight.grad = None
    started = time.perf_counter()
    WAYS[way](hidden, weight, labels).backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(way: str, case: str, dtype: torch.dtype, device: torch.device) -> float:
    """In a process of its own."""
    torch.set_num_threads(1)
    given = inputs(case, dtype, device)
    run(way, *inputs(next(iter(CASES)), dtype, device))  # libraries are loaded
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory.begin(device)
    peak_memory.begin(device)
    run(way, *given)
    return peak_memory.peak_bytes(device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = arguments.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core"
    lines = [
        "# The loss of a language model's last layer, with and without its logits",
        "",
        f"{provenance()}, on {machine}. `python benchmarks/linear_cross_entropy.py`. Forward and backward.",
        "",
        "| rows x width, classes | dtype | way | time | of torch's | peak memory | gradients' distance from fp64's |",
        "|---|---|---|---|---|---|---|",
    ]
    found = []
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        exact = tuple(each.double().detach().requires_grad_() for each in inputs(case, torch.float32, device)[:2])
        labels = inputs(case, torch.float32, device)[2]
        F.cross_entropy(F.linear(*exact), labels, reduction="sum").backward()
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            given = inputs(case, dtype, device)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            far = {}
            for turn in range(arguments.repeats + 1):
                for way in WAYS:
                    took = run(way, *given)
                    if turn:
                        times[way].append(took)
                    far[way] = max(
                        float((a.grad.double() - b.grad).norm() / b.grad.norm())
                        for a, b in zip(given[:2], exact, strict=True)
                    )
            for way in WAYS:
                with context.Pool(1) as pool:
                    memory = pool.apply(peak, (way, case, dtype, device))
                ratio = statistics.median(a / b for a, b in zip(times[way], times["torch"], strict=True))
                row = {"case": case, "dtype": str(dtype), "way": way, "s": statistics.median(times[way])}
                found.append(row | {"ratio": ratio, "peak_bytes": memory, "distance": far[way]})
                lines.append(
                    f"| {case} | {str(dtype).removeprefix('torch.')} | {way} | {1000 * row['s']:.0f} ms | {ratio:.2f} "
                    f"| {memory / 1e6:,.0f} MB | {far[way]:.1e} |"
                )
    (arguments.out / "linear_cross_entropy.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "linear_cross_entropy.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
