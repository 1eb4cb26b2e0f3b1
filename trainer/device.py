"""What a device can do and how much of it is used: peak speed, memory, supported precisions."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense (not sparse) tera-FLOP/s by the makers' data sheets: part of the device's name, 16-bit tensor cores, fp32
# without TF32. The first part found counts, so the longer name stands first.
_PEAK_TERAFLOPS = (
    ("B200", 2250.0, 75.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("RTX 4090", 165.0, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Floating point operations a second that the device can do at most; None where it is not known (every CPU).

    precision: "fp32", "bf16" or "fp16".
    """
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    for part, low_precision, fp32 in _PEAK_TERAFLOPS:
        if part in name:
            return (fp32 if precision == "fp32" else low_precision) * 1e12
    return None


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Bytes of this process: resident in host memory and, on a GPU, allocated there; each now and at most so far."""
    import psutil

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metrics = {"memory_bytes": float(psutil.Process().memory_info().rss), "memory_peak_bytes": float(peak)}
    if device.type == "cuda":
        import torch

        metrics["gpu_memory_bytes"] = float(torch.cuda.memory_allocated(device))
        metrics["gpu_memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return metrics


def memory_now(device: torch.device) -> dict[str, float]:
    """Bytes of the device: used by this process, reserved by torch for it, and free for anybody.

    Of a CPU: resident, and what its host has left; nothing is reserved.
    """
    import psutil
    import torch

    if device.type == "cuda":
        return {
            "memory_used_bytes": float(torch.cuda.memory_allocated(device)),
            "memory_reserved_bytes": float(torch.cuda.memory_reserved(device)),
            "memory_free_bytes": float(torch.cuda.mem_get_info(device)[0]),
        }
    return {
        "memory_used_bytes": float(psutil.Process().memory_info().rss),
        "memory_free_bytes": float(psutil.virtual_memory().available),
    }


def unsupported(device: torch.device, precision: str) -> str | None:
    """Why the device cannot train in this precision, and the remedy; None if it can."""
    import torch

    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name(device)} has no bf16. Use precision=fp16 or precision=fp32."
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        # The same test as DeepSpeed's CPU accelerator, so that its own refusal never comes first.
        return "This processor has no fp16 arithmetic (avx512_fp16 or amx_fp16). Use precision=bf16 or precision=fp32."
    return None


def supported_precisions(device: torch.device) -> list[str]:
    """The precisions that the device can train in."""
    return [precision for precision in ("fp32", "bf16", "fp16") if unsupported(device, precision) is None]
