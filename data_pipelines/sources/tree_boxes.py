"""Trees seen from the air: 4 photos with 951 hand-drawn boxes, cut into tiles of 200 x 200 pixels.

From: PyPI deepforest, deepforest/data/*.png with the .xml (Pascal VOC) of the same name; photos of the National
Ecological Observatory Network (NEON), 0.1 m a pixel. B. Weinstein and others, "DeepForest" (2020). Licence: MIT.
image: RGB. boxes: (n, 4) left, top, right, bottom in pixels of the tile, right and bottom not included; a tree
belongs to the tile that holds its centre, and is cut at that tile's edge. labels: 0, a tree (also where the file says
alive or dead). Tiles without a tree are left out, and so is what remains right and below of the last whole tile.
The split is by photo: VALIDATION_PHOTO is never trained on; data.validation_fraction has no say.
It does not show: other forests (these are four places), or other seasons. With four photos, expect a coarse figure.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from data_pipelines.packages import Package, members
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "pip",
    "deepforest",
    "2.1.0",
    "deepforest-2.1.0-py3-none-any.whl",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
)
VALIDATION_PHOTO = "2019_YELL_2_541000_4977000_image_crop"
TILE = 200


class Config(SourceConfig):
    """It needs no settings of its own."""


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A tile and its trees."""
    return (
        Column("image", "uint8", (TILE, TILE, 3)),
        Column("boxes", "float32", (None, 4)),
        Column("labels", "int64", (None,)),
    )


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("tree_boxes", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The tiles with trees, photo by photo, row by row. Raises what `packages.fetch` raises."""
    files = dict(members(PACKAGE, "deepforest/data/*.png", "deepforest/data/*.xml"))
    for path in sorted(path for path in files if path.endswith(".xml")):
        photo = PurePosixPath(path).stem
        split = "validation" if photo == VALIDATION_PHOTO else "train"
        for key, image, boxes in tiles(_decode(files[path.removesuffix(".xml") + ".png"]), voc_boxes(files[path])):
            labels = np.zeros(len(boxes), np.int64)
            yield Row(f"{photo}/{key}", {"image": image, "boxes": boxes, "labels": labels}, split=split)


def voc_boxes(raw: bytes) -> np.ndarray:
    """(n, 4) float32 left, top, right, bottom of each object of a Pascal VOC file."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = [
        [float(box.findtext(corner) or "nan") for corner in corners]
        for box in ElementTree.fromstring(raw).iter("bndbox")
    ]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def tiles(image: np.ndarray, boxes: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Key, picture (TILE, TILE, 3) and boxes (n, 4) of each whole tile that holds a box's centre."""
    cells = ((boxes[:, :2] + boxes[:, 2:]) / 2 // TILE).astype(np.int64)  # (n, 2) column and row of its tile
    for row in range(image.shape[0] // TILE):
        for column in range(image.shape[1] // TILE):
            own = boxes[(cells == (column, row)).all(axis=1)]
            if len(own):
                left, top = column * TILE, row * TILE
                inside = np.clip(own - np.array([left, top, left, top], np.float32), 0, TILE)
                yield f"{row}-{column}", image[top : top + TILE, left : left + TILE], inside


def _decode(raw: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
