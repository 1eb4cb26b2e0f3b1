"""What DeepSpeed (0.19) allocates around a step, told in fake tensors: the tensors that it makes, in its order.

Each class of this package stands for one of DeepSpeed's optimizers, as trainer/deepspeed_config.py configures it, and
is named after it. `trainer/memory.py` runs a step with them under Storages, which adds up what lives when. The parts
are those of Rajbhandari et al. 2020 (ZeRO), section 3: with P parameters in b bytes on w workers, weights b P,
gradients, and fp32 master weights with two moments 12 P, of which stage 1 cuts the last by w, stage 2 the gradients
too, and stage 3 all; the buffers are DeepSpeed's own and are read from its source, which each method names.
"""

from __future__ import annotations

import torch
from torch import nn

from trainer.storages import Storages
from trainer.zero.cut import Cut
from trainer.zero.stage_1_and_2 import ZeroOptimizer
from trainer.zero.stage_3 import ZeroOptimizerStage3
from trainer.zero.whole import BF16Optimizer, Replicated

Handling = Replicated | BF16Optimizer | ZeroOptimizer | ZeroOptimizerStage3


def handling(storages: Storages, cut: Cut, stage: int, module: nn.Module) -> Handling:
    """DeepSpeed's choice (engine.py, _do_optimizer_sanity_check)."""
    if stage == 3:
        return ZeroOptimizerStage3(storages, cut, module)
    storages.import_deepspeed()
    if stage == 0:
        return Replicated(storages, cut)
    if stage == 1 and cut.dtype == torch.bfloat16 and not cut.offload:
        return BF16Optimizer(storages, cut)
    return ZeroOptimizer(storages, cut, stage=stage)
