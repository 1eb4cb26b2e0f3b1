"""What DeepSpeed (0.19) allocates around a step, told in fake tensors: the tensors that it makes, in its order.

Each class below stands for one of DeepSpeed's optimizers, as trainer/deepspeed_config.py configures it, and is named
after it. `trainer/memory.py` runs a step with them under Storages, which adds up what lives when. The parts are those
of Rajbhandari et al. 2020 (ZeRO), section 3: with P parameters in b bytes on w workers, weights b P, gradients, and
fp32 master weights with two moments 12 P, of which stage 1 cuts the last by w, stage 2 the gradients too, and stage 3
all; the buffers are DeepSpeed's own and are read from its source, which each method names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from trainer.storages import Storages

ALLREDUCE_ELEMENTS = 500_000_000  # stage 0 and BF16_Optimizer flatten so many for one all-reduce: MEMORY_OPT_ALLREDUCE
KEPT_ELEMENTS = 500_000_000  # stage 3 keeps what is used again within 10^9 elements: on the way there and back


@dataclass(frozen=True)
class Cut:
    """How the state is cut and kept.

    groups: parameters as the optimizer groups them. size: workers. bucket: elements of a communication buffer.
    dtype: of the weights. offload: optimizer state and gradients' share on the host. overlap: two buckets.
    as_touched: a buffer takes memory as it is filled, since on a CPU the system gives pages when they are written.
    """

    groups: Sequence[Sequence[nn.Parameter]]
    size: int
    bucket: int
    dtype: torch.dtype
    offload: bool
    overlap: bool
    as_touched: bool

    def share(self, group: Sequence[nn.Parameter]) -> int:
        """Elements of a group that a worker owns, padding included: flattened, aligned to 2 w, cut in w."""
        numel = sum(parameter.numel() for parameter in group)
        return -(-numel // (2 * self.size)) * 2


class Replicated:
    """Stage 0: torch's optimizer over the parameters themselves (runtime/engine.py).

    An all-reduce flattens all gradients, also where a worker is alone.
    """

    def __init__(self, storages: Storages, cut: Cut) -> None:
        self._storages = storages
        self._cut = cut
        self.flats: list[list[nn.Parameter]] = [list(group) for group in cut.groups]

    def gradient(self, parameter: nn.Parameter, *, last: bool) -> None:  # noqa: ARG002
        """What is done when a parameter's gradient of one micro-batch is complete; last: of the step's last one."""
        assert parameter.grad is not None
        self._storages.assign("gradients", parameter.grad)

    def after_backward(self, *, last: bool) -> None:
        """What is done when all are."""
        if last:
            gradients = [each.grad for group in self._cut.groups for each in group if each.grad is not None]
            _all_reduce(self._storages, gradients)

    def update(self, step: Any) -> None:
        """The optimizer's step (`step(n)` does that of group n), and what it needs around it."""
        step(None)
        for group in self._cut.groups:
            for parameter in group:
                parameter.grad = None


class BF16Optimizer:
    """Stage 1 in bf16 (runtime/bf16_optimizer.py): fp32 gradients of all parameters, beside bf16 ones that stay."""

    def __init__(self, storages: Storages, cut: Cut) -> None:
        self._storages, self._cut = storages, cut
        self.flats = _masters(storages, cut)
        with storages.part("gradients"):
            self._sums = [torch.zeros(cut.share(group) * cut.size) for group in cut.groups]

    def gradient(self, parameter: nn.Parameter, *, last: bool) -> None:  # noqa: ARG002
        """It stays, and is zeroed later (clear_lp_grads)."""
        assert parameter.grad is not None
        self._storages.assign("gradients", parameter.grad)

    def after_backward(self, *, last: bool) -> None:
        """update_hp_grads: one parameter's gradient at a time in fp32; then the all-reduce."""
        with self._storages.part("buffers"):
            for group in self._cut.groups:
                for parameter in group:
                    if parameter.grad is not None:
                        parameter.grad.float()
        if last:
            _all_reduce(self._storages, self._sums)

    def update(self, step: Any) -> None:
        """The fp32 gradients' own share is what the optimizer steps with."""
        for (flat,), total in zip(self.flats, self._sums, strict=True):
            flat.grad = total[: flat.numel()]
        step(None)


class ZeroOptimizer:
    """Stages 1 and 2 (runtime/zero/stage_1_and_2.py), but for stage 1 in bf16 without offload."""

    def __init__(self, storages: Storages, cut: Cut, *, stage: int) -> None:
        self._storages, self._cut, self._stage = storages, cut, stage
        self._low = cut.dtype != torch.float32
        self._sums_in_fp32 = self._low and stage == 1  # use_grad_accum_attribute
        self.flats = _masters(storages, cut)
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
        with self._storages.part("buffers"):
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
        self._group_sizes = [sum(sizes[parameter] for parameter in group) for group in cut.groups]
        with storages.part("weights"):
            partitions = [torch.empty(numel, dtype=cut.dtype) for numel in self._group_sizes]
        with storages.part("optimizer", host=cut.offload):
            # A copy also in fp32: DeepSpeed compares a device with its name to tell whether they may be one.
            self.flats = [[nn.Parameter(torch.empty(part.numel()))] for part in partitions]
        with storages.part("buffers"):
            self._bucket = torch.empty(cut.bucket)
        with storages.part("gradients", host=cut.offload):
            self._share = torch.zeros(sum(own))
            if cut.offload:
                for (flat,) in self.flats:
                    flat.grad = torch.zeros_like(flat)
        self._partitions = partitions
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
                with self._storages.part("weights"):
                    held = torch.empty(numel, dtype=self._cut.dtype)
                self._gathered.update(dict.fromkeys(parameters, held))

        def after(*_: object) -> None:
            self._left -= numel
            if self._left > KEPT_ELEMENTS:
                self._release(parameters)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

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


Handling = Replicated | BF16Optimizer | ZeroOptimizer | ZeroOptimizerStage3


def handling(storages: Storages, cut: Cut, stage: int, module: nn.Module) -> Handling:
    """DeepSpeed's choice (engine.py, _do_optimizer_sanity_check)."""
    if stage == 0:
        return Replicated(storages, cut)
    if stage == 3:
        return ZeroOptimizerStage3(storages, cut, module)
    if stage == 1 and cut.dtype == torch.bfloat16 and not cut.offload:
        return BF16Optimizer(storages, cut)
    return ZeroOptimizer(storages, cut, stage=stage)


def _masters(storages: Storages, cut: Cut) -> list[list[nn.Parameter]]:
    """A worker's fp32 share of each group."""
    with storages.part("optimizer", host=cut.offload):
        return [[nn.Parameter(torch.empty(cut.share(group)))] for group in cut.groups]


def _all_reduce(storages: Storages, gradients: Sequence[Tensor]) -> None:
    """buffered_allreduce_fallback: flattened together, up to ALLREDUCE_ELEMENTS at a time, reduced, copied back."""
    small: list[Tensor] = []
    with storages.part("buffers"):
        for gradient in gradients:
            small.append(gradient)
            if sum(each.numel() for each in small) > ALLREDUCE_ELEMENTS:
                _flatten_dense_tensors(small)
                small = []
        if small:
            _flatten_dense_tensors(small)
