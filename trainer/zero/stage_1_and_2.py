"""Stages 1 and 2, but for stage 1 in bf16 without offload."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from trainer.storages import Storages
from trainer.zero.cut import Cut, joined, masters


class ZeroOptimizer:
    """Stages 1 and 2 (runtime/zero/stage_1_and_2.py), but for stage 1 in bf16 without offload."""

    def __init__(self, storages: Storages, cut: Cut, *, stage: int) -> None:
        self._storages, self._cut, self._stage = storages, cut, stage
        self._low = cut.dtype != torch.float32
        self._sums_in_fp32 = self._low and stage == 1  # use_grad_accum_attribute
        self._weights = joined(storages, cut)
        self.flats = masters(storages, cut)
        largest = max(parameter.numel() for group in cut.groups for parameter in group)
        self._kept: list[Tensor] = []
        if cut.offload:
            with storages.part("buffers", host=True):
                self._kept += [torch.zeros(cut.share(group), dtype=cut.dtype) for group in cut.groups]
                self._kept.append(torch.zeros(largest, dtype=cut.dtype))
            with storages.part("buffers"):
                self._kept.append(torch.zeros(largest, dtype=cut.dtype))
            with storages.part("gradients", host=True):
                for (flat,) in self.flats:
                    flat.grad = torch.zeros_like(flat)
        self._owned = [self._owned_of(group) for group in cut.groups]  # by this rank, the first, wholly or in part
        self._in_fp32: dict[nn.Parameter, Tensor] = {}
        self._on_host: dict[nn.Parameter, Tensor] = {}
        self._bucket: list[Tensor] = []
        self._waiting: list[tuple[int, nn.Parameter]] = []
        self._filled = 0
        self._partition: Tensor | None = None  # grads_in_partition
        self._partition_filled = 0
        self._shares: dict[int, Tensor] = {}  # by group: the gradients' own share in fp32, where weights are not
        self._sums: dict[int, list[Tensor]] = {}  # by group: that of the micro-batches so far
        self._group_of = {parameter: number for number, group in enumerate(cut.groups) for parameter in group}
        self._num_backward = 0

    def _owned_of(self, group: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        begins = accumulate((parameter.numel() for parameter in group), initial=0)
        share = self._cut.share(group)
        return [parameter for parameter, begin in zip(group, begins, strict=False) if begin < share]

    def gradient(self, parameter: nn.Parameter, *, last: bool) -> None:
        """process_gradients: buckets are made with the first one; stage 2 fills and reduces them at once."""
        assert parameter.grad is not None
        self._storages.assign("gradients", parameter.grad)
        if not (self._bucket or self._cut.as_touched):
            self._extend_bucket(self._cut.bucket * (1 + self._cut.overlap))
        if self._sums_in_fp32:
            with self._storages.part("gradients"):
                converted = parameter.grad.float()
            self._in_fp32.setdefault(parameter, converted)
            parameter.grad = None
        if self._stage == 2:
            self._put_into_bucket(parameter, last=last)

    def _extend_bucket(self, numel: int) -> None:
        with self._storages.part("buffers", where="mapping" if self._cut.as_touched else "heap"):
            self._bucket.append(torch.empty(numel, dtype=torch.float32 if self._sums_in_fp32 else self._cut.dtype))

    def _put_into_bucket(self, parameter: nn.Parameter, *, last: bool) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads."""
        if self._filled + parameter.numel() > self._cut.bucket:
            self._reduce(last=last)
        self._filled += parameter.numel()
        if self._filled <= self._cut.bucket:
            short = self._filled - sum(each.numel() for each in self._bucket)
            if short > 0:
                self._extend_bucket(short)
            gradient = self._in_fp32[parameter] if self._sums_in_fp32 else parameter.grad
            assert gradient is not None
            gradient.data = gradient.new_empty(0)  # it lies in the bucket now
        self._waiting.append((self._group_of[parameter], parameter))

    def _reduce(self, *, last: bool) -> None:
        """reduce_ipg_grads: average_tensor on a copy of the bucket, in fp32; then copy_grads_in_partition."""
        if not self._waiting:
            return
        with self._storages.part("buffers"):
            self._all_reduce()
        for number, parameter in self._waiting:
            owned = any(parameter is each for each in self._owned[number])
            if not owned and self._stage == 2:
                parameter.grad = None
            elif owned:
                self._keep_share(parameter, last=last)
        self._waiting, self._filled = [], 0

    def _all_reduce(self) -> None:
        """allreduce_bucket flattens its slices, which is a copy unless there is only one, and converts them."""
        slices: list[tuple[int, int]] = []
        for number, parameter in self._waiting:
            slices += self._slices(number, parameter)
        if not self._low:  # slices of one owner are joined
            slices = [(owner, sum(n for _, n in joined)) for owner, joined in groupby(slices, key=lambda each: each[0])]
        elif not self._shares:
            with self._storages.part("gradients"):
                self._shares = {number: torch.zeros(flat.numel()) for number, (flat,) in enumerate(self.flats)}
        dtype = torch.float32 if self._sums_in_fp32 else self._cut.dtype
        flat = torch.empty(self._filled if len(slices) > 1 else 0, dtype=dtype)
        if dtype != torch.float32:
            torch.empty(self._filled)
        del flat

    def _slices(self, number: int, parameter: nn.Parameter) -> Iterable[tuple[int, int]]:
        """(owner, elements) of the pieces of a parameter that different workers own."""
        share, begin = self._cut.share(self._cut.groups[number]), 0
        for each in self._cut.groups[number]:
            if each is parameter:
                break
            begin += each.numel()
        end = begin + parameter.numel()
        for owner in range(begin // share, (end - 1) // share + 1):
            yield owner, min(end, (owner + 1) * share) - max(begin, owner * share)

    def _keep_share(self, parameter: nn.Parameter, *, last: bool) -> None:
        if self._low and (self._cut.offload or self._sums_in_fp32):
            if last:
                self._in_fp32.pop(parameter, None)
                parameter.grad = None
            return
        if self._low:
            return
        if self._cut.offload:
            summed = self._num_backward > 0 or not last
            if summed and parameter not in self._on_host:  # async_accumulate_grad_in_cpu_via_gpu
                with self._storages.part("gradients", host=True):
                    self._on_host[parameter] = torch.zeros(parameter.numel(), dtype=self._cut.dtype)
            if last:
                parameter.grad = None
            return
        if self._partition is None:
            numel = sum(each.numel() for owned in self._owned for each in owned)
            with self._storages.part("gradients"):
                self._partition = torch.empty(numel)
            self._partition_filled = 0
        assert parameter.grad is not None
        place = self._partition.narrow(0, self._partition_filled, parameter.numel())
        parameter.grad.data = place.view_as(parameter)
        self._partition_filled += parameter.numel()

    def after_backward(self, *, last: bool) -> None:
        """reduce_gradients (stage 1, once a step) and independent_gradient_partition_epilogue."""
        if self._stage == 1 and not last:
            self._num_backward += 1
            return
        if self._stage == 1:
            for group in self._cut.groups:
                for parameter in group:
                    if parameter.grad is not None or parameter in self._in_fp32:
                        self._put_into_bucket(parameter, last=last)
        self._reduce(last=last)
        if not self._cut.offload and not self._low:
            for number, owned in enumerate(self._owned):
                self._sums.setdefault(number, [each.grad for each in owned if each.grad is not None])
        self._partition = None
        self._bucket = []
        for group in self._cut.groups:
            for parameter in group:
                parameter.grad = None
        self._num_backward = 0 if last else self._num_backward + 1

    def update(self, step: Any) -> None:
        """step: one group after the other; the gradients' share is flattened, which is a copy."""
        for number, (flat,) in enumerate(self.flats):
            if not self._cut.offload:
                with self._storages.part("gradients"):
                    if self._low:
                        flat.grad = self._shares.pop(number)
                    else:
                        flat.grad = torch.empty_like(flat)
                self._sums.pop(number, None)
            step(number)
            if not self._cut.offload:
                flat.grad = None
        self._shares.clear()
        self._in_fp32.clear()
