"""What fits instead of a run that does not: one setting changed, or two, each change planned before it is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from configs.errors import UsageError
from configs.schema import RunConfig
from trainer.plan import Estimate, estimate, size_words
from trainer.validate import Plan


def refuse_what_cannot_fit(found: Estimate) -> None:
    """Raises UsageError where the peak is more than the device has, with the cheapest change that fits."""
    if found.fits:
        return
    assert found.site.memory_bytes is not None
    largest = max(found.memory.device, key=lambda part: found.memory.device[part])
    cheaper = cheapest_change(found)
    if cheaper is None:
        remedy = (
            "No one or two changes of stage, micro-batch, recompute, offload and workers fit. Use a smaller model, or "
            "a larger device."
        )
    else:
        change, other = cheaper
        slowdown = other.computed_step_s / found.computed_step_s
        remedy = (
            f"The cheapest change that fits: {change} ({size_words(other.memory.peak)}; a step takes about "
            f"{slowdown:.2f} times as long, by the same estimate)."
        )
    raise UsageError(
        f"A worker would need {size_words(found.memory.peak)} at its peak, and {found.site.name} has "
        f"{size_words(found.site.memory_bytes)}; the largest part is {largest}, "
        f"{size_words(found.memory.device[largest])}. {remedy}"
    )


def cheapest_change(found: Estimate) -> tuple[str, Estimate] | None:
    """The change that fits and slows the run least, and its estimate; each is planned before it is named.

    More workers come last, since they cost devices. One setting is changed, or two where no one suffices.
    """
    tried = [(change, replace(found, plan=plan)) for change, plan in _changes(found.plan)]
    tried.sort(key=lambda each: each[1].computed_step_s)
    pairs = [
        (f"{first} {second}", replace(found, plan=plan))
        for first, one in tried
        for second, plan in _changes(one.plan)
        if second.partition("=")[0] != first.partition("=")[0]
    ]
    pairs.sort(key=lambda each: each[1].computed_step_s)
    more = [(change, replace(found, plan=plan)) for change, plan in _more_workers(found.plan)]
    for change, other in [*tried, *more, *pairs]:
        planned = estimate(other.plan, found.site)
        if planned.fits:
            return change, planned
    return None


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    config = plan.config
    zero = config.zero
    for stage in range(zero.stage + 1, 4):
        if config.resources.workers > 1:
            yield from _changed(plan, f"zero.stage={stage}", zero=zero.model_copy(update={"stage": stage}))
    if getattr(plan.model.config, "activation_checkpointing", None) is False:
        for policy in ("selective", True):
            update = {"activation_checkpointing": policy}
            model = replace(plan.model, config=plan.model.config.model_copy(update=update))
            change = f"model.activation_checkpointing={policy if policy == 'selective' else 'true'}"
            yield from _changed(replace(plan, model=model), change, model=config.model.model_copy(update=update))
    size = config.batch.micro_batch_size
    while size > 1:
        size //= 2
        batch = config.batch.model_copy(update={"micro_batch_size": size})
        yield from _changed(plan, f"batch.micro_batch_size={size}", batch=batch)
    if not zero.offload_optimizer and zero.stage > 0 and config.resources.gpus_per_worker:
        changed_zero = zero.model_copy(update={"offload_optimizer": True})
        yield from _changed(plan, "zero.offload_optimizer=true", zero=changed_zero)


def _more_workers(plan: Plan) -> Iterator[tuple[str, Plan]]:
    config, most = plan.config, plan.config.num_micro_batches
    if not (config.zero.stage and config.resources.gpus_per_worker):  # a machine's memory is shared by its workers
        return
    workers = config.resources.workers
    while (workers := workers * 2) <= most:
        resources = config.resources.model_copy(update={"workers": workers, "max_workers": None, "min_workers": None})
        yield from _changed(plan, f"resources.workers={workers}", resources=resources)


def _changed(plan: Plan, change: str, **sections: Any) -> Iterator[tuple[str, Plan]]:
    """The plan with these sections, if the rules between settings are kept."""
    try:
        config = RunConfig.model_validate(dict(plan.config) | sections)
    except ValueError:
        return
    accumulation = config.accumulation(config.resources.workers)
    idle = 1 - config.num_micro_batches / (config.resources.workers * accumulation)
    yield change, replace(plan, config=config, accumulation_steps=accumulation, idle_share=idle)
