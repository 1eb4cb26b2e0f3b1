"""Micro-batches on the device: the copy of each runs while the one before it is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from data_pipelines.loader import MicroBatch


class Uploads:
    """Copies to a GPU on a stream of their own; on a CPU batches stay as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def each(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, Mapping[str, Tensor]]]:
        """Every batch with its tensors on the device, for work on the current stream; take all of them.

        That stream waits for the copies of a batch before the batch is given. So an event recorded on it afterwards
        stands behind all copies, and the loader may then fill the batches' memory again (Loader._give_back).
        """
        if self._copies is None:
            for batch in batches:
                yield batch, batch.tensors
            return
        left = iter(batches)
        ahead = self._start(next(left, None))
        while ahead is not None:
            batch, tensors = ahead
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._copies)  # for these copies alone: the next ones are not asked for yet
            for tensor in tensors.values():
                tensor.record_stream(computing)  # their memory is used again when that stream is done with it
            ahead = self._start(next(left, None))
            yield batch, tensors

    def _start(self, batch: MicroBatch | None) -> tuple[MicroBatch, dict[str, Tensor]] | None:
        if batch is None:
            return None
        with torch.cuda.stream(self._copies):
            return batch, {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.tensors.items()}
