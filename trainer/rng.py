"""Random numbers of a forward pass, the same at any world size."""

from __future__ import annotations

import hashlib
import struct

import torch


def forward_seed(seed: int, step: int, micro_batch: int) -> int:
    """63-bit seed of one forward pass: a hash, so that neighbouring steps and micro-batches share no stream."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, step, micro_batch), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_forward(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's generators (CPU and this process's GPU) for global micro-batch `micro_batch` of `step`.

    Dropout then depends on the micro-batch alone, not on the rank that runs it or on what ran before.
    """
    value = forward_seed(seed, step, micro_batch)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
