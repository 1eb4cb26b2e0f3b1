"""The plan: seconds, price, and what is named instead of what cannot fit."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.devices import find_device
from configs.errors import UsageError
from configs.load import load
from tests.tiny import tiny_config
from trainer.cheapest import cheapest_change, refuse_what_cannot_fit
from trainer.plan import (
    CPU_UTILISATION,
    GPU_UTILISATION,
    OPERATION_HOST_S,
    PARAMETER_HOST_S,
    STEP_HOST_S,
    Estimate,
    estimate,
    surely_fits,
)
from trainer.site import NotPlanned, Site, site_of
from trainer.validate import Plan, load_recipe, validate

H100 = find_device("h100")


def plan_of(folder: Path, **changes: Any) -> Plan:
    values = {"batch": {"global_batch_size": 64, "micro_batch_size": 32}, "zero": {"stage": 1}} | changes
    return validate(load(tiny_config(folder, **values)), sees_inputs=False)


def at(plan: Plan, memory_bytes: int | None = None, flops: float = H100.peak_flops("fp32") or 0.0) -> Estimate:
    return estimate(plan, Site("h100", H100, memory_bytes, flops, True))


def test_a_model_that_reads_values_while_it_is_built_is_planned(tmp_path: Path) -> None:
    plan = validate(load_recipe("image_classification-hf-vit-digits", [f"store={tmp_path}"]), sees_inputs=False)
    memory = at(plan).memory
    assert memory.device["weights"] == pytest.approx(4 * plan.num_parameters, rel=0.05)


def test_seconds_and_price_are_arithmetic_that_is_told(tmp_path: Path) -> None:
    slow = 67e6  # so that the host launches everything meanwhile
    found = at(plan_of(tmp_path), flops=slow)
    flops = found.plan.model.flops_per_example() * 64
    workers = found.config.resources.workers
    compute_s = flops / (workers * slow * GPU_UTILISATION)
    moved_s = 12 * found.plan.num_parameters * (workers - 1) / workers / 450e9
    assert found.step_s == pytest.approx(compute_s + moved_s)
    assert found.mfu == pytest.approx(flops / found.step_s / (workers * slow))
    assert found.usd == pytest.approx(found.step_s * found.config.steps / 3600 * workers * H100.usd_per_hour)
    assert found.tokens_per_step == 64 * found.plan.model.input.seq_len
    assert "estimate: 40% of its peak" in found.headline() and "estimate" in found.table()
    assert sum(found.describe()["memory_bytes"].values()) == found.memory.peak


@pytest.mark.parametrize("micro_batch_size", [64, 8])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_small_models_step_takes_what_its_operations_do(tmp_path: Path, stage: int, micro_batch_size: int) -> None:
    """However fast the device is: a GPU waits for the host, and on a CPU that time comes on top."""
    batch = {"global_batch_size": 64, "micro_batch_size": micro_batch_size}
    plan = plan_of(tmp_path, batch=batch, zero={"stage": stage})
    micro_batches, counts = 64 // micro_batch_size, at(plan).memory.dispatched
    assert plan.accumulation_steps == micro_batches and counts.parameters == 11
    host_s = STEP_HOST_S[stage] + (micro_batches * counts.micro_batch + counts.update) * OPERATION_HOST_S
    if stage == 3:
        host_s += micro_batches * counts.parameters * PARAMETER_HOST_S[3]
    for flops in (67e12, 67e15):
        assert at(plan, flops=flops).step_s == pytest.approx(host_s)
    cpu = replace(at(plan), site=Site("cpu", find_device("cpu"), None, 1e8, False))
    assert "s a step to start its operations" in cpu.basis and "; at least" in at(plan).basis
    assert cpu.step_s == pytest.approx(host_s + cpu.flops_per_step / (1e8 * CPU_UTILISATION))


def test_more_layers_are_more_operations(tmp_path: Path) -> None:
    model = {"name": "gpt", "hidden_size": 32, "num_heads": 2}
    one, two, three = (
        at(plan_of(tmp_path, model=model | {"num_layers": count}, zero={"stage": 0})).memory.dispatched
        for count in (1, 2, 3)
    )
    assert 2 * two.micro_batch == one.micro_batch + three.micro_batch and two.micro_batch > one.micro_batch > 0
    assert 2 * two.parameters == one.parameters + three.parameters and one.update == three.update > 0


@pytest.mark.parametrize("share", [0.95, 0.8, 0.5])
def test_what_is_named_instead_fits(tmp_path: Path, share: float) -> None:
    whole = at(plan_of(tmp_path))
    room = whole.memory.base + int(whole.memory.tensors * share)
    tight = replace(whole, site=replace(whole.site, memory_bytes=room))
    assert not tight.fits and whole.fits
    with pytest.raises(UsageError) as error:
        refuse_what_cannot_fit(tight)
    named = re.search(r"The cheapest change that fits: ([^(]+) \(", str(error.value))
    assert named is not None, error.value
    changed = cheapest_change(tight)
    assert changed is not None and changed[0] == named[1]
    again = at(changed[1].plan, room)
    assert again.fits and again.memory.peak <= room
    for setting in named[1].split():  # it is a change that a user can type
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        assert str(dict(changed[1].plan.config)[section].model_dump()[name]).lower() == value


def recomputing(folder: Path, policy: bool | int | str) -> Plan:
    model = {"name": "gpt", "num_layers": 4, "hidden_size": 32, "num_heads": 2, "activation_checkpointing": policy}
    return plan_of(folder, model=model, resources={"workers": 1}, batch={"global_batch_size": 1, "micro_batch_size": 1})


def test_the_more_is_computed_again_the_longer_a_step_takes(tmp_path: Path) -> None:
    policies: list[bool | int | str] = [False, "selective", 2, True]
    without, *others = (at(recomputing(tmp_path, policy), flops=67e5).computed_step_s for policy in policies)
    assert without < others[0] < others[1] < others[2] == pytest.approx(4 / 3 * without)


@pytest.mark.parametrize("policy", ["selective", True])
def test_no_more_is_computed_again_than_must_be(tmp_path: Path, policy: bool | str) -> None:
    whole, wanted = (at(recomputing(tmp_path, each)) for each in (False, policy))
    tight = replace(whole, site=replace(whole.site, memory_bytes=wanted.memory.peak))
    changed = cheapest_change(tight)
    assert changed is not None and changed[0] == f"model.activation_checkpointing={str(policy).lower()}"


def test_where_nothing_fits_that_is_said(tmp_path: Path) -> None:
    whole = at(plan_of(tmp_path))
    with pytest.raises(UsageError, match="Use a smaller model, or a larger device"):
        refuse_what_cannot_fit(replace(whole, site=replace(whole.site, memory_bytes=whole.memory.base)))


def test_a_cpu_is_measured_and_shared(tmp_path: Path) -> None:
    one, four = (site_of(plan_of(tmp_path, resources={"workers": count}).config, None, here=True) for count in (1, 4))
    assert one.name == "cpu" and one.flops > 1e8
    assert one.memory_bytes is not None and four.memory_bytes == one.memory_bytes // 4
    assert surely_fits(plan_of(tmp_path), one)
    assert not surely_fits(replace(plan_of(tmp_path), num_parameters=one.memory_bytes // 100), one)


def test_a_cpus_speed_is_that_of_the_fastest_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that every second product took a tenth of a second, as if others had computed meanwhile."""
    now, took = 0.0, itertools.cycle([0.002, 0.001, 0.1, 0.001])

    def clock() -> float:
        nonlocal now
        now += next(took)
        return now

    monkeypatch.setattr("trainer.site.time.perf_counter", clock)
    assert site_of(plan_of(tmp_path).config, "cpu", here=False).flops == pytest.approx(2 * 512**3 / 0.002)


def test_a_target_that_says_no_device_is_not_planned_for(tmp_path: Path) -> None:
    config = plan_of(tmp_path, resources={"workers": 1, "gpus_per_worker": 1}).config
    with pytest.raises(NotPlanned, match=r"set `device:` in targets.yaml"):
        site_of(config, None, here=False)
