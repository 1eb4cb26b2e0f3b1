"""`shardyard data build | inspect | verify`: the data set that a recipe names."""

from __future__ import annotations

import shlex
import time
from argparse import Namespace
from typing import Any

from cluster.commands.output import facts, say, table
from configs.errors import Damaged, NotFound
from data_pipelines.build import dataset_name, ensure_dataset
from data_pipelines.inspect import summary
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer.validate import Plan, load_recipe, validate

PROGRESS_EVERY_S = 2.0
SHOWN_CHARACTERS = 200


def build(arguments: Namespace) -> dict[str, Any]:
    """Build the data set, or say that it is there."""
    plan = _plan(arguments)
    dataset = ensure_dataset(Store(plan.config.store), plan.config.data, plan.tokenizer, _Progress(arguments).tell)
    return _show(arguments, dataset)


def inspect(arguments: Namespace) -> dict[str, Any]:
    """Show splits, counts and the beginning of a document."""
    dataset = _open(arguments)
    shown = _show(arguments, dataset)
    key, tokens, _ = next(dataset.documents("train"))
    beginning = dataset.tokenizer.decode(tokens[:SHOWN_CHARACTERS])[:SHOWN_CHARACTERS]
    say(arguments, f"\nThe first document, {key}, begins:\n\n{beginning}")
    return shown | {"first_document": {"key": key, "beginning": beginning}}


def verify(arguments: Namespace) -> dict[str, Any]:
    """Read every block of the data set and compare its digest."""
    dataset = _open(arguments)
    damage = [str(item) for item in dataset.verify()]
    if damage:
        raise Damaged(
            f"The data set {dataset.path} is damaged: {'; '.join(damage)}. Delete that folder and build it anew: "
            f"shardyard data build {shlex.join([arguments.recipe, *arguments.overrides])}"
        )
    blocks = sum(len(dataset.blocks(split)) for split in dataset.splits)
    say(arguments, f"All {blocks:,} blocks of {dataset.path} match their digests.")
    return {"path": dataset.path, "fingerprint": dataset.fingerprint, "blocks": blocks, "damage": []}


def _plan(arguments: Namespace) -> Plan:
    return validate(load_recipe(arguments.recipe, arguments.overrides))


def _open(arguments: Namespace) -> Dataset:
    """The recipe's data set, which must be there."""
    plan = _plan(arguments)
    store = Store(plan.config.store).child("datasets", dataset_name(plan.config.data, plan.tokenizer))
    try:
        return Dataset.open(store)
    except NotFound as error:
        recipe = shlex.join([arguments.recipe, *arguments.overrides])
        raise NotFound(
            f"The data set of {recipe} is not built yet (it would be {store.path()}). Build it: "
            f"shardyard data build {recipe}"
        ) from error


def _show(arguments: Namespace, dataset: Dataset) -> dict[str, Any]:
    described = summary(dataset)
    facts(arguments, {key: described[key] for key in ("path", "fingerprint", "vocab_size")})
    say(arguments)
    header = ("SPLIT", "DOCUMENTS", "TOKENS", "BYTES", "BYTES/TOKEN", "BLOCKS", "FILES")
    keys = ("documents", "tokens", "bytes", "bytes_per_token", "blocks", "files")
    splits = described["splits"].items()
    table(arguments, header, [(name, *(split[key] for key in keys)) for name, split in splits])
    return described


class _Progress:
    """Says what a build does: each stage at once, counts every few seconds."""

    def __init__(self, arguments: Namespace) -> None:
        self._arguments = arguments
        self._stage = ""
        self._said_at = 0.0

    def tell(self, stage: str, documents: int) -> None:
        now = time.monotonic()
        if stage != self._stage or now - self._said_at >= PROGRESS_EVERY_S:
            self._stage, self._said_at = stage, now
            say(self._arguments, stage + (f": {documents:,} documents" if documents else ""))
