"""Images in folders that are named after their classes: images/cat/1.jpg, images/dog/2.jpg, ...

The classes are the names of the folders directly below `path`, sorted; a label is a place in that list. Where those
folders are train and validation (or val, or test), they are the split, and the classes are the folders below them. A
row holds the file's bytes as they are, or, with image_size, its pixels. Images are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from configs.errors import UsageError
from data_pipelines.images import SUFFIXES, check_image, pillow, pixels_of
from data_pipelines.input_files import list_folders, read_file, without_query
from data_pipelines.sources import (
    MAX_VALUE_BYTES,
    Bad,
    Column,
    InputFile,
    Partition,
    Row,
    SourceConfig,
    file_identity,
    find_files,
    partition_files,
)

NEAR_DUPLICATES_SHARE_A_SPLIT = False
_SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "dev": "validation", "test": "test"}


class Config(SourceConfig):
    """Which folder, and how its images are stored."""

    path: str = Field(
        min_length=1, description="Folder, or address of one, that holds a folder for each class.", examples=["images"]
    )
    classes: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Classes in the order of their numbers; other folders are left out. null is all folders, sorted.",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Height and width, in pixels, to which images are scaled and cut, to be stored decoded: read "
        "faster, and larger on disk. null stores the files as they are.",
    )
    channels: Literal[1, 3, 4] = Field(
        default=3, description="With image_size: values a pixel, 1 grey, 3 colour, 4 with transparency."
    )
    check: bool = Field(
        default=True,
        description="Decode each image once while the data set is built, so that broken ones are found then; false is "
        "faster.",
    )


def schema(config: Config) -> tuple[Column, ...]:
    """image: the file's bytes, or pixels (image_size, image_size, channels); label: the number of its class."""
    label = Column("label", "int64")
    if config.image_size is None:
        return Column("image", "binary"), label
    return Column("image", "uint8", (config.image_size, config.image_size, config.channels)), label


def partitions(config: Config) -> list[Partition]:
    """Images together, in the order of their paths. Raises UsageError where there are no folders of classes."""
    if config.check or config.image_size is not None:
        pillow()
    return partition_files(_files(config), cut=False)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """A row for each image; a Bad for a file that is none, or that is broken."""
    numbers = {name: number for number, name in enumerate(class_names(config))}
    own_splits = _has_splits(config.path)
    for path, key in zip(partition.files, partition.keys, strict=True):
        parts = key.split("/")
        label, split = numbers[parts[own_splits]], _SPLITS[parts[0]] if own_splits else None
        raw = read_file(path, MAX_VALUE_BYTES + 1)
        try:
            yield Row(key, {"image": _stored(raw, config), "label": label}, split)
        except ValueError as error:
            yield Bad(without_query(path), None, f"the image {error}")


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the images."""
    return file_identity(_files(config))


def class_names(config: Config) -> tuple[str, ...]:
    """The classes in the order of their numbers."""
    return config.classes if config.classes is not None else _found_classes(config.path)


def _files(config: Config) -> list[InputFile]:
    wanted = set(class_names(config))
    depth = int(_has_splits(config.path))
    files = find_files([config.path], SUFFIXES, "data.path")
    kept = [file for file in files if len(parts := file.key.split("/")) > depth + 1 and parts[depth] in wanted]
    if not kept:
        raise UsageError(
            f"There are no images in folders of {without_query(config.path)} named {', '.join(sorted(wanted)[:5])}. "
            "Put the images of each class into a folder with its name, or check data.classes."
        )
    return kept


def _has_splits(path: str) -> bool:
    folders = list_folders(path)
    return "train" in folders and all(name in _SPLITS for name in folders)


def _found_classes(path: str) -> tuple[str, ...]:
    folders = list_folders(path)
    if _has_splits(path):
        folders = sorted({name for split in folders for name in list_folders(path, split)})
    if not folders:
        raise UsageError(
            f"{without_query(path)} has no folders. Put the images of each class into a folder with its name, and set "
            "data.path to the folder that holds those."
        )
    return tuple(folders)


def _stored(raw: bytes, config: Config) -> Any:
    if len(raw) > MAX_VALUE_BYTES:
        raise ValueError(f"has more than {MAX_VALUE_BYTES >> 20} MB")
    if config.image_size is not None:
        return pixels_of(raw, config.image_size, config.channels)
    if config.check:
        check_image(raw)
    elif not raw:
        raise ValueError("is empty")
    return raw
