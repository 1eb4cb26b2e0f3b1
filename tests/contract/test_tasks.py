"""What every file of trainer/tasks must hold; a new file is tested with no edit here."""

from __future__ import annotations

import inspect

import numpy as np
import pydantic
import pytest
import torch

from configs.plugins import find_plugin
from configs.schema import Section
from tests.contract.examples import TASKS, bound_task, built, example_config, fitting_model
from trainer import shapes
from trainer.bound import BoundTask
from trainer.example_batch import batch_of, example_rows, stored_columns

each_task = pytest.mark.parametrize("name", TASKS)


class ExampleSplit:
    """As much of a split as metrics may ask for."""

    num_tokens = 1000
    num_bytes = 4000
    num_documents = 10


@each_task
def test_it_is_described_and_its_config_is_strict(name: str) -> None:
    module = find_plugin("trainer.tasks", name)
    assert (module.__doc__ or "").strip()
    assert issubclass(module.Config, Section)
    for key, field in module.Config.model_fields.items():
        assert field.description, key
        assert field.examples or not field.is_required(), f"{key} needs an example"
    with pytest.raises(pydantic.ValidationError):
        example_config(module, no_such_setting=1)


@each_task
def test_shapes_and_columns(name: str) -> None:
    task = bound_task(name)
    known = {kind for _, kind in inspect.getmembers(shapes, inspect.isclass)}
    assert {type(shape) for shape in task.io()} <= known
    assert task.columns() and all(isinstance(column, str) for column in task.columns())
    assert task.packing() is None or task.columns() == ("tokens",)
    fitting_model(task)


def preparations(name: str) -> list[BoundTask]:
    """The task with every setting off, and with each number and switch on: augmentation, where it has any."""
    fields = find_plugin("trainer.tasks", name).Config.model_fields
    on = {key: True for key, field in fields.items() if field.annotation is bool}
    on |= {key: 2 for key, field in fields.items() if field.annotation is int and field.default == 0}
    return [bound_task(name), bound_task(name, **on)]


@each_task
def test_preparing_depends_on_the_row_and_its_own_generator_alone(name: str) -> None:
    for task in preparations(name):
        row = example_rows(task, 1)[0]
        for training in (True, False):
            prepare = task.preparation(stored_columns(task), training=training)
            if prepare is None:
                continue
            np.random.seed(0)
            first = prepare(row, np.random.default_rng(3))
            np.random.seed(1)
            again = prepare(row, np.random.default_rng(3))
            assert first.keys() == again.keys()
            for key in first:
                assert isinstance(first[key], np.ndarray), key
                np.testing.assert_array_equal(first[key], again[key])


@each_task
def test_nothing_is_random_in_evaluation(name: str) -> None:
    for task in preparations(name):
        rows = example_rows(task, 3)
        batches = [batch_of(task, rows[at:], training=False) for at in range(2)]  # other generators for the same rows
        for key, tensor in batches[1].items():
            same = tuple(map(slice, tensor.shape))  # without the first row they may be padded to less
            assert torch.equal(batches[0][key][1:][same], tensor), key


@each_task
def test_the_loss_is_a_sum_over_examples_in_fp32(name: str) -> None:
    task = bound_task(name)
    model = built(fitting_model(task)).eval()
    rows = example_rows(task, 3)
    with torch.no_grad():
        together = task.loss(model, batch_of(task, rows, training=False))
        apart = [task.loss(model, batch_of(task, [row], training=False)) for row in rows]
    assert together.dtype == torch.float32 and together.shape == () and together > 0
    assert together.item() == pytest.approx(sum(loss.item() for loss in apart), rel=1e-4)
    batches = [batch_of(task, [row]) for row in rows]
    for count in (task.num_items, task.num_tokens):
        assert count(batch_of(task, rows)) == sum(count(batch) for batch in batches)
    assert task.num_items(batches[0]) > 0


@each_task
def test_an_idle_batch_contributes_exactly_zero(name: str) -> None:
    task = bound_task(name)
    model = built(fitting_model(task))
    batch = batch_of(task, example_rows(task, 2))
    before = {key: tensor.clone() for key, tensor in batch.items()}
    idle = task.idle(batch)
    assert task.num_items(idle) == 0
    loss = task.loss(model, idle)
    loss.backward()
    assert loss.item() == 0
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{parameter_name} must take part, or a collective would wait for it"
        assert not parameter.grad.any(), parameter_name
    assert all(torch.equal(batch[key], before[key]) for key in batch)


@each_task
def test_evaluation_adds_up_and_gives_numbers(name: str) -> None:
    task = bound_task(name)
    model = built(fitting_model(task)).eval()
    rows = example_rows(task, 3)
    with torch.no_grad():
        together = task.evaluate(model, batch_of(task, rows, training=False))
        apart = [task.evaluate(model, batch_of(task, [row], training=False)) for row in rows]
    for key, value in together.items():
        assert isinstance(value, float)
        assert value == pytest.approx(sum(sums[key] for sums in apart), rel=1e-4)
    metrics = task.metrics(together, ExampleSplit())
    assert metrics and all(np.isfinite(value) for value in metrics.values())
