"""The bytes that a worker will hold at its peak, by part, before anything is launched.

A step of the run's own model and task is run with fake tensors (torch's FakeTensorMode: shapes, types and lifetimes,
but no values), so that autograd itself tells which activations live when; around it trainer/zero allocates
what DeepSpeed does at the config's ZeRO stage. trainer/storages.py adds up what is alive, and the peak is the largest
sum. It takes seconds and little memory at any size of model, on any machine.

Parts, each with what is temporary in it: weights (stage 3: gathered ones too), gradients, optimizer (fp32 masters,
moments, the average of the weights), activations (with inputs, and what operations need for a moment), logits (of
tasks that have them, and their gradient), buffers (communication; the snapshot of a checkpoint, on the host), heap (on
a CPU: what malloc keeps of what was freed, trainer/malloc.py), and base: the process before it has a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.schema import RunConfig
from trainer import optimizers
from trainer.bound import BoundModel, BoundTask
from trainer.deepspeed_config import LARGEST_BUCKET
from trainer.example_batch import example_batch
from trainer.initialization import materialize
from trainer.parts.cross_entropy import as_on_gpu
from trainer.shapes import Logits, MaskedLogits
from trainer.storages import LogitsShape, Storages
from trainer.torch_heap import KEPT_BYTES
from trainer.zero import Handling, handling
from trainer.zero.cut import Cut

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "heap")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Resident after a worker's imports and first operations: what the smallest models take beside their tensors, which is
# 468 (GPT) to 480 MiB (LSTM), less what is followed in the heap.
CPU_BASE_BYTES = (474 << 20) - KEPT_BYTES
STEPS_UNTIL_SETTLED = 3  # until malloc holds no more than before
# What CUDA and NCCL take beside torch's allocator: a context with its kernels, and channels. Not measured here.
GPU_BASE_BYTES = 1 << 30


@dataclass(frozen=True)
class Dispatched:
    """Operations of a worker's micro-batch, forward and backward, and of its update; tensors that are trained."""

    micro_batch: int
    update: int
    parameters: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker at its peak.

    device: by part, where it computes. host: what lies in the host's memory instead (offload, snapshots). On a CPU
    both are one memory, and are those of one moment. base: the process itself; on a GPU beside torch's allocator.
    dispatched: what the host has to start for it, which the same step tells.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    base: int
    on_gpu: bool
    dispatched: Dispatched

    @property
    def tensors(self) -> int:
        """Of tensors alone: what torch.cuda.max_memory_allocated says of a GPU."""
        return sum(self.device.values()) + (0 if self.on_gpu else sum(self.host.values()))

    @property
    def peak(self) -> int:
        """All that the device has to have."""
        return self.tensors + self.base

    @property
    def measurable(self) -> int:
        """What a worker measures of itself: its process on a CPU, torch's allocations on a GPU."""
        return self.tensors if self.on_gpu else self.peak


def predict_memory(
    model: BoundModel,
    task: BoundTask,
    config: RunConfig,
    world_size: int,
    *,
    on_gpu: bool,
    follow_malloc: bool = True,
) -> Memory:
    """Of rank 0 of `world_size` workers, from its engine's making to its last step.

    follow_malloc: on a CPU, the peak is that of all that malloc holds; else that of tensors, and nothing is "heap".
    """
    storages = Storages(one_memory=not on_gpu, follow_malloc=follow_malloc and not on_gpu)
    batch = example_batch(task, config.batch.micro_batch_size)
    try:
        dispatched = _follow(storages, model, task, config, world_size, batch, on_gpu=on_gpu, with_values=False)
    except (DataDependentOutputException, DynamicOutputShapeException):
        # Shapes follow from values (documents set apart): then whole numbers are computed, the rest stays fake.
        storages = Storages(one_memory=not on_gpu, follow_malloc=follow_malloc and not on_gpu)
        dispatched = _follow(storages, model, task, config, world_size, batch, on_gpu=on_gpu, with_values=True)
    found = storages.peak
    device = {part: found.get((part, False), 0) for part in PARTS}
    host_peak = storages.host_peak if on_gpu else found
    host = {part: host_peak.get((part, True), 0) for part in PARTS if host_peak.get((part, True), 0)}
    return Memory(device, host, GPU_BASE_BYTES if on_gpu else CPU_BASE_BYTES, on_gpu, dispatched)


