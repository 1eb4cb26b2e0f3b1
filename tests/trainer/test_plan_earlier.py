"""The plan's seconds by the record of an earlier run that computed the same, also where records are damaged."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from configs.devices import find_device
from configs.load import load
from data_pipelines.storage import Store
from tests.tiny import tiny_config
from trainer.memory import Dispatched, Memory
from trainer.plan import Estimate
from trainer.record import RunRecord
from trainer.site import Site
from trainer.validate import validate

CPU = Site("cpu", find_device("cpu"), None, 1e10, False)
NO_MEMORY = Memory({}, {}, 0, on_gpu=False, dispatched=Dispatched(0, 0, 0))


def planned(folder: Path, **changes: Any) -> Estimate:
    return Estimate(validate(load(tiny_config(folder, **changes)), sees_inputs=False), CPU, NO_MEMORY)


def recorded(
    folder: Path,
    name: str,
    seconds: list[float],
    *,
    device: str = "cpu",
    finished: bool = True,
    written_at: float | None = None,
    **changes: Any,
) -> Path:
    """A run in the same store, that took these seconds for its steps; its folder."""
    resolved = load(tiny_config(folder, name=name, **changes))
    record = RunRecord.create(Store(resolved.config.store), resolved)
    record.event("planned", device=device)
    for step, step_s in enumerate(seconds, start=1):
        record.metrics(step, {"step_s": step_s, "loss": 1.0})
        record.metrics(step, {"validation/loss": 1.0})
    if finished:
        record.event("finished")
    record.close()
    run = Path(resolved.config.store) / name
    if written_at is not None:
        os.utime(run / "run.yaml", (written_at, written_at))
    return run


def rests_on(found: Estimate, run: str) -> bool:
    return f"measured in run '{run}'" in found.basis


# --- which run it is, and what is taken of it


@pytest.mark.parametrize("seed", range(10))
def test_a_step_takes_the_median_of_an_earlier_runs_steps_but_for_the_first(tmp_path: Path, seed: int) -> None:
    numbers = random.Random(seed)
    seconds = [numbers.uniform(0.001, 9.0) for _ in range(numbers.randrange(3, 12))]
    recorded(tmp_path, "before", seconds)
    found = planned(tmp_path, name="now", steps=77, optimizer={"lr": 0.5}, seed=5)
    assert found.step_s == statistics.median(seconds[1:]) and rests_on(found, "before")
    assert found.describe()["step_s"] == found.step_s and found.total_s == 77 * found.step_s
    assert found.mfu == pytest.approx(found.flops_per_step / found.step_s / CPU.flops)


def test_the_first_step_does_not_count_and_two_are_too_few(tmp_path: Path) -> None:
    recorded(tmp_path, "before", [9.0, 1.0])
    assert planned(tmp_path).step_s == planned(tmp_path).computed_step_s
    recorded(tmp_path, "later", [9.0, 1.0, 3.0])
    assert planned(tmp_path).step_s == 2.0


OTHER: dict[str, dict[str, Any]] = {
    "model": {"model": {"name": "gpt", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "dropout": 0.1}},
    "task": {"task": {"name": "language_modeling", "seq_len": 16, "tokenizer": {"name": "bytes", "vocab_size": 257}}},
    "batch": {"batch": {"global_batch_size": 5, "micro_batch_size": 5}},
    "precision": {"precision": "bf16", "zero": {"stage": 1}},
    "stage": {"zero": {"stage": 2}},
    "determinism": {"determinism": "exact"},
    "workers": {"resources": {"workers": 1}},
    "threads": {"resources": {"workers": 2, "threads": 3}},
    "device": {"device": "h100"},
    "unfinished": {"finished": False},
}


@pytest.mark.parametrize("difference", OTHER)
def test_a_run_that_computes_something_else_or_elsewhere_says_nothing(tmp_path: Path, difference: str) -> None:
    same: dict[str, Any] = {"zero": {"stage": 1}, "resources": {"workers": 2, "threads": 1}}
    recorded(tmp_path, "other", [9.0, 8.0, 7.0], **(same | OTHER[difference]))
    found = planned(tmp_path, **same)
    assert found.step_s == found.computed_step_s and "measured" not in found.basis
    recorded(tmp_path, "same", [9.0, 8.0, 7.0], **same)
    assert rests_on(planned(tmp_path, **same), "same")


@pytest.mark.parametrize("newest", ["a", "b", "c"])
def test_the_newest_run_counts_whatever_its_name(tmp_path: Path, newest: str) -> None:
    for number, name in enumerate("abc"):
        recorded(tmp_path, name, [9.0, 1.0 + number, 1.0 + number], written_at=2e9 if name == newest else 1e9 + number)
    assert rests_on(planned(tmp_path), newest)


# --- damaged records


def _write(file: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda run: (run / file).write_bytes(text.encode() if isinstance(text, str) else text)


def _append(folder: str, row: str) -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        (file, *_) = (run / folder).glob("*.jsonl")
        file.write_text(file.read_text() + row + "\n")

    return harm


HARMS: Mapping[str, Callable[[Path], object]] = {
    "config is empty": _write("run.yaml", ""),
    "config is no YAML": _write("run.yaml", "{: ]"),
    "config is no text": _write("run.yaml", b"\xff\xfe\x00"),
    "config is a list": _write("run.yaml", "[1, 2]"),
    "event without kind": _append("events", '{"time": 1.0, "attempt": 0}'),
    "event without time": _append("events", '{"kind": "planned", "device": "cpu", "attempt": 0}'),
    "event with a time that is text": _append("events", '{"kind": "x", "attempt": 0, "time": "now"}'),
    "planned without device": _append("events", '{"kind": "planned", "attempt": -1, "time": 1.0}'),
    "metrics without values": _append("metrics", '{"time": 1.0, "attempt": 0, "step": 9}'),
    "metrics whose values are a list": _append("metrics", '{"time": 1.0, "attempt": 0, "step": 9, "values": [1]}'),
    "a metric that is text": _append("metrics", '{"time": 1.0, "attempt": 0, "step": 9, "values": {"step_s": "soon"}}'),
    "a metric that is null": _append("metrics", '{"time": 1.0, "attempt": 0, "step": 9, "values": {"step_s": null}}'),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_record_is_passed_over_for_the_next_run(tmp_path: Path, harm: str) -> None:
    HARMS[harm](recorded(tmp_path, "damaged", [9.0, 8.0, 7.0]))
    alone = planned(tmp_path)
    assert alone.step_s == alone.computed_step_s and "measured" not in alone.basis
    recorded(tmp_path, "sound", [9.0, 4.0, 4.0], written_at=1e9)  # older, so that the damaged one is read first
    found = planned(tmp_path)
    assert found.step_s == 4.0 and rests_on(found, "sound")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", 0.0, -1.0])
def test_seconds_that_no_step_can_take_do_not_count(tmp_path: Path, value: float | str) -> None:
    recorded(tmp_path, "before", [9.0, 2.0, 2.0, *[float(value)] * 5])
    found = planned(tmp_path)
    assert found.step_s == 2.0
    found.table()
