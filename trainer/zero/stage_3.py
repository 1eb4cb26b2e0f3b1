"""Stage 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.storages import Storages
from trainer.zero.cut import Cut

KEPT_ELEMENTS = 500_000_000  # what is used again within 10^9 elements is kept: on the way there and back


class ZeroOptimizerStage3:
    """Stage 3 (runtime/zero/stage3.py, partitioned_param_coordinator.py, runtime/comm/coalesced_collectives.py).

    Alone, a worker's weights are its partition. Else a module's are gathered before its forward pass, and stay until
    their last use if that is near (stage3_max_reuse_distance, 10^9 elements).
    """

    def __init__(self, storages: Storages, cut: Cut, module: nn.Module) -> None:
        self._storages, self._cut = storages, cut
        self._parameters = [parameter for group in cut.groups for parameter in group]
        own = [-(-parameter.numel() // cut.size) for parameter in self._parameters]
        sizes = dict(zip(self._parameters, own, strict=True))
        group_sizes = [sum(sizes[parameter] for parameter in group) for group in cut.groups]
        with storages.part("weights"):
            self._pieces = [each for part in reversed(list(module.modules())) for each in _made_and_cut(part, cut)]
            storages.import_deepspeed()
            self._partition = torch.empty(sum(own), dtype=cut.dtype)
        for piece in self._pieces:
            piece.data = piece.new_empty(0)  # it is a view of the partition from now on
        with storages.part("optimizer", host=cut.offload):
            # A copy also in fp32: DeepSpeed compares a device with its name to tell whether they may be one.
            self.flats = [[nn.Parameter(torch.empty(numel))] for numel in group_sizes]
        with storages.part("buffers"):
            self._bucket = torch.empty(cut.bucket)
        with storages.part("gradients", host=cut.offload):
            self._share = torch.zeros(sum(own))
            if cut.offload:
                for (flat,) in self.flats:
                    flat.grad = torch.zeros_like(flat)
        for numel in own:  # each is gathered once, also by a worker alone: create_reduce_and_remove_grad_hooks
            self._gather(numel * cut.size)
        self._gathered: dict[nn.Parameter, Tensor] = {}
        self._waiting: list[Tensor] = []
        self._filled = 0
        self._left = 0
        if cut.size > 1:
            for each in module.modules():
                own_parameters = list(each.parameters(recurse=False))
                if own_parameters:
                    self._gather_around(each, own_parameters)

    def begin(self) -> None:
        """A forward pass begins."""
        self._left = sum(parameter.numel() for parameter in self._parameters)
        self._gathered.clear()

    def _gather_around(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        numel = sum(parameter.numel() for parameter in parameters)

        def before(*_: object) -> None:
            if not all(parameter in self._gathered for parameter in parameters):
                self._gathered.update(dict.fromkeys(parameters, self._gather(numel)))

        def after(*_: object) -> None:
            self._left -= numel
            if self._left > KEPT_ELEMENTS:
                self._release(parameters)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _gather(self, numel: int) -> Tensor:
        with self._storages.part("weights"):
            gathered = torch.empty(numel, dtype=self._cut.dtype)
        if self._cut.as_touched:  # gloo's own threads gather into a copy (ProcessGroupGloo.cpp, AsyncAllgatherWork)
            with self._storages.part("buffers", where="communication"):
                torch.empty(numel, dtype=self._cut.dtype)
        return gathered

    def _release(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            self._gathered.pop(parameter, None)

    def gradient(self, parameter: nn.Parameter, *, last: bool) -> None:  # noqa: ARG002
        """__add_grad_to_ipg_bucket, and what is reduced when the bucket is full."""
        assert parameter.grad is not None
        self._storages.assign("gradients", parameter.grad)
        self._release([parameter])
        if self._filled and self._filled + parameter.numel() > self._cut.bucket:
            self._reduce()
        if self._filled + parameter.numel() <= self._cut.bucket:
            self._waiting.append(self._bucket.narrow(0, self._filled, parameter.numel()))
        else:
            self._waiting.append(parameter.grad)
        self._filled += parameter.numel()
        parameter.grad = None

    def _reduce(self) -> None:
        """__avg_scatter_grads: the pieces of all are put in the order of their owners, which is a copy."""
        with self._storages.part("buffers"):
            converted = [each.float() for each in self._waiting]
            numel = sum(-(-each.numel() // self._cut.size) * self._cut.size for each in converted)
            ordered = torch.empty(numel if len(converted) > 1 or numel % self._cut.size else 0)
            if self._cut.as_touched:  # gloo reduces and scatters a copy (ProcessGroupGloo.cpp)
                torch.empty(numel)
            del ordered
        self._waiting, self._filled = [], 0

    def after_backward(self, *, last: bool) -> None:  # noqa: ARG002
        """What is still in the bucket is reduced; the weights are given up."""
        if self._waiting:
            self._reduce()
        self._gathered.clear()

    def update(self, step: Any) -> None:
        """step: a group's share of the gradients is flattened, which is a copy."""
        for number, (flat,) in enumerate(self.flats):
            if not self._cut.offload:
                with self._storages.part("gradients"):
                    flat.grad = torch.empty_like(flat)
            step(number)
            if not self._cut.offload:
                flat.grad = None


def _made_and_cut(module: nn.Module, cut: Cut) -> list[Tensor]:
    """This worker's pieces of a module's weights; their first values are made in fp32 (trainer/initialization.py)."""
    whole = [torch.empty(each.shape).to(cut.dtype) for each in module.parameters(recurse=False)]
    return [torch.empty(-(-each.numel() // cut.size), dtype=cut.dtype) for each in whole]
