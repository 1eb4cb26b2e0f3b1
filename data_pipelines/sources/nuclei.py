"""Cell nuclei under a fluorescence microscope: one image of 512 x 512 with 125 outlined nuclei, cut into tiles.

From: PyPI stardist, stardist/data/images/{img2d,mask2d}.tif; an image of the 2018 Data Science Bowl (J. Caicedo and
others, "Nucleus segmentation across imaging experiments", 2019). Licence: stardist BSD-3; the challenge's data CC0.
image: grey (0 to 235 as stored). mask: 0, or the number of the nucleus in the whole image. boxes: (n, 4) left, top,
right, bottom of each nucleus in pixels of the tile, right and bottom not included. labels: 0, a nucleus.
The split is by place: the lowest row of tiles is held out; data.validation_fraction has no say. A nucleus at an edge
is cut by it.
It does not show: anything but this one image; 4 of 16 tiles held out are too few for more than a trial of the
machinery.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "pip",
    "stardist",
    "0.9.2",
    "stardist-0.9.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023",
)
TILE = 128


class Config(SourceConfig):
    """It needs no settings of its own."""


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A tile, its nuclei as a mask and as boxes."""
    image, mask = Column("image", "uint8", (TILE, TILE, 1)), Column("mask", "uint16", (TILE, TILE))
    return image, mask, Column("boxes", "float32", (None, 4)), Column("labels", "int64", (None,))


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("nuclei", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The tiles, row by row. Raises what `packages.fetch` raises."""
    image = _decode(member(PACKAGE, "stardist/data/images/img2d.tif")).astype(np.uint8)
    mask = _decode(member(PACKAGE, "stardist/data/images/mask2d.tif")).astype(np.uint16)
    height, width = image.shape
    for top in range(0, height, TILE):
        split = "validation" if top + TILE >= height else "train"
        for left in range(0, width, TILE):
            area = slice(top, top + TILE), slice(left, left + TILE)
            boxes = mask_boxes(mask[area])
            values = {"image": image[area][:, :, None], "mask": mask[area], "boxes": boxes}
            yield Row(f"{top}-{left}", {**values, "labels": np.zeros(len(boxes), np.int64)}, split=split)


def mask_boxes(mask: np.ndarray) -> np.ndarray:
    """(n, 4) float32 left, top, right, bottom of each number above 0 in a mask (H, W), by number."""
    boxes = []
    for number in np.unique(mask[mask > 0]):
        rows, columns = np.nonzero(mask == number)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def _decode(raw: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image)


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
