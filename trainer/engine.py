"""The step: forward, backward and update of a model sharded by DeepSpeed. The only file that imports it."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import RunConfig
from trainer import engine_state, optimizers
from trainer.bound import BoundModel, BoundTask
from trainer.deepspeed_config import deepspeed_config
from trainer.device import unsupported
from trainer.distributed import RunningSum, World, all_gather_json, all_sum
from trainer.divergence import Limits, exceeds
from trainer.engine_layout import gradients_of, parts_of
from trainer.exact import ExactGradients, add_nodes
from trainer.initialization import materialize
from trainer.parts.batch_norm import RunningStatistics
from trainer.progress import Progress
from trainer.rng import seed_forward
from trainer.snapshot import Reading
from trainer.stopwatch import Stopwatch
from trainer.upload import Uploads
from trainer.weight_average import WeightAverage

if TYPE_CHECKING:
    from data_pipelines.loader import MicroBatch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepStats:
    """What one step did, the same on every rank but for the times.

    loss: mean over all valid items of the global batch. grad_norm: before clipping, infinite where a gradient is not
    finite (then the weights stay as they were), None where the update was refused for its loss. num_items, num_tokens:
    over all ranks. skipped: fp16 overflowed and its scaler took the update back. votes: whether any rank said yes to
    each.
    forward_s, backward_s, optimizer_s: this rank's own work, without its waits for others (see stopwatch.py).
    checkpoint_s: waited for the copy of a checkpoint.
    """

    loss: float
    grad_norm: float | None
    num_items: int
    num_tokens: int
    skipped: bool
    votes: tuple[bool, ...]
    forward_s: float
    backward_s: float
    optimizer_s: float
    checkpoint_s: float


class Engine:
    """A model with its optimizer, as one of `world.size` workers.

    module: the model. deepspeed: DeepSpeed's engine around it. zero_stage: what ZeRO divides. average: of the weights
    over the steps, exact: what makes gradients' sums exact, where the config asks for them. reading: of a snapshot;
    what changes weights or optimizer state waits for its end.

    Initial weights depend on the seed and each parameter's name alone. At ZeRO-3 they are cut module by module as
    they are made, so that no process ever holds the whole.

    Raises:
        UsageError: the device does not know the precision.
    """

    def __init__(self, model: BoundModel, config: RunConfig, world: World, progress: Progress | None = None) -> None:
        reason = unsupported(world.device, config.precision)
        if reason is not None:
            raise UsageError(f"precision={config.precision}: {reason}")
        assert config.zero.stage > 0 or config.precision == "fp32", "stage 0 keeps no fp32 masters"
        deepspeed = _import_deepspeed()
        with torch.device("meta"):
            self.module = model.build()
        for parameter in self.module.parameters():  # not module.to(): it would round the buffers too
            parameter.data = parameter.data.to(_DTYPES[config.precision])
        self.config = config
        self.world = world
        self.reading = Reading()
        self.zero_stage = config.zero.stage
        self._progress = progress or Progress()
        shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        on_gpu = world.device.type == "cuda"
        num_parameters = sum(shape.numel() for shape in shapes.values())
        settings = deepspeed_config(config, world.size, num_parameters, on_gpu=on_gpu)

        def partition(submodule: nn.Module) -> None:
            deepspeed.zero.Init(module=submodule, config_dict_or_path=settings)

        # DeepSpeed prints its memory use at times.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            materialize(
                self.module,
                model.init_parameter,
                seed=config.seed,
                device=world.device,
                partition=partition if self.zero_stage == 3 else None,
            )
            tables = optimizers.tables(self.module)
            optimizer = optimizers.build(
                config.optimizer,
                self.module.named_parameters(),
                shapes,
                tables,
                exact=config.determinism == "exact",
            )
            self.deepspeed = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)[0]
        if world.size == 1 and (self.zero_stage == 0 or (self.zero_stage == 1 and config.precision == "bf16")):
            # Where each worker has all gradients, one alone would still copy them together and back: 2 % of a step.
            self.deepspeed.enable_backward_allreduce = False
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else WeightAverage([part.flat for part in parts_of(self)], decay)
        self.exact: ExactGradients | None = None
        if config.determinism == "exact":
            if world.size > 4 * config.num_micro_batches:
                raise UsageError(
                    f"determinism=exact: {world.size} workers are more than four for each of the "
                    f"{config.num_micro_batches} micro-batches of a step. Use fewer, or set a smaller "
                    "batch.micro_batch_size."
                )
            self.exact = ExactGradients(self.module, config.num_micro_batches, world.size)
            if self.zero_stage < 3:
                add_nodes(self.module)
        self._num_parameters = num_parameters
        self._statistics = RunningStatistics(self.module)
        self._uploads = Uploads(world.device)

    def train_step(
        self,
        task: BoundTask,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        step: int,
        votes: Sequence[bool] = (),
        limits: Limits | None = None,
    ) -> StepStats:
        """Forward and backward over this rank's micro-batches of `step`, then one update with learning rate `lr`.

        The result is that of one process running all global micro-batches: the gradient of sum(losses) / number of
        valid items over all ranks. Every rank calls it with as many micro-batches; idle ones contribute exactly zero.

        limits: a step whose loss or gradient norm exceeds them leaves everything as it was. None refuses none but
        gradients that are not finite.
        """
        progress = self._progress
        for each in micro_batches:
            task.check(each.tensors)
        batches = [replace(each, tensors=task.idle(each.tensors)) if each.idle else each for each in micro_batches]
        tokens = sum(task.num_tokens(each.tensors) for each in micro_batches if not each.idle)
        items, weights = zip(*(task.items_and_weight(each.tensors) for each in batches), strict=True)
        counts = RunningSum([sum(weights), sum(items), tokens, *votes], torch.device("cpu"))
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        quanta = {} if self.exact is None else dict(self.exact.exponents)
        loss_sum, forward_s, backward_s = self._forward_backward(task, batches, counts, step)
        while self.exact is not None and not self.exact.settle():  # once more with larger quanta: rarely, and once
            self._drop_gradients()
            loss_sum, *_ = self._forward_backward(task, batches, counts, step)
        progress.phase = "optimizer"
        watch, held_s = Stopwatch(), self.reading.waited_s
        loss_total = RunningSum(loss_sum, self.world.device)
        refused, grad_norm = False, None
        if limits is not None:
            refused, grad_norm = self._refused(limits, loss_total.wait()[0] / (counts.wait()[0] or 1.0))
        norm, skipped = self._end_step(refused, quanta)
        grad_norm = norm if grad_norm is None else grad_norm
        weight, num_items, num_tokens, *ayes = counts.wait()
        loss_mean = loss_total.wait()[0] / (weight or 1.0)
        checkpoint_s = self.reading.waited_s - held_s
        return StepStats(
            loss=loss_mean,
            grad_norm=grad_norm,
            num_items=int(num_items),
            num_tokens=int(num_tokens),
            skipped=skipped,
            votes=tuple(aye > 0 for aye in ayes),
            forward_s=forward_s,
            backward_s=backward_s,
            optimizer_s=watch.lap() - checkpoint_s,
            checkpoint_s=checkpoint_s,
        )

    def _end_step(self, refused: bool, quanta: dict[str, int]) -> tuple[float | None, bool]:
        """Update, or leave everything as it was before the step; the norm where it is known, and `skipped`.

        quanta: exact mode's from before the step.
        """
        norm, skipped = None, False
        if refused:
            self._drop_gradients()
        else:
            norm = self._update()
            skipped = self.config.precision == "fp16" and not self.deepspeed.was_step_applied()
            refused = not _finite(norm) and not skipped
        if refused:
            self._statistics.forget()
            if self.exact is not None:
                self.exact.exponents.update(quanta)  # the next step is not to be rounded by this one's peaks
        else:
            self._statistics.fold(self.config.num_micro_batches)
            if self.average is not None and not skipped:
                self.average.update()
        return norm, skipped

    def evaluate(
        self, task: BoundTask, batches: Iterable[MicroBatch], tokenizer: Any = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sums of `task.evaluate` over all batches of all ranks, and its predictions in the order of the batches.

        Without dropout and gradients. Every rank calls it with as many batches. Idle ones are not counted, but run
        where weights are gathered.
        """
        sums: dict[str, float] = {}
        predictions: list[tuple[int, list[dict[str, Any]]]] = []
        with self.inference():
            for batch, tensors in self._uploads.each(self._evaluated(task, batches)):
                self._progress.touch()
                for name, value in task.evaluate(self.module, tensors).items():
                    sums[name] = sums.get(name, 0.0) + (0.0 if batch.idle else value)
                if task.has_predictions:
                    said = task.predict(self.module, tensors, tokenizer)
                    if not batch.idle:
                        predictions.append((batch.index, said))
        names = sorted(sums)
        totals = dict(zip(names, all_sum([sums[name] for name in names]), strict=True))
        if task.has_predictions:
            predictions = sorted(itertools.chain.from_iterable(all_gather_json(predictions)), key=lambda each: each[0])
        return totals, [row for _, rows in predictions for row in rows]

    @contextlib.contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, without gradients, with the average of its weights where there is one.

        Every rank must take part; at ZeRO-3 it must call the model as many times.
        """
        self.module.eval()
        self._swap_average()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self._swap_average()
            self.module.train()

    def _swap_average(self) -> None:
        if self.average is not None:
            self.reading.wait()
            self.average.swap()
            with torch.no_grad():
                engine_state.publish(self)

    def _forward_backward(
        self, task: BoundTask, batches: Sequence[MicroBatch], counts: RunningSum, step: int
    ) -> tuple[Tensor, float, float]:
        """All micro-batches of the step: the sum of their losses, seconds of work forward and backward.

        counts: the first of them is the weight of all items; 0 where none counts.
        """
        engine, progress = self.deepspeed, self._progress
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        forward_s = backward_s = 0.0
        watch = Stopwatch()
        for number, (batch, tensors) in enumerate(self._uploads.each(batches), start=1):
            progress.phase = "forward"
            seed_forward(self.config.seed, step, batch.index)
            loss = task.loss(engine, tensors)
            loss_sum += loss.detach()
            if not batch.idle:
                self._statistics.add(batch.index)
            forward_s += watch.lap()
            progress.phase = "backward"
            engine.backward(loss / (counts.wait()[0] or 1.0), scale_wrt_gas=False)
            backward_s += watch.lap()
            if number < len(batches):
                engine.step()  # not yet an update: counts the micro-batch
        return loss_sum, forward_s, backward_s

    def _refused(self, limits: Limits, loss: float) -> tuple[bool, float | None]:
        """Whether a step of this loss is to make no update, and its gradient norm where that had to be known."""
        fp16 = self.config.precision == "fp16"
        strange = exceeds(loss, limits.loss)
        if strange and not fp16:
            return True, None
        if not (strange or limits.has_norm):
            return False, None
        norm = self._norm()
        if not _finite(norm):
            # In fp16 an overflow is its scaler's business, whatever the loss; elsewhere _update sees it as well.
            return False, None
        return strange or exceeds(norm, limits.grad_norm), norm

    def _norm(self) -> float:
        """The global gradient norm before clipping. Every rank calls it."""
        gradients = gradients_of(self)
        if self.exact is not None:
            return self.exact.norm(gradients, self._num_parameters, replicated=self.zero_stage == 0)
        squares = sum(gradient.double().square().sum().item() for gradient in gradients)
        if self.zero_stage > 0:
            squares = all_sum([squares])[0]
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        return math.sqrt(squares) / (1.0 if scaler is None else scaler.loss_scale) if _finite(squares) else math.inf

    def _update(self) -> float:
        """Clip and update; returns the global gradient norm before clipping. Non-finite gradients leave the weights."""
        engine = self.deepspeed
        self.reading.wait()
        if self.exact is not None:
            return self._update_exactly(self.exact)
        if self.zero_stage > 0:
            engine.step()
            return float(engine.get_global_grad_norm())
        parameters = list(self.module.parameters())
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        grad_norm = norm.item()
        if not _finite(grad_norm):
            self._drop_gradients()
            return float("inf")
        clip = self.config.optimizer.clip_grad_norm
        if clip is not None and grad_norm > clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        engine.step()
        return grad_norm

    def _update_exactly(self, exact: ExactGradients) -> float:
        gradients = gradients_of(self)
        norm = exact.norm(gradients, self._num_parameters, replicated=self.zero_stage == 0)
        if not _finite(norm):
            self._drop_gradients()
            return float("inf")
        clip = self.config.optimizer.clip_grad_norm
        if clip is not None and norm > clip:
            for gradient in gradients:
                gradient.mul_(clip / norm)
        self.deepspeed.step()
        return norm

    def _drop_gradients(self) -> None:
        """End the step without an update: masters and optimizer state are not touched."""
        if self.zero_stage == 0:
            self.deepspeed.optimizer.zero_grad()  # torch's rules pass over parameters without a gradient
        gradients = gradients_of(self)
        for gradient in gradients:
            gradient.fill_(float("inf"))  # DeepSpeed takes such a step back, and warns of it
        scaler = vars(getattr(self.deepspeed.optimizer, "loss_scaler", None) or SimpleNamespace())
        scaler_before = dict(scaler)
        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(logging.ERROR)
        self.deepspeed.step()
        logger.setLevel(logging.WARNING)
        scaler.update(scaler_before)  # there was no overflow
        for gradient in gradients:
            gradient.zero_()  # stage 3 uses them again, and writes no padding

    def _evaluated(self, task: BoundTask, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Those that an evaluation runs: the idle ones where it has no other, and where weights are gathered."""
        for number, batch in enumerate(batches):
            if not batch.idle or number == 0 or self.zero_stage == 3:
                task.check(batch.tensors)
                yield batch


