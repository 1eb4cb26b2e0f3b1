"""Rules between settings. Each is a pure function of the values it names and returns its message, or None when kept.

They live apart from the models so that they are checked, and reported, also while other settings are still wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """``broken`` takes the values of ``keys`` in order; the message is filed under the first key."""

    keys: tuple[str, ...]
    broken: Callable[..., str | None]


def broken_rules(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """(keys, message) of each broken rule. ``values`` is flat, by dotted key; a rule that lacks a value is left out."""
    found = []
    for rule in RULES:
        if all(key in values for key in rule.keys):
            message = rule.broken(*(values[key] for key in rule.keys))
            if message is not None:
                found.append((rule.keys, message))
    return found


def _micro_batch_fits(micro: int, whole: int) -> str | None:
    if micro <= whole:
        return None
    return (
        f"batch.micro_batch_size={micro} is larger than batch.global_batch_size={whole}: micro-batches are pieces of "
        f"the global batch. Use batch.micro_batch_size={whole} or less, or a larger global batch."
    )


def _low_precision_needs_masters(stage: int, precision: str) -> str | None:
    if stage != 0 or precision == "fp32":
        return None
    return (
        f"zero.stage=0 with precision={precision} keeps no fp32 master weights (DeepSpeed 0.19). "
        "Use zero.stage=1, or precision=fp32."
    )


def _offload_needs_partitions(offload: bool, stage: int) -> str | None:
    if not offload or stage >= 1:
        return None
    return (
        "zero.offload_optimizer=true with zero.stage=0: only a partitioned optimizer can be kept in CPU memory. "
        "Use zero.stage=1 or more, or zero.offload_optimizer=false."
    )


def _warmup_ends(warmup: int, steps: int) -> str | None:
    if warmup <= steps:
        return None
    return (
        f"schedule.warmup_steps={warmup} is longer than the run (steps={steps}): the full learning rate is never "
        f"reached. Use schedule.warmup_steps={max(steps // 10, 0)}, or more steps."
    )


def _decay_is_for_wsd(decay: int | None, name: str) -> str | None:
    if decay is None or name == "wsd":
        return None
    return (
        f"schedule.decay_steps={decay} with schedule.name={name} has no effect: only wsd's decay has a length. "
        "Use schedule.name=wsd, or remove schedule.decay_steps."
    )


def _wsd_phases_fit(decay: int | None, warmup: int, steps: int, name: str) -> str | None:
    if decay is None or name != "wsd" or warmup > steps or warmup + decay <= steps:
        return None
    return (
        f"schedule.warmup_steps={warmup} and schedule.decay_steps={decay} together are longer than the run "
        f"(steps={steps}). Use schedule.decay_steps={steps - warmup} or less, or more steps."
    )


def _momentum_is_used(momentum: float | None, name: str) -> str | None:
    if not momentum or name in ("sgd", "rmsprop", "muon"):
        return None
    if name == "adagrad":
        return (
            f"optimizer.momentum={momentum} with optimizer.name=adagrad has no effect: it has no momentum. Remove it, "
            "or use optimizer.name=sgd or rmsprop."
        )
    return (
        f"optimizer.momentum={momentum} with optimizer.name={name} has no effect: its momentum is the first of "
        "optimizer.betas. Set that, or use optimizer.name=sgd."
    )


def _nesterov_has_momentum(nesterov: bool, name: str, momentum: float | None) -> str | None:
    if not nesterov or (name == "sgd" and momentum):
        return None
    if name == "muon":
        return "optimizer.nesterov=true with optimizer.name=muon says nothing: muon always does. Remove it."
    return (
        f"optimizer.nesterov=true with optimizer.name={name} and optimizer.momentum={momentum} has no effect: it looks "
        "ahead along the momentum of sgd. Use optimizer.name=sgd with a momentum, or remove it."
    )


def _muon_sees_whole_matrices(name: str, stage: int) -> str | None:
    if name != "muon" or stage == 0:
        return None
    return (
        f"optimizer.name=muon with zero.stage={stage}: muon makes each matrix orthogonal, and stages 1 to 3 hand the "
        "optimizer flat pieces of them, so its steps would be wrong. Use zero.stage=0 (with precision=fp32), or "
        "optimizer.name=adamw, which is right at every stage."
    )


def _one_beginning(weights: str, checkpoint: str) -> str:
    return (
        f"warm_start.weights={weights} and parent.checkpoint={checkpoint} both say where the first weights come from. "
        "Set warm_start=null, or start without --from."
    )


def _exact_is_shown(determinism: str, precision: str, offload: bool, gpus: int, name: str) -> str | None:
    if determinism != "exact":
        return None
    if precision == "fp16":
        return (
            "determinism=exact with precision=fp16: the loss scale follows overflows, which depend on the cluster. "
            "Use precision=bf16 or fp32."
        )
    if offload:
        return (
            "determinism=exact with zero.offload_optimizer=true is not shown to give the same bits. "
            "Use zero.offload_optimizer=false, or determinism=cluster."
        )
    if gpus:
        return (
            "determinism=exact with resources.gpus_per_worker=1: kernels of GPUs are not shown to give the same bits. "
            "Use CPUs, or determinism=cluster."
        )
    if name not in ("adamw", "adam", "sgd"):
        return (
            f"determinism=exact with optimizer.name={name}: its last bits show where ZeRO cuts. Use adamw, adam or "
            "sgd, or determinism=cluster."
        )
    return None


def _early_stopping_has_evaluations(patience: int, every: int | None) -> str | None:
    if every is not None:
        return None
    return (
        f"early_stopping.patience={patience} counts evaluations, and evaluation.every=null has none before the end. "
        "Set evaluation.every, or early_stopping=null."
    )


def _workers_lie_between(workers: int, fewest: int | None, most: int | None) -> str | None:
    low, high = workers if fewest is None else fewest, workers if most is None else most
    if low <= workers <= high:
        return None
    return (
        f"resources.workers={workers} does not lie between resources.min_workers={low} and "
        f"resources.max_workers={high}. Set min_workers to it or less, and max_workers to it or more."
    )


def _skip_reaches_gradients(divergence: str, offload: bool) -> str | None:
    if divergence != "skip" or not offload:
        return None
    return (
        "recovery.divergence=skip with zero.offload_optimizer=true: gradients in CPU memory cannot be taken back. "
        "Use recovery.divergence=rollback, or zero.offload_optimizer=false."
    )


RULES = (
    Rule(("batch.micro_batch_size", "batch.global_batch_size"), _micro_batch_fits),
    Rule(("zero.stage", "precision"), _low_precision_needs_masters),
    Rule(("zero.offload_optimizer", "zero.stage"), _offload_needs_partitions),
    Rule(("schedule.warmup_steps", "steps"), _warmup_ends),
    Rule(("schedule.decay_steps", "schedule.name"), _decay_is_for_wsd),
    Rule(("schedule.decay_steps", "schedule.warmup_steps", "steps", "schedule.name"), _wsd_phases_fit),
    Rule(("optimizer.momentum", "optimizer.name"), _momentum_is_used),
    Rule(("optimizer.nesterov", "optimizer.name", "optimizer.momentum"), _nesterov_has_momentum),
    Rule(("optimizer.name", "zero.stage"), _muon_sees_whole_matrices),
    Rule(("warm_start.weights", "parent.checkpoint"), _one_beginning),
    Rule(("early_stopping.patience", "evaluation.every"), _early_stopping_has_evaluations),
    Rule(("recovery.divergence", "zero.offload_optimizer"), _skip_reaches_gradients),
    Rule(("resources.workers", "resources.min_workers", "resources.max_workers"), _workers_lie_between),
    Rule(
        ("determinism", "precision", "zero.offload_optimizer", "resources.gpus_per_worker", "optimizer.name"),
        _exact_is_shown,
    ),
)
