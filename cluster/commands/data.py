"""`shardyard data build | inspect | verify | diff | export`: the data set of a recipe, or one that lies in a folder."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from cluster.build_progress import BuildProgress
from cluster.commands.data_views import show, show_diff, show_example, show_lengths
from cluster.commands.output import say
from configs.errors import NotFound, ShardyardError, UsageError
from data_pipelines.build import FOLDER, dataset_name, newest_built
from data_pipelines.damage import DatasetDamaged
from data_pipelines.index import INDEX_FILE
from data_pipelines.inspect import examples, pictures, summary
from data_pipelines.quarantine import QUARANTINE_FILE
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer.run_data import MIXTURE, open_datasets
from trainer.validate import Plan, load_recipe, validate


def build(arguments: Namespace) -> dict[str, Any]:
    """Build the data set, or say that it is there."""
    plan = _plan(arguments.recipe, arguments.overrides)
    with _progress(arguments) as progress:
        datasets = _build(arguments, plan, progress)
    described = []
    for dataset in datasets:
        described.append(summary(dataset) | {"packed": _packed(dataset, plan)})
        show(arguments, described[-1])
        if described[-1]["quarantined"]:
            say(arguments, f"\nThe bad rows are listed in {dataset.store.path(QUARANTINE_FILE)}")
        if dataset is not datasets[-1]:
            say(arguments)
    return described[0] if plan.config.data.name != MIXTURE else {"sources": described}


def _build(arguments: Namespace, plan: Plan, progress: BuildProgress) -> list[Dataset]:
    """The data set of the recipe; of a mixture, that of each source."""
    from cluster.ray_build import RayTasks

    store = Store(plan.config.store)
    tasks = None
    if arguments.workers != 1 or arguments.address is not None:
        tasks = RayTasks(workers=arguments.workers, address=arguments.address, store=store, watch=progress.watch)
    with tasks or nullcontext() as run_tasks:
        return open_datasets(plan, progress.tell, run_tasks)


def inspect(arguments: Namespace) -> dict[str, Any]:
    """Show columns, counts, lengths and examples."""
    dataset, plan = _open(arguments, arguments.recipe)
    described = summary(dataset) | {"packed": _packed(dataset, plan)}
    show(arguments, described)
    for split, values in described["splits"].items():
        for column, lengths in values["lengths"].items():
            show_lengths(arguments, split, column, lengths)
    split = next(split for split in dataset.splits if described["splits"][split]["rows"])
    found = examples(dataset, split, arguments.examples)
    for example in found:
        show_example(arguments, split, example)
    files = _write_pictures(arguments, dataset, split) if arguments.out else []
    return described | {"examples": {split: found}, "pictures": files}


def _write_pictures(arguments: Namespace, dataset: Dataset, split: str) -> list[str]:
    """The examples' pictures as PNG files in --out."""
    from data_pipelines.pictures import png

    folder = Store(arguments.out)
    files = []
    for name, picture in pictures(dataset, split, arguments.examples).items():
        folder.write_atomic(f"{split}-{name}.png", png(picture))
        files.append(folder.path(f"{split}-{name}.png"))
    say(
        arguments, f"\nWrote {len(files)} pictures to {folder.path()}" if files else "\nThere are no pictures to write."
    )
    return files


def verify(arguments: Namespace) -> dict[str, Any]:
    """Read every block of the data set and compare its digest."""
    dataset, _ = _open(arguments, arguments.recipe)
    with _progress(arguments, "blocks") as progress:
        damage = dataset.verify(progress.tell)
    if damage:
        typed = ["RECIPE"] if _is_dataset(arguments.recipe) else [arguments.recipe, *arguments.overrides]
        raise DatasetDamaged(dataset.path, damage, f"shardyard data build {shlex.join(typed)}")
    blocks = len(dataset.index.blocks)
    say(arguments, f"All {blocks:,} blocks of {dataset.path} match their digests.")
    return {"path": dataset.path, "fingerprint": dataset.fingerprint, "blocks": blocks, "damage": []}


def diff(arguments: Namespace) -> dict[str, Any]:
    """Say what differs between two data sets."""
    from data_pipelines.diff import diff as compare

    one, other = (_open(arguments, name)[0] for name in (arguments.a, arguments.b))
    with _progress(arguments) as progress:
        found = compare(one, other, progress.tell)
    show_diff(arguments, one.path, other.path, found)
    return {"a": one.path, "b": other.path, **found}


def export(arguments: Namespace) -> dict[str, Any]:
    """Write the data set as Parquet files."""
    from data_pipelines.export import export as write

    dataset, _ = _open(arguments, arguments.recipe)
    folder = Store(arguments.out)
    with _progress(arguments, "blocks") as progress:
        files = write(dataset, folder, progress.tell)
    say(arguments, f"Wrote {', '.join(files)} to {folder.path()}")
    return {"path": dataset.path, "folder": folder.path(), "files": files}


@contextmanager
def _progress(arguments: Namespace, unit: str = "rows") -> Iterator[BuildProgress]:
    progress = BuildProgress(arguments, unit)
    try:
        yield progress
    finally:
        progress.close()


def _plan(recipe: str, overrides: list[str]) -> Plan:
    return validate(load_recipe(recipe, overrides))


def _packed(dataset: Dataset, plan: Plan | None) -> dict[str, Any] | None:
    """How the recipe packs the text, and the share of padding of each split; None where it packs nothing.

    Nor where best-fit sequences of this length were not counted in the build: every block would have to be read.
    """
    seq_len = None if plan is None else plan.task.packing()
    if plan is None or seq_len is None:
        return None
    kind, counted = plan.task.packing_kind(), dataset.index.packing
    if kind == "best_fit" and (counted is None or seq_len not in counted.seq_lens):
        return None
    splits = {split: dataset.packed(split, seq_len, kind) for split in dataset.splits}
    found = {name: {"sequences": len(split), "waste": round(split.waste, 6)} for name, split in splits.items()}
    return {"kind": kind, "seq_len": seq_len, "splits": found}


def _is_dataset(name: str) -> bool:
    """Whether a folder of this name is a data set, and so no recipe is meant."""
    return Store(name).exists(INDEX_FILE)


def _open(arguments: Namespace, name: str) -> tuple[Dataset, Plan | None]:
    """The data set in a folder of this name, else that of a recipe (with its plan), which must be there.

    Where the recipe's source is gone, it is the one that was built last with the same settings.
    """
    if _is_dataset(name):
        return Dataset.open(name), None
    overrides = getattr(arguments, "overrides", [])
    plan = _plan(name, overrides)
    if plan.config.data.name == MIXTURE:
        raise UsageError(
            f"The data of {name} is a mixture, a data set for each of its sources. Give the folder of one of them: "
            f"`shardyard data build {name}` names them."
        )
    store = Store(plan.config.store)
    try:
        built = dataset_name(plan.config.data, plan.tokenizer)
    except ShardyardError as error:
        last = newest_built(store, plan.config.data, plan.tokenizer)
        if last is None:
            raise NotFound(
                f"{error} Nothing in {store.path(FOLDER)} was built with these settings before. The folder of a data "
                "set can be given in place of the recipe."
            ) from error
        built = last
        say(arguments, f"{error} This is what was built last with the same settings.\n")
    folder = store.child(FOLDER, built)
    try:
        return Dataset.open(folder), plan
    except NotFound as error:
        recipe = shlex.join([name, *overrides])
        raise NotFound(
            f"The data set of {recipe} is not built yet (it would be {folder.path()}). Build it: "
            f"shardyard data build {recipe}"
        ) from error