def _follow(
    storages: Storages,
    model: BoundModel,
    task: BoundTask,
    config: RunConfig,
    size: int,
    batch: Mapping[str, Tensor],
    *,
    on_gpu: bool,
    with_values: bool,
) -> Dispatched:
    """Steps: what is alive in them, and what is dispatched."""
    chunks = as_on_gpu() if on_gpu else contextlib.nullcontext()
    with torch.device("meta"):  # as the engine does; what a model reads while it is built is then no fake tensor's
        module = model.build()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[config.precision])
    with chunks, FakeTensorMode(allow_non_fake_inputs=True) as fake:
        materialize(module, lambda _name, _values, _generator: None, seed=config.seed)
        fake.allow_non_fake_inputs = with_values
        for parameter in module.parameters():
            storages.assign("weights", parameter, size=0 if config.zero.stage == 3 else None)
        for buffer in module.buffers():
            storages.assign("weights", buffer)
        storages.logits = _logits_shape(model, module)
        inputs = dict(batch) if with_values else {name: fake.from_tensor(each) for name, each in batch.items()}
        for each in inputs.values():
            storages.assign("activations", each)
        workspaces = contextlib.nullcontext() if on_gpu else _OneDnn(storages)
        with storages, workspaces, _WholeNumbers() if with_values else contextlib.nullcontext():
            step = _Step(storages, module, config, size, on_gpu=on_gpu)
            if on_gpu:
                step.update_alone()
            saves = _saves_before_the_end(config)
            # A second micro-batch meets the gradients of the first; stage 3 keeps room for them from the start.
            count = 1 if config.zero.stage == 3 else min(config.accumulation(size), 2)
            for number in range(1 if on_gpu else STEPS_UNTIL_SETTLED):
                if saves and (on_gpu or number == 1):
                    step.take_snapshot()
                for micro_batch in range(count):
                    before_micro_batch = storages.operations
                    step.forward_backward(task, inputs, last=micro_batch + 1 == count)
                before_update = storages.operations
                step.update()
            dispatched = Dispatched(
                micro_batch=before_update - before_micro_batch,
                update=storages.operations - before_update,
                parameters=sum(parameter.requires_grad for parameter in module.parameters()),
            )
            if not saves:
                step.take_snapshot()
    return dispatched


def _logits_shape(model: BoundModel, module: nn.Module) -> LogitsShape | None:
    """How logits are told from other tensors: their last axis, and that no parameter has as many elements."""
    if not isinstance(model.output, Logits | MaskedLogits):
        return None
    return LogitsShape(model.output.size, frozenset(parameter.numel() for parameter in module.parameters()))


class _OneDnn(TorchDispatchMode):
    """What oneDNN takes on a CPU, of which fake tensors know nothing.

    Recurrent layers get the workspace that fake ones lack, which their backward pass reads: by its
    src/cpu/rnn/rnn_utils.cpp gates twice (once in fp32), and layer, iteration and cell states with their gradients;
    within 15 % of what torch 2.13 makes.

    Convolutions copy into a layout of their own for a moment: forward as much as the larger of input and output,
    backward as much as both, or with a stride twice the input. So measured in torch 2.13 (fp32 and bf16, kernels of 1
    and 3).
    """

    def __init__(self, storages: Storages) -> None:
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mkldnn_rnn_layer.default:
            (length, rows, width), each = found[0].shape, found[0].element_size()
            gates = args[1].shape[0] * length * (4 + each)
            states = width * (length + 1) * (4 * each + 2 * 4)
            return (*found[:3], torch.empty(rows * (gates + states), dtype=torch.uint8))
        if func is torch.ops.aten.convolution.default:
            self._storages.for_a_moment(max(args[0].nbytes, found.nbytes))
        if func is torch.ops.aten.convolution_backward.default:
            made, given, strided = args[0].nbytes, args[1].nbytes, max(args[4]) > 1
            self._storages.for_a_moment(2 * given if strided else given + made)
        return found


