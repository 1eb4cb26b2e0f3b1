"""The learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from configs.schema import ScheduleConfig

WSD_DECAY_SHARE = (
    0.2  # of all steps, where `decay_steps` is not set (Hu et al. 2024, MiniCPM, arXiv:2404.06395: 10-20 %)
)


def lr_at(config: ScheduleConfig, base_lr: float, step: int, steps: int) -> float:
    """Learning rate of `step` (0-based) of `steps`: a linear rise over `warmup_steps`, then the schedule's shape.

    The rise begins above zero, at base_lr / warmup_steps, and every shape but `constant` ends, at the last step,
    at base_lr * min_lr_ratio. Beyond the last step it stays there.

    constant: base_lr. linear, cosine: from base_lr (Loshchilov & Hutter 2017, arXiv:1608.03983).
    wsd: base_lr until the last `decay_steps`, then linear (warmup-stable-decay).
    """
    if step < config.warmup_steps:
        return base_lr * (step + 1) / config.warmup_steps
    decay_begin = config.warmup_steps
    if config.name == "wsd":
        decay_steps = config.decay_steps or max(1, round(WSD_DECAY_SHARE * steps))
        decay_begin = max(decay_begin, steps - 1 - decay_steps)
    decayed = _progress(step, decay_begin, steps - 1)
    if config.name == "constant":
        share = 1.0
    elif config.name == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * decayed))
    else:
        share = 1 - decayed
    return base_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def _progress(step: int, begin: int, end: int) -> float:
    """Where `step` lies between `begin` (0) and `end` (1)."""
    if step <= begin:
        return 0.0
    return min(1.0, (step - begin) / (end - begin)) if end > begin else 1.0
