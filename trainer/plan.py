"""What a run will take, before anything is paid for: memory against the device's, seconds and money.

Memory: trainer/memory.py. A step's seconds are an estimate that says what it rests on. They are those of an earlier run
with the same model, task, batch, precision, stage and workers on that device, where the store has one. Else they are
arithmetic: the model's FLOPs (3 forward passes; recomputing adds one: Chen et al. 2016) over the share of the device's
peak that is usual, the bytes that ZeRO moves (Rajbhandari et al. 2020, section 7) over the link to a neighbour, and
what the host takes to start each operation of the step, which is most of a small model's time.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from configs.errors import ShardyardError
from configs.schema import RunConfig
from data_pipelines.storage import Store
from trainer.memory import Memory, predict_memory
from trainer.parts.recompute import share_computed_again
from trainer.site import NotPlanned, Site
from trainer.validate import Plan

# Of a GPU's peak: large language models reach 0.3 to 0.5 (Chowdhery et al. 2022, table 3; Narayanan et al. 2021).
GPU_UTILISATION = 0.4
# Of a matrix product's speed on a CPU: measured, 0.19 to 0.72 and 0.57 in the median (docs/plan.md).
CPU_UTILISATION = 0.5
# What the host takes at any size, in Python, autograd and DeepSpeed: for an operation with its share of views, for a
# parameter that ZeRO handles (a micro-batch where it reduces each), and for a step, by stage. Fitted by hand to the
# steps of docs/plan.md's table, measured on one virtual core of an AMD EPYC; not measured on a GPU's host.
OPERATION_HOST_S = 10e-6
PARAMETER_HOST_S = (0.0, 60e-6, 60e-6, 1e-3)
STEP_HOST_S = (0.6e-3, 1.8e-3, 1.8e-3, 1e-3)
HOST_LINK_BYTES_S = 25e9  # offload: PCIe 4.0 x16
EARLIER_RUNS = 50  # looked at, newest first


@dataclass(frozen=True)
class Estimate:
    """A plan at a site: memory, seconds and price."""

    plan: Plan
    site: Site
    memory: Memory

    @property
    def config(self) -> RunConfig:
        """The run's."""
        return self.plan.config

    @property
    def fits(self) -> bool:
        """Whether a worker's peak is within what the device has; yes where that is not known."""
        return self.site.memory_bytes is None or self.memory.peak <= self.site.memory_bytes

    @property
    def tokens_per_step(self) -> int | None:
        """Positions that the model reads in a step; None for a task without tokens."""
        per_example = getattr(self.plan.model.input, "seq_len", None)
        return None if per_example is None else per_example * self.config.batch.global_batch_size

    @property
    def flops_per_step(self) -> float:
        """Of all workers, without what is computed again."""
        return self.plan.model.flops_per_example() * self.config.batch.global_batch_size

    @cached_property
    def _earlier_step_s(self) -> tuple[float, str] | None:
        return _earlier(self.plan, self.site)

    @cached_property
    def step_s(self) -> float:
        """Seconds a step, estimated."""
        if self._earlier_step_s is not None:
            return self._earlier_step_s[0]
        return self.computed_step_s

    @property
    def computed_step_s(self) -> float:
        """Seconds a step by arithmetic alone."""
        utilisation = GPU_UTILISATION if self.site.is_gpu else CPU_UTILISATION
        again = 1 + share_computed_again(self.config.model.settings.get("activation_checkpointing", False)) / 3
        compute_s = (
            self.flops_per_step
            * again
            / (1 - self.plan.idle_share)
            / (self.config.resources.workers * self.site.flops * utilisation)
        )
        moved_s = _bytes_moved(self.plan) / (self.site.device.link_gb_s * 1e9)
        if not self.site.is_gpu:
            return compute_s + moved_s + self.host_s
        step_s = max(compute_s, moved_s) if self.config.zero.stage >= 2 else compute_s + moved_s
        return max(step_s + _offloaded_bytes(self.plan) / HOST_LINK_BYTES_S, self.host_s)

    @property
    def host_s(self) -> float:
        """Seconds a step for what takes the same at any size: on a CPU added to the rest, on a GPU done meanwhile."""
        stage, micro_batches, dispatched = self.config.zero.stage, self.plan.accumulation_steps, self.memory.dispatched
        operations = micro_batches * dispatched.micro_batch + dispatched.update
        handled = dispatched.parameters * (micro_batches if stage >= 2 else 1)
        return STEP_HOST_S[stage] + operations * OPERATION_HOST_S + handled * PARAMETER_HOST_S[stage]

    @property
    def basis(self) -> str:
        """What the seconds rest on, in words."""
        if self._earlier_step_s is not None:
            return f"estimate: measured in run '{self._earlier_step_s[1]}' on {self.site.name}"
        share = GPU_UTILISATION if self.site.is_gpu else CPU_UTILISATION
        of = "its peak" if self.site.is_gpu else "a matrix product's speed here"
        link = (
            ""
            if self.config.resources.workers == 1
            else (f", and {self.site.device.link_gb_s:g} GB/s between neighbours (between nodes it is less)")
        )
        least = "at least " if self.site.is_gpu else ""
        return (
            f"estimate: {share:.0%} of {of}, {self.site.flops / 1e12:.3g} TFLOP/s a worker{link}; {least}"
            f"{_seconds(self.host_s)} a step to start its operations"
        )

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the workers could do at their peak."""
        return self.flops_per_step / self.step_s / (self.site.flops * self.config.resources.workers)

    @property
    def total_s(self) -> float:
        """Of all steps; without evaluation, checkpoints and the start."""
        return self.step_s * self.config.steps

    @property
    def usd(self) -> float:
        """Price of the devices for that time."""
        cores = 1 if self.site.is_gpu else self.config.resources.threads
        return self.total_s / 3600 * self.config.resources.workers * cores * self.site.device.usd_per_hour

    def describe(self) -> dict[str, Any]:
        """Plain values, for `check --json` and the record. Sizes are bytes a worker."""
        tokens = self.tokens_per_step
        return {
            "device": self.site.name,
            "device_memory_bytes": self.site.memory_bytes,
            "memory_bytes": dict(self.memory.device) | {"process": self.memory.base},
            "host_memory_bytes": dict(self.memory.host),
            "peak_bytes": self.memory.peak,
            "measurable_bytes": self.memory.measurable,
            "fits": self.fits,
            "tokens_per_step": tokens,
            "step_s": self.step_s,
            "tokens_per_s": None if tokens is None else tokens / self.step_s,
            "mfu": self.mfu,
            "total_s": self.total_s,
            "usd": self.usd,
            "basis": self.basis,
        }

    def table(self) -> str:
        """For people."""
        memory, tokens = self.memory, self.tokens_per_step
        room = "" if self.site.memory_bytes is None else f" of {size_words(self.site.memory_bytes)}"
        lines = [f"Memory of a worker on {self.site.name}, at its peak"]
        for part, size in memory.device.items():
            host = memory.host.get(part, 0)
            where = f" + {size_words(host)} on the host" if host else ""
            lines.append(f"  {part:12} {size_words(size):>10}{where}")
        lines.append(f"  {'process':12} {size_words(memory.base):>10}")
        lines.append(f"  {'together':12} {size_words(memory.peak):>10}{room}")
        lines.append(f"Time ({self.basis})")
        lines.append(f"  step         {_seconds(self.step_s):>10}   MFU {self.mfu:.0%}")
        if tokens is not None:
            lines.append(f"  tokens       {tokens:>10,} a step, {tokens / self.step_s:,.0f} a second")
        ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + self.total_s))
        lines.append(f"  {self.config.steps:,} steps in {_seconds(self.total_s)}, until {ends} if begun now")
        lines.append(f"  price        {self.usd:>10,.2f} USD at {self.site.device.usd_per_hour:g} an hour and device")
        return "\n".join(lines)

    def headline(self) -> str:
        """For the head of a run."""
        room = "" if self.site.memory_bytes is None else f" of {size_words(self.site.memory_bytes)}"
        return (
            f"Memory: {size_words(self.memory.peak)}{room} a worker on {self.site.name}.\n"
            f"About {_seconds(self.step_s)} a step, {_seconds(self.total_s)} and {self.usd:,.2f} USD in all "
            f"({self.basis})."
        )


def estimate(plan: Plan, site: Site) -> Estimate:
    """The plan at this site; a few seconds for a model of billions of parameters.

    Raises:
        NotPlanned: the model or the task cannot be run with fake tensors (a file of the user's may do anything).
    """
    workers = plan.config.resources.workers
    try:
        memory = predict_memory(plan.model, plan.task, plan.config, workers, on_gpu=site.is_gpu)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise NotPlanned(
            f"Memory and time are not planned: a step with fake tensors ended with {type(error).__name__}: {first}"
        ) from error
    return Estimate(plan, site, memory)


def surely_fits(plan: Plan, site: Site) -> bool:
    """Whether it need not be planned to be let through: the memory is not known, or a hundred times the state.

    The state is at most 40 bytes a parameter; what is left is far more than the activations of models so small.
    """
    return site.memory_bytes is None or 100 * 40 * plan.num_parameters < site.memory_bytes


# --- seconds


def _bytes_moved(plan: Plan) -> float:
    """That a worker sends in a step (and receives as many). An all-reduce is a reduce-scatter and an all-gather."""
    config, parameters = plan.config, plan.num_parameters
    workers, stage = config.resources.workers, config.zero.stage
    weights = (4 if config.precision == "fp32" else 2) * parameters
    gradients = 4 * parameters  # reduced in fp32 (trainer/deepspeed_config.py)
    micro_batches = plan.accumulation_steps
    total = {
        0: 2 * gradients,
        1: 2 * gradients + weights,
        2: 2 * gradients * micro_batches + weights,  # DeepSpeed 0.19 reduces each micro-batch, by an all-reduce
        3: (gradients + 2 * weights) * micro_batches,
    }[stage]
    return total * (workers - 1) / workers


def _offloaded_bytes(plan: Plan) -> float:
    """Gradients to the host and weights back."""
    config = plan.config
    each = 4 + (4 if config.precision == "fp32" else 2)
    return each * plan.num_parameters / config.resources.workers if config.zero.offload_optimizer else 0.0


def _earlier(plan: Plan, site: Site) -> tuple[float, str] | None:
    """The median seconds a step of the newest finished run that computes the same on this device, and its name."""
    from trainer.record import RunRecord, list_runs

    try:
        store = Store(plan.config.store)
        folder = store.local_path()
        if folder is None:  # reading every record of an object store would take longer than it is worth
            return None
        names = sorted(list_runs(store), key=lambda name: (folder / name / "run.yaml").stat().st_mtime, reverse=True)
    except (ShardyardError, OSError):
        return None
    for name in names[:EARLIER_RUNS]:
        try:
            record = RunRecord.open(store.uri, name)
            if not (_computes_the_same(record.config, plan.config) and _was_on(record.events(), site.name)):
                continue
            seconds = [row["step_s"] for row in record.metrics_table() if 0 < row.get("step_s", 0) < math.inf]
        except (ShardyardError, LookupError, TypeError, ValueError, AttributeError):
            continue  # a damaged record, or rows that nothing here writes, are no reason not to plan
        if len(seconds) >= 3:
            return statistics.median(seconds[1:]), name
    return None


def _computes_the_same(one: RunConfig, other: RunConfig) -> bool:
    sections = ("model", "task", "batch", "precision", "zero", "determinism")
    same = all(getattr(one, section) == getattr(other, section) for section in sections)
    return (
        same and one.resources.workers == other.resources.workers and one.resources.threads == other.resources.threads
    )


def _was_on(events: list[dict[str, Any]], device: str) -> bool:
    finished = any(event["kind"] == "finished" for event in events)
    return finished and any(event["kind"] == "planned" and event["device"] == device for event in events)


# --- words


def size_words(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _seconds(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"
