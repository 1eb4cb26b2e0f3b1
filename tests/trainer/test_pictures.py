"""Pictures of what a model makes: what is written is read back by another program, and reaches the run's record."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.load import load
from data_pipelines.storage import Store
from tests.tiny import tiny_config
from trainer.pictures import coloured, encode_png, enlarged, grid, outline
from trainer.record import RunRecord


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (7, 5, 3), (300, 2), (2, 300, 3)])
def test_png_is_read_back_by_pillow(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    image = Image.open(io.BytesIO(encode_png(pixels)))
    image.verify()
    image = Image.open(io.BytesIO(encode_png(pixels)))
    assert image.mode == ("L" if len(shape) == 2 else "RGB")
    assert np.array_equal(np.asarray(image), pixels)


def test_a_grid_keeps_every_picture_and_leaves_gaps() -> None:
    pictures = [np.full((3, 4), number, np.uint8) for number in range(5)]
    sheet = grid(pictures, columns=2, gap=1)
    assert sheet.shape == (3 * 3 + 2, 2 * 4 + 1)
    for number in range(5):
        top, left = number // 2 * 4, number % 2 * 5
        assert (sheet[top : top + 3, left : left + 4] == number).all()
    assert (sheet[3] == 128).all() and (sheet[8:, 5:] == 128).all()


def test_enlarged_and_coloured() -> None:
    picture = np.array([[1, 2]], np.uint8)
    assert np.array_equal(enlarged(picture, 2), [[1, 1, 2, 2], [1, 1, 2, 2]])
    assert np.array_equal(coloured(picture)[..., 2], picture)
    assert np.array_equal(coloured(picture[..., None]), coloured(picture))


def outlined(box: tuple[float, ...]) -> np.ndarray:
    picture = np.zeros((6, 8, 3), np.uint8)
    outline(picture, box, (9, 0, 0))
    assert not picture[..., 1:].any()
    return picture[..., 0] == 9


def test_an_outline_is_the_edge_of_the_pixels_inside() -> None:
    expected = np.zeros((6, 8), bool)
    expected[1:5, 2:7] = True
    expected[2:4, 3:6] = False
    assert np.array_equal(outlined((2, 1, 7, 5)), expected)


@pytest.mark.parametrize("box", [(-9, -9, 99, 99), (7.9, 5.9, 8, 6), (3, 3, 3, 3), (50, 50, 60, 60)])
def test_an_outline_stays_in_the_picture(box: tuple[float, ...]) -> None:
    assert outlined(box).any()


def test_a_picture_lies_in_the_record_under_its_step(tmp_path: Path) -> None:
    config: dict[str, Any] = tiny_config(tmp_path)
    record = RunRecord.create(Store(config["store"]), load(config))
    record.next_attempt()
    record.picture(7, "what_it-sees", encode_png(np.zeros((2, 2), np.uint8)))
    record.close()
    (event,) = [event for event in record.events() if event["kind"] == "picture"]
    assert (event["step"], event["name"]) == (7, "what_it-sees")
    assert Image.open(io.BytesIO(record.store.read_bytes(event["path"]))).size == (2, 2)
