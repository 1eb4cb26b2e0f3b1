"""Data sets of Hugging Face `datasets`: a folder that save_to_disk wrote, or a name on the hub.

A folder is read as the Arrow files it holds, without the package and without a network. A name needs the package
(`pip install shardyard[huggingface]`), which downloads the data set into its own cache; the Arrow files there are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field

from configs.errors import Damaged, NotFound, Unreachable, UsageError
from data_pipelines.arrow_files import partition_arrow_files
from data_pipelines.input_files import first_line, join_path, read_file, stat_file, without_query
from data_pipelines.sources import Bad, Column, InputFile, Partition, Row, SourceConfig, file_identity
from data_pipelines.sources.arrow import arrow_schema, read_arrow

NEAR_DUPLICATES_SHARE_A_SPLIT = False


class Config(SourceConfig):
    """Which data set, which splits of it, and which of their columns."""

    path: str = Field(
        min_length=1,
        description="Folder or address that save_to_disk wrote to, or the name of a data set on the hub.",
        examples=["my_dataset"],
    )
    subset: str | None = Field(
        default=None, min_length=1, description="Of a data set on the hub with several configurations: which one."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Of a data set on the hub: branch, tag or commit; null is the newest."
    )
    split: str = Field(default="train", min_length=1, description="The data set's split that is trained on.")
    validation_split: str | None = Field(
        default=None,
        min_length=1,
        description="The data set's split that is held out; null holds out validation_fraction of the other one.",
    )
    columns: Mapping[str, str] = Field(
        default={"text": "text"},
        min_length=1,
        description="Columns that are taken: the name under which each is stored, and the data set's. A language "
        "model reads text, an image model image and label.",
    )


def schema(config: Config) -> tuple[Column, ...]:
    """The columns as the first file has them."""
    return arrow_schema(_files(config, config.split)[0].path, config.columns)


def partitions(config: Config) -> list[Partition]:
    """Small files together; large ones by record batches."""
    return [part for split in _splits(config) for part in partition_arrow_files(_files(config, split))]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The rows; a Bad for one with a null, or a number that is not finite, in a column that is taken."""
    held_out = config.validation_split is not None
    for row in read_arrow(partition, schema(config), config.columns):
        if isinstance(row, Row) and held_out:
            split = "validation" if row.key.startswith(f"{config.validation_split}/") else "train"
            yield Row(row.key, row.values, split)
        else:
            yield row


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the files; of a data set on the hub their names and sizes."""
    return file_identity(file for split in _splits(config) for file in _files(config, split))


def _splits(config: Config) -> list[str]:
    return [config.split] if config.validation_split is None else [config.split, config.validation_split]


def _files(config: Config, split: str) -> list[InputFile]:
    """The Arrow files of a split; the key of each is split/name."""
    names = _json(join_path(config.path, "dataset_dict.json")), _json(join_path(config.path, "state.json"))
    if names == (None, None):
        if "://" in config.path or Path(config.path).expanduser().exists():
            raise UsageError(
                f"{without_query(config.path)} is no data set that save_to_disk wrote (it has no state.json and no "
                "dataset_dict.json). Set data.path to one, or use the sources arrow or parquet for single files."
            )
        return _hub_files(config.path, config.subset, config.revision, split)
    splits, state = names
    folder = config.path
    if splits is not None:
        if split not in splits.get("splits", []):
            raise UsageError(
                f"{without_query(config.path)} has no split '{split}'; it has {', '.join(splits.get('splits', []))}. "
                "Set data.split."
            )
        folder = join_path(config.path, split)
        state = _json(join_path(folder, "state.json"))
    elif split != config.split:
        raise UsageError(
            f"{without_query(config.path)} holds one split only, so data.validation_split={split} is not in it. "
            "Remove that setting: then validation_fraction is held out."
        )
    try:
        files = [str(file["filename"]) for file in (state or {})["_data_files"]]
    except (KeyError, TypeError):
        raise Damaged(
            f"{without_query(join_path(folder, 'state.json'))} names no files. Save the data set again."
        ) from None
    return [stat_file(join_path(folder, name), f"{split}/{name}") for name in files]


def _json(path: str) -> dict[str, Any] | None:
    """A JSON object in a file; None where there is no such file."""
    try:
        values = json.loads(read_file(path))
    except NotFound:
        return None
    except ValueError as error:
        raise Damaged(f"{without_query(path)} is not JSON ({error}). Save the data set again.") from error
    if not isinstance(values, dict):
        raise Damaged(f"{without_query(path)} is no JSON object. Save the data set again.")
    return values


@lru_cache(maxsize=8)
def _hub_files(name: str, subset: str | None, revision: str | None, split: str) -> list[InputFile]:
    """The Arrow files of a data set on the hub, downloaded by the package `datasets` into its cache."""
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            f"There is no folder {name}, and to fetch a data set of this name from the hub needs the package datasets, "
            "which is not installed. Run pip install 'shardyard[huggingface]', or set data.path to a folder."
        ) from error
    try:
        dataset = load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # whatever the package, its network libraries and the data set's loader raise
        raise Unreachable(
            f"The data set '{name}' (split {split}) cannot be loaded from the hub: {type(error).__name__}: "
            f"{first_line(error)}. Check data.path, data.subset and data.split, the network, and the access rights; "
            "there is no folder of this name either."
        ) from error
    paths = [Path(file["filename"]) for file in dataset.cache_files]
    # When a file of the cache was written tells nothing of the data.
    return [InputFile(f"{split}/{path.name}", str(path), path.stat().st_size, None) for path in paths]