def _sum_in_stage_3() -> None:
    """Have stage 3 sum the ranks' gradients, as the others do: it divides by their number before it adds them.

    So they are multiplied by it first. Exact sums (trainer/exact.py) stay so, since they have bits to spare.
    """
    from deepspeed.runtime.zero import stage3

    divided = stage3.reduce_scatter_coalesced
    if getattr(divided, "sums", False):
        return

    def summed(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
        for tensor in tensors:
            tensor.mul_(dist.get_world_size(group))
        found: list[Tensor] = divided(tensors, group)
        return found

    summed.sums = True  # type: ignore[attr-defined]
    stage3.reduce_scatter_coalesced = summed


def _finite(value: float) -> bool:
    return value - value == 0


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of each optimizer that is not a class that it lists; ours are held to torch's by tests."""
    return "untested optimizer" not in str(record.msg)


def _import_deepspeed() -> ModuleType:
    """DeepSpeed, silent but for warnings, and never compiling anything.

    It builds native operators when first used: 100 to 230 s each, with ninja and g++, and a process killed meanwhile
    leaves a lock that every later one waits for. Here none is declared compatible before anything asks
    (private: `deepspeed.ops.__compatible_ops__`, 0.19); torch's optimizers and gloo take their place.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    _sum_in_stage_3()
    # Renamed in torch 2.13; one warning for each collective.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_concerns_the_user)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # stdout belongs to the command
    return deepspeed
