"""Every shipped recipe trains for a few steps on rows that its task makes up: no network, no real data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.load import load, recipe_names
from configs.plugins import find_plugin
from tests.contract.examples import example_config
from tests.trainer.attempts import curve, train

STEPS = 3
LARGEST = 1_500_000  # parameters; a larger model is replaced by the file's smallest example
LONGEST = 64  # tokens


@pytest.mark.distributed
@pytest.mark.parametrize("name", recipe_names())
def test_it_trains(name: str, tmp_path: Path) -> None:
    record = train(shrunk(name, tmp_path), world_size=2)
    rows = curve(record)
    assert len(rows) == STEPS
    assert all(row["loss"] == row["loss"] and row["items"] > 0 for row in rows)
    assert any(key.startswith("validation/") for key in record.stitched()[-1])


def shrunk(name: str, folder: Path) -> dict[str, Any]:
    """The recipe with the settings of its task, optimizer and schedule, in small."""
    config: dict[str, Any] = load(name).config.model_dump()
    task = config["task"]
    if task.get("seq_len", 0) > LONGEST:
        task["seq_len"] = LONGEST
    if task.get("tokenizer") is not None:
        task["tokenizer"] = {"name": "bytes", "vocab_size": 257}
    model = find_plugin("trainer.models", config["model"]["name"])
    bound_task = find_plugin("trainer.tasks", task["name"])
    settings = {key: value for key, value in task.items() if key != "name"}
    shapes = bound_task.io(bound_task.Config(**settings))
    given = {key: value for key, value in config["model"].items() if key != "name"}
    if model.num_parameters(model.Config(**given), *shapes) > LARGEST:
        config["model"] = {"name": config["model"]["name"], **example_config(model).model_dump()}
    return config | {
        "name": "small",
        "steps": STEPS,
        "store": str(folder),
        "data": {"name": "tests.generated", "task": task},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "schedule": config["schedule"] | {"warmup_steps": 1, "decay_steps": None},
        "resources": {"workers": 2, "threads": 1},
        "evaluation": {"every": 2, "examples": 4, "sample_tokens": 4},
        "checkpoint": {"every": 2, "keep": 1},
        "tracking": {"mlflow": None},
        "precision": "fp32",
        "warm_start": None,  # weights of a size, and of a tokenizer, of their own
    }
