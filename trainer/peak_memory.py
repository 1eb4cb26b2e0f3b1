"""What a worker measures of its own memory."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), clear_refs: resets VmHWM


def begin(device: torch.device) -> int:
    """Count peaks from now on, where the system allows it; the bytes of this process now, before it has a model."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)
    return _of_process("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Since `begin`: on a GPU what torch allocated there at most, on a CPU what the process had in memory at most."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return _of_process("VmHWM")


def _of_process(field: str) -> int:
    """In bytes: VmRSS, now, or VmHWM, at most (proc(5)); outside Linux the most so far stands for both."""
    try:
        text = _STATUS.read_text()
    except OSError:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1]) * 1024