class _WholeNumbers(TorchDispatchMode):
    """Computes what has values, and makes new tensors of whole numbers with values; what is fake stays fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        dtype = kwargs.get("dtype")
        counts = func.overloadpacket is torch.ops.aten.arange and all(isinstance(each, int) for each in args)
        whole = counts if dtype is None else not (dtype.is_floating_point or dtype.is_complex)
        if any(isinstance(each, FakeTensor) for each in tensors) or not (tensors or whole):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


class _Step:
    """A step in fake tensors: the optimizer, and what DeepSpeed makes around it."""

    def __init__(self, storages: Storages, module: nn.Module, config: RunConfig, size: int, *, on_gpu: bool) -> None:
        self._storages, self._module, self._config = storages, module, config
        named = dict(module.named_parameters())
        numel = sum(parameter.numel() for parameter in named.values())
        shapes = {name: parameter.shape for name, parameter in named.items()}
        self._optimizer = optimizers.build(config.optimizer, named.items(), shapes, optimizers.tables(module))
        stage, offload = config.zero.stage, config.zero.offload_optimizer
        cut = Cut(
            groups=[list(group["params"]) for group in self._optimizer.param_groups],
            size=size,
            bucket=min(LARGEST_BUCKET, numel + numel % 2),
            dtype=DTYPES[config.precision],
            offload=offload,
            overlap=on_gpu and stage >= 2,
            as_touched=not on_gpu,
        )
        self._host, self._size = offload, size
        self._zero: Handling = handling(storages, cut, stage, module)
        self._last = False
        for group, flats in zip(self._optimizer.param_groups, self._zero.flats, strict=True):
            group["params"] = flats
        self._groups = list(self._optimizer.param_groups)
        for parameter in named.values():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda each: self._zero.gradient(each, last=self._last))
        self.snapshot: list[Tensor] = []
        self._average: list[Tensor] = []
        if config.optimizer.ema_decay is not None:
            with storages.part("optimizer", host=offload):
                self._average = [torch.empty_like(flat) for group in self._groups for flat in group["params"]]

    def update_alone(self) -> None:
        """The first update, whose state stays: no gradients, since only what is left counts."""
        flats = [flat for group in self._groups for flat in group["params"]]
        held = [flat.grad for flat in flats]
        for flat in flats:
            flat.grad = torch.empty_like(flat)
        self._do(None)
        for flat, gradient in zip(flats, held, strict=True):
            flat.grad = gradient
        self._storages.forget_peak()

    def _do(self, number: int | None) -> None:
        with self._storages.part("optimizer", host=self._host):
            self._optimizer.param_groups = self._groups if number is None else [self._groups[number]]
            self._optimizer.step()
            self._optimizer.param_groups = self._groups

    def take_snapshot(self) -> None:
        """The host's copy of a worker's share of the state (trainer/snapshot.py), kept from the first save on."""
        flats = [flat for group in self._groups for flat in group["params"]]
        state = [each for flat in flats for each in self._optimizer.state[flat].values() if isinstance(each, Tensor)]
        share = self._size if self._config.zero.stage == 0 else 1
        size = sum(each.numel() * each.element_size() for each in (*flats, *state, *self._average)) // share
        with self._storages.part("buffers", host=True, where="mapping"):
            self.snapshot = [torch.empty(size, dtype=torch.uint8)]

    def forward_backward(self, task: BoundTask, batch: Mapping[str, Tensor], *, last: bool) -> None:
        """One micro-batch; last: of the step."""
        self._last = last
        getattr(self._zero, "begin", lambda: None)()
        loss = task.loss(self._module, batch)
        loss.backward()
        self._zero.after_backward(last=last)

    def update(self) -> None:
        """The optimizer's step."""
        with torch.no_grad():
            self._zero.update(self._do)


def _saves_before_the_end(config: RunConfig) -> bool:
    every = config.checkpoint.interval
    return every.steps is None or every.steps < config.steps
