"""What a module of this package defines as `Peer`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from peers.cases import Case


class Interface(Protocol):
    """An opened, shuffled loader: batch examples a batch on this rank of world_size.

    It may use threads and, where there is no other way, processes; never DataLoader workers.
    """

    def __init__(self, case: Case, folder: Path, batch: int, rank: int = 0, world_size: int = 1) -> None: ...

    def epoch(self) -> Iterator[Any]:
        """What is left of this rank's epoch; called again, the next epoch."""

    def state(self, batches: int) -> Any:
        """What one saves after so many batches of the epoch were taken on this rank; can be pickled."""

    def load(self, state: Any) -> None:
        """Go on from a state, which may come from another world size (rank 0 saved it). Called before epoch()."""

    def close(self) -> None: ...
