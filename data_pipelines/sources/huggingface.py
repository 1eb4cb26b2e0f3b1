"""Data sets of Hugging Face `datasets`: a folder that save_to_disk wrote, or a name on the hub.

A folder is read as the Arrow files it holds, without the package and without a network. A name needs the package
(`pip install shardyard[huggingface]`), which downloads the data set into its own cache; the Arrow files there are read,
all of their rows. Which columns there are is asked of the hub, which as a rule needs no download.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, field_validator

from configs.errors import Damaged, NotFound, Unreachable, UsageError
from data_pipelines.arrow_files import open_arrow, partition_arrow_files
from data_pipelines.arrow_rows import columns_of
from data_pipelines.input_files import first_line, join_path, read_file, stat_file, without_query
from data_pipelines.sources import Bad, Column, InputFile, Partition, Row, SourceConfig, file_identity
from data_pipelines.sources.arrow import arrow_schema, read_arrow

if TYPE_CHECKING:
    import pyarrow as pa

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

    @field_validator("split", "validation_split")
    @classmethod
    def _refuse_slices(cls, split: str | None) -> str | None:
        if split is not None and "[" in split:
            raise ValueError(
                f"'{split}' is a part of a split, and a split is taken whole. Name the split, and set "
                "data.validation_fraction to the share of it that is held out"
            )
        return split


def schema(config: Config) -> tuple[Column, ...]:
    """The columns as the hub tells them, or as the first file has them."""
    if _is_on_hub(config):
        told = _hub_schema(config.path, config.subset, config.revision)
        if told is not None:
            return columns_of(told, config.columns, f"The data set '{config.path}'")
    return arrow_schema(_files(config, config.split)[0].path, config.columns)


def partitions(config: Config) -> list[Partition]:
    """Small files together; large ones by record batches."""
    return [part for files in _files_by_split(config) for part in partition_arrow_files(files)]


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
    """Number, sizes and times of change of the files; of the hub names, sizes and the package's fingerprints."""
    facts = file_identity(file for files in _files_by_split(config) for file in files)
    if not _is_on_hub(config):
        return facts
    hub_splits = (_hub_split(config.path, config.subset, config.revision, split) for split in _splits(config))
    return [*facts, *(hub_split.fingerprint for hub_split in hub_splits)]


def _splits(config: Config) -> list[str]:
    return [config.split] if config.validation_split is None else [config.split, config.validation_split]


def _files_by_split(config: Config) -> list[list[InputFile]]:
    """The files of each split. Raises UsageError where one is trained on and held out."""
    found = [_files(config, split) for split in _splits(config)]
    if len(found) == 2 and {file.path for file in found[0]} & {file.path for file in found[1]}:
        raise UsageError(
            f"data.split={config.split} and data.validation_split={config.validation_split} share rows, so that what "
            "is held out would be trained on. Name two different splits, or set data.validation_fraction alone."
        )
    return found


def _is_on_hub(config: Config) -> bool:
    """Whether there is no file or folder of this name here."""
    return "://" not in config.path and not Path(config.path).expanduser().exists()


def _files(config: Config, split: str) -> list[InputFile]:
    """The Arrow files of a split; the key of each is split/name."""
    if _is_on_hub(config):
        return list(_hub_split(config.path, config.subset, config.revision, split).files)
    splits, state = _json(join_path(config.path, "dataset_dict.json")), _json(join_path(config.path, "state.json"))
    if splits is None and state is None:
        raise UsageError(
            f"{without_query(config.path)} is no data set that save_to_disk wrote (it has no state.json and no "
            "dataset_dict.json). Set data.path to one, or use the sources arrow or parquet for single files."
        )
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


class _HubSplit(NamedTuple):
    """A split of a data set on the hub, in the cache of the package `datasets`. fingerprint: of what was loaded."""

    files: tuple[InputFile, ...]
    fingerprint: str


@lru_cache(maxsize=8)
def _hub_schema(name: str, subset: str | None, revision: str | None) -> pa.Schema | None:
    """The schema of a data set on the hub; None where the hub does not tell, so that it has to be downloaded."""
    datasets = _package(name)
    with _hub_explained(name, None):
        features = datasets.load_dataset_builder(name, subset, revision=revision).info.features
    return None if features is None else features.arrow_schema


@lru_cache(maxsize=8)
def _hub_split(name: str, subset: str | None, revision: str | None, split: str) -> _HubSplit:
    """A split of a data set on the hub, downloaded by the package `datasets` into its cache."""
    datasets = _package(name)
    with _hub_explained(name, split):
        dataset = datasets.load_dataset(name, subset, split=split, revision=revision)
    paths = [Path(file["filename"]) for file in dataset.cache_files]
    num_rows = sum(_num_rows(path) for path in paths)
    if not paths or num_rows != dataset.num_rows:
        raise UsageError(
            f"The data set '{name}' (split {split}) has {dataset.num_rows} rows, and its files in the cache of the "
            f"package datasets hold {num_rows}. Name whole splits in data.split (data.validation_fraction holds a part "
            "out), and let the package load from its cache (unset HF_DATASETS_IN_MEMORY_MAX_SIZE)."
        )
    # When a file of the cache was written tells nothing of the data.
    files = tuple(InputFile(f"{split}/{path.name}", str(path), path.stat().st_size, None) for path in paths)
    return _HubSplit(files, dataset._fingerprint)  # datasets 5.2: of name, subset, version, commit and split


def _num_rows(path: Path) -> int:
    with open_arrow(str(path)) as file:
        return sum(batch.num_rows for _, batch in file.batches())


def _package(name: str) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            f"There is no folder {name}, and to fetch a data set of this name from the hub needs the package datasets, "
            "which is not installed. Run pip install 'shardyard[huggingface]', or set data.path to a folder."
        ) from error
    return datasets


@contextlib.contextmanager
def _hub_explained(name: str, split: str | None) -> Iterator[None]:
    """Raise Unreachable for whatever the package, its network libraries and the data set's loader raise."""
    try:
        yield
    except Exception as error:
        what = f"'{name}'" if split is None else f"'{name}' (split {split})"
        raise Unreachable(
            f"The data set {what} cannot be loaded from the hub: {type(error).__name__}: {first_line(error)}. Check "
            "data.path, data.subset and data.split, the network, and the access rights; there is no folder of this "
            "name either."
        ) from error
