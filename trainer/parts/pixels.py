"""Images that are stored as pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.errors import UsageError

if TYPE_CHECKING:
    from data_pipelines.columns import Column


def check_pixels(image: Column, size: int, channels: int) -> None:
    """Raises UsageError where a column of images is not uint8 of shape (size, size, channels)."""
    wanted = (size, size, channels)
    if image.dtype != "uint8" or tuple(image.shape) != wanted:
        raise UsageError(
            f"The data set's images are {image.dtype} of shape {tuple(image.shape)}; the task wants uint8 of shape "
            f"{wanted}. Set task.image_size and task.channels to what is stored, or build the data at that size "
            "(image_folder: data.image_size)."
        )
