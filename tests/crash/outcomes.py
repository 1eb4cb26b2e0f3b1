"""What came of loading a folder that a crash or damage left, for any system that saves checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from tests.crash.disk import Call, Files

if TYPE_CHECKING:
    from torch import Tensor

# In the order of the table.
GOOD = "good"  # the newest saved state, or a newer one that is whole; before the first save nothing, without an error
OLDER = "older"  # an older one, since the newest is damaged; says which and what
NAMED = "named error"  # refused; the error names a file or folder that is not as it was saved
OPAQUE = "opaque error"  # refused; the error names none
LOST = "lost"  # an older one or nothing, without a word; or, after a crash, though the newest had been saved
WRONG = "silently wrong"  # a state that was never saved
OUTCOMES = (GOOD, OLDER, NAMED, OPAQUE, LOST, WRONG)


@dataclass(frozen=True)
class Loaded:
    """found: digest of the state that was loaded; None if none was. source: its folder. told: warnings.

    error: why nothing was loaded.
    """

    found: str | None
    told: list[str] = field(default_factory=list)
    error: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Expected:
    """saved: digests of what had been saved before, oldest first. begun: of saves under way."""

    saved: tuple[str, ...]
    begun: tuple[str, ...]

    @classmethod
    def at(cls, calls: Sequence[Call], end: int) -> Expected:
        """What the marks among the first `end` calls say."""
        saved: list[str] = []
        begun: list[str] = []
        for call in calls[:end]:
            if call.kind == "mark":
                ((word, digest),) = json.loads(call.data).items()
                if word == "begun":
                    begun.append(digest)
                elif word == "saved":
                    saved.append(digest)
                    begun.clear()
        return cls(tuple(saved), tuple(begun))


def classify(loaded: Loaded, expected: Expected, differing: Iterable[str], *, crash: bool) -> str:
    """One of OUTCOMES. differing: paths of files that are not as they were saved. crash: no excuse for older ones."""
    if loaded.error is not None:
        return NAMED if _names_one(loaded.error, differing) else OPAQUE
    newest = (*expected.saved[-1:], *expected.begun)
    if loaded.found in newest or (loaded.found is None and not expected.saved):
        return GOOD
    if loaded.found is not None and loaded.found not in expected.saved:
        return WRONG
    return OLDER if not crash and any(_names_one(text, differing) for text in loaded.told) else LOST


def _names_one(text: str, paths: Iterable[str]) -> bool:
    """Whether the file's name and its checkpoint's are both in it."""
    return any(all(part in text for part in path.split("/")[-2:]) for path in paths)


def differing_paths(files: Files, whole: Files) -> set[str]:
    """Of files that are missing or not as in `whole`."""
    return {path for path, content in whole.items() if files.get(path, b"") != content}


def state_digest(step: int, tensors: Mapping[str, Tensor]) -> str:
    """Of a training state, bit by bit: tensors by name, whatever their shapes."""
    digest = xxhash.xxh3_128(str(step).encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().contiguous().reshape(-1)
        assert flat.numel() == math.prod(tensors[name].shape)
        digest.update(f"{name} {flat.dtype} {flat.numel()}".encode())
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
