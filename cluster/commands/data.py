"""`shardyard data build | inspect | verify`: the data set that a recipe names."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from cluster.commands.output import facts, say
from configs.errors import Damaged, NotFound
from configs.load import load
from data_pipelines.build import build_progress, dataset_name, ensure_dataset
from data_pipelines.inspect import summary
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer.validate import Plan, validate


def build(arguments: Namespace) -> dict[str, Any]:
    """Build the data set, or say that it is there."""
    plan = _plan(arguments)
    dataset = ensure_dataset(
        Store(plan.config.store), plan.config.data, plan.task.config.tokenizer, progress=lambda line: say(arguments, line)
    )
    return _show(arguments, dataset)


def inspect(arguments: Namespace) -> dict[str, Any]:
    """Show splits, counts and the beginning of a document."""
    return _show(arguments, _open(arguments))


def verify(arguments: Namespace) -> dict[str, Any]:
    """Read every block of the data set and compare its digest."""
    dataset = _open(arguments)
    damage = dataset.verify()
    if damage:
        raise Damaged(
            f"{len(damage)} damaged blocks in {dataset.path}: {'; '.join(damage)}. "
            f"Delete that folder and build it anew: shardyard data build {arguments.recipe}"
        )
    say(arguments, f"Every block of {dataset.path} matches its digest.")
    return {"dataset": str(dataset.path), "damage": []}
