"""Where a DeepSpeed engine keeps the fp32 master weights that this rank owns.

DeepSpeed keeps masters in flat tensors, differently at each ZeRO stage:

    stage 0 (fp32)  the parameters themselves, replicated
    stages 1, 2     a parameter group is flattened and cut into world_size equal pieces:
                    single_partition_of_fp32_groups, or fp32_groups_flat_partition in BF16_Optimizer (stage 1 with
                    bf16 and fp32 accumulation)
    stage 3         each parameter is cut into world_size equal pieces; a rank's pieces of a sub-group lie one after
                    the other in fp32_partitioned_groups_flat

Here all of them are Parts: elements of a named parameter, at an offset of a flat tensor. The optimizer's state is keyed
by that flat tensor and laid out like it. Reads DeepSpeed's attributes (0.19) without importing it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.errors import UsageError

if TYPE_CHECKING:
    from trainer.engine import Engine


@dataclass(frozen=True)
class Part:
    """What this rank holds of one trainable parameter.

    It is elements [start, start + numel) of the flattened parameter (of full shape `shape`), and lies at `offset` of
    `flat`, the tensor that the optimizer steps.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int


def parts_of(engine: Engine) -> list[Part]:
    """What this rank holds of each trainable parameter, in a fixed order. At stage 0 that is all of it."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    zero = engine.deepspeed.optimizer
    if isinstance(zero, torch.optim.Optimizer):
        trained = [p for p in engine.module.parameters() if is_trained(p)]
        return [Part(names[id(p)], p, tuple(p.shape), 0, p.numel(), p, 0) for p in trained]
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _stage_3_parts(zero, names)
    if hasattr(zero, "single_partition_of_fp32_groups"):
        # Not by the parameters' _hp_mapping: it is wrong with round_robin_gradients, which reorders a group.
        groups = [
            list(zip(group, offsets, strict=True))
            for group, offsets in zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        ]
        return _flattened_group_parts(zero, groups, zero.single_partition_of_fp32_groups, names)
    if hasattr(zero, "fp32_groups_flat_partition"):
        groups = [
            list(zip(group, itertools.accumulate((p.numel() for p in group), initial=0), strict=False))
            for group in zero.bf16_groups
        ]
        return _flattened_group_parts(zero, groups, zero.fp32_groups_flat_partition, names)
    raise UsageError(
        f"DeepSpeed's {type(zero).__name__} keeps no state that a checkpoint can hold. Use zero.stage 1, 2 or 3, "
        "or zero.stage 0 with precision fp32."
    )


def _flattened_group_parts(
    zero: Any, groups: list[list[tuple[nn.Parameter, int]]], flats: list[Tensor], names: dict[int, str]
) -> list[Part]:
    """groups: (parameter, its offset in the flattened group). flats: this rank's equal piece of each group."""
    parts = []
    for group, flat, process_group in zip(groups, flats, zero.real_dp_process_group, strict=True):
        first = torch.distributed.get_rank(process_group) * flat.numel()
        for parameter, offset in group:
            start = max(first - offset, 0)
            numel = min(first + flat.numel() - offset, parameter.numel()) - start
            if numel > 0:
                shape, place = tuple(parameter.shape), offset + start - first
                parts.append(Part(names[id(parameter)], parameter, shape, start, numel, flat, place))
    return parts


def _stage_3_parts(zero: Any, names: dict[int, str]) -> list[Part]:
    parts = []
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            start, numel = _stage_3_range(parameter)
            if numel > 0:
                parts.append(Part(names[id(parameter)], parameter, full_shape(parameter), start, numel, flat, offset))
            offset += parameter.partition_numel()
    return parts


def _stage_3_range(parameter: Any) -> tuple[int, int]:
    """(start, number of elements) of this rank's partition, less the padding that makes all partitions equal."""
    length = parameter.partition_numel()
    start = torch.distributed.get_rank(parameter.ds_process_group) * length
    return start, max(0, min(length, parameter.ds_numel - start))


def gradients_of(engine: Engine) -> list[Tensor]:
    """What this rank holds of the reduced gradients, fp32, between the last backward pass and the update.

    At stage 0 all of them; above that its share, with zeros where a share is padded.
    """
    zero = engine.deepspeed.optimizer
    if isinstance(zero, torch.optim.Optimizer):
        return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if hasattr(zero, "fp32_groups_gradient_flat_partition"):
        return list(zero.fp32_groups_gradient_flat_partition)
    return [gradient for group in zero.averaged_gradients.values() for gradient in group]


def share(offset: int, numel: int, total: int, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of a tensor lying at `offset` of `total` replicated elements that falls in this rank's share."""
    first, last = total * rank // size, total * (rank + 1) // size
    start = min(max(first - offset, 0), numel)
    return start, max(start, min(last - offset, numel))


def share_of_parts(parts: list[Part], rank: int, size: int) -> list[Part]:
    """What rank of size is to write of parts that every rank holds: contiguous, of equal length to one element."""
    total, offset, shares = sum(part.numel for part in parts), 0, []
    for part in parts:
        start, stop = share(offset, part.numel, total, rank, size)
        offset += part.numel
        if stop > start:
            shares.append(Part(part.name, part.parameter, part.shape, start, stop - start, part.flat, start))
    return shares


def frozen_parts(engine: Engine) -> Iterator[tuple[str, int, Tensor]]:
    """(name, start, live tensor) of what this rank holds of each frozen parameter: all of it below stage 3."""
    for name, parameter in engine.module.named_parameters():
        if is_trained(parameter):
            continue
        if hasattr(parameter, "ds_tensor"):
            start, numel = _stage_3_range(parameter)
            if numel > 0:
                yield name, start, parameter.ds_tensor[:numel]
        else:
            yield name, 0, parameter.detach()


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also where stage 3 keeps a partition in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_trained(parameter: nn.Parameter) -> bool:
    """As DeepSpeed decides: what has no element is left out of the optimizer, like what is frozen."""
    return parameter.requires_grad and math.prod(full_shape(parameter)) > 0


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state; the others are recomputed by whoever builds the model."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers() if name not in transient}
