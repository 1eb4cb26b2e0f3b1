"""Every model at every ZeRO stage, precision and world size beside a plain PyTorch loop: docs/parity.md.

    python benchmarks/parity_grid.py [--models ...] [--out docs/parity.md]

A cell trains 20 steps on made-up rows (tests/distributed/zoo.py) and shows the largest difference of a loss from the
loop's. A cell that the product refuses shows why, and a cell out of its bound makes the script fail.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the workers

from pydantic import ValidationError  # noqa: E402

from benchmarks.provenance import commit  # noqa: E402
from tests.distributed.zoo import BOUNDS, STEPS, TASKS, Cell, difference, engine_losses  # noqa: E402
from tests.pool import WorkerFailed, run_workers  # noqa: E402

STAGES, PRECISIONS, WORLD_SIZES = (0, 1, 2, 3), ("fp32", "bf16", "fp16"), (1, 2)


def main() -> int:
    """Fill the table; 1 where a cell is out of its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md")
    arguments = parser.parse_args()
    columns = list(itertools.product(PRECISIONS, STAGES))
    reasons: dict[str, int] = {}
    lines, wrong, compared = [], [], 0
    for model, world_size in itertools.product(arguments.models, WORLD_SIZES):
        shown = []
        for precision, stage in columns:
            cell = Cell(model, stage, precision, world_size)
            found = measured(cell)
            if isinstance(found, str):
                number = reasons.setdefault(found, len(reasons) + 1)
                shown.append(f"refused ({number})")
                continue
            compared += 1
            within = found <= BOUNDS[precision]
            shown.append(f"{found:.0e}" if within else f"**{found:.0e}**")
            if not within:
                wrong.append(cell)
        lines.append(f"| {model} | {world_size} | " + " | ".join(shown) + " |")
        print(lines[-1], flush=True)
    arguments.out.write_text(page(columns, lines, reasons, compared, len(wrong)))
    for cell in wrong:
        print(f"out of bound: {cell}", file=sys.stderr)
    return 1 if wrong else 0


def measured(cell: Cell) -> float | str:
    """The cell's difference, or why the product refuses it."""
    try:
        cell.config()
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    try:
        return difference(cell, *run_workers(engine_losses, cell.world_size, cell)[0])
    except WorkerFailed as error:
        refused = re.findall(r"UsageError: (.*)", str(error))
        if not refused:
            raise
        return refused[-1]


def page(columns: list[tuple[str, int]], lines: list[str], reasons: dict[str, int], compared: int, wrong: int) -> str:
    """docs/parity.md."""
    bounds = ", ".join(f"{precision} {bound:g}" for precision, bound in BOUNDS.items())
    return "\n".join(
        [
            "# Sharded alike",
            "",
            f"`{' '.join(['python benchmarks/parity_grid.py', *sys.argv[1:]])}`, {datetime.date.today()},",
            f"commit {commit()}, on a CPU. A cell trains",
            f"{STEPS} steps of three micro-batches, once by the engine at that ZeRO stage, precision and number of",
            "workers, once by a plain PyTorch loop in one process: the model in that precision; gradients, optimizer",
            "and masters in fp32; no update where the scaler of fp16 took it back. It shows the largest difference of",
            f"a loss, as a share of the first; the bounds are {bounds}.",
            f"{compared} cells were compared, {wrong} are out of bound.",
            "",
            "| model | workers | " + " | ".join(f"{precision}, stage {stage}" for precision, stage in columns) + " |",
            "|---|---|" + "---|" * len(columns),
            *lines,
            "",
            *(f"({number}) {reason}" + "\n" for reason, number in reasons.items()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
