"""`make demo`: train a small GPT on this machine's Python standard library and say how well it compresses.

Bits per byte is -sum log2 p over every token of every held-out file, divided by all their bytes; gzip and xz compress
the same files, one by one, so the three numbers answer the same question.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from configs.errors import ShardyardError

RECIPE = "language_modeling-gpt-tiny"


def main() -> int:
    """Train the demo's recipe and print its result; returns the exit code of `shardyard train`."""
    from cluster.launch import train
    from cluster.mlflow_copy import ui_command
    from data_pipelines.inspect import compressed_bits_per_byte

    started = time.monotonic()
    # A demo shows a run from its beginning each time it is called, so each call is a run of its own.
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    try:
        run = train(RECIPE, [f"name={name}"])
        run.wait()
    except ShardyardError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    last = run.metrics()[-1]
    baseline = compressed_bits_per_byte(run.datasets()[0], "validation")
    print(f"\nHeld out: {baseline['documents']:,} files, {baseline['bytes']:,} bytes. Bits per byte, less is better:\n")
    rows = [
        ("gzip -9", baseline["gzip"]),
        ("xz -9", baseline["xz"]),
        (f"this model, {time.monotonic() - started:.0f} s", last["validation/bits_per_byte"]),
    ]
    for label, value in rows:
        print(f"  {label:<24}{value:6.3f}  {'#' * round(value * 20)}")
    print(f"\nA sample of what it writes now:\n\n{run.sample()}\n")
    print(f"Checkpoint:      {run.checkpoint()}")
    print(f"Write more:      {Path(sys.executable).parent / 'shardyard'} generate {name} --prompt 'def '")
    print(f"The experiment:  {ui_command(run.record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
