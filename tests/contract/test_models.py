"""What every file of trainer/models must hold; a new file is tested with no edit here."""

from __future__ import annotations

import inspect
import re

import pydantic
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.plugins import find_plugin
from configs.schema import Section
from tests.contract.examples import (
    MODELS,
    Case,
    bound_model,
    built,
    example_config,
    example_inputs,
    example_models,
    has_shape,
)
from trainer import shapes
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy

each_model = pytest.mark.parametrize("name", MODELS)
each_case = pytest.mark.parametrize("case", example_models(), ids=str)
LANGUAGE_MODELS = [
    case
    for case in example_models()
    if (type(case.input), type(case.output)) == (shapes.Tokens, shapes.Logits)
    and case.name != "hf"  # transformers' models give logits
]


@each_model
def test_the_docstring_names_the_source_and_the_shapes(name: str) -> None:
    text = find_plugin("trainer.models", name).__doc__ or ""
    assert re.search(r"\b(19|20)\d\d\b", text), "name the paper with its year"
    assert re.search(r"\b[A-Z] = \w+", text), "say what the letters of the shapes stand for"


@each_model
def test_the_config_is_strict_and_described(name: str) -> None:
    module = find_plugin("trainer.models", name)
    assert issubclass(module.Config, Section)
    for key, field in module.Config.model_fields.items():
        assert field.description, key
        assert field.examples or not field.is_required(), f"{key} needs an example"
    with pytest.raises(pydantic.ValidationError):
        example_config(module, no_such_setting=1)


@each_model
def test_it_accepts_known_shapes(name: str) -> None:
    known = {kind for _, kind in inspect.getmembers(shapes, inspect.isclass)}
    module = find_plugin("trainer.models", name)
    assert module.ACCEPTS and known.issuperset(module.ACCEPTS)
    assert module.GIVES and known.issuperset(module.GIVES)


@each_case
def test_building_on_meta_takes_no_memory_and_counts_agree(case: Case) -> None:
    model = bound_model(case)
    with torch.device("meta"):
        module = model.build()
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    assert model.num_parameters() == sum(p.numel() for p in module.parameters() if p.requires_grad)


@each_case
def test_flops_agree_with_the_counter(case: Case) -> None:
    model = bound_model(case)
    module = built(model)
    counter = FlopCounterMode(display=False)
    # fused kernels are not counted on every device
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False), counter:
        module(*example_inputs(model.input, 1)).float().sum().backward()
    assert model.flops_per_example() == pytest.approx(counter.get_total_flops(), rel=1e-6)


@each_case
def test_every_parameter_gets_its_value_from_name_and_generator_alone(case: Case) -> None:
    model = bound_model(case)
    with torch.device("meta"):
        blank = model.build()
    for parameter_name, parameter in blank.named_parameters():
        tensors = [torch.full(parameter.shape, filler) for filler in (float("nan"), 7.5)]
        for tensor in tensors:
            model.init_parameter(parameter_name, tensor, torch.Generator().manual_seed(1))
        assert torch.equal(*tensors), parameter_name
        assert tensors[0].isfinite().all(), parameter_name


@each_case
def test_built_twice_it_is_the_same_model(case: Case) -> None:
    model = bound_model(case)
    first, second = built(model).eval(), built(model).eval()
    inputs = example_inputs(model.input, 2)
    with torch.no_grad():
        output = first(*inputs)
        assert torch.equal(output, second(*inputs))
    assert output.isfinite().all()
    assert has_shape(output, model.output, model.input), output.shape
    state = built(model, seed=1).eval()
    state.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(output, state(*inputs)), "the state_dict does not hold the whole model"


@each_case
def test_every_parameter_learns(case: Case) -> None:
    model = bound_model(case)
    module = built(model)
    output = module(*example_inputs(model.input, 2))
    (output.float() * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("case", LANGUAGE_MODELS, ids=str)
def test_with_labels_it_gives_the_loss_of_its_logits(case: Case) -> None:
    model = bound_model(case)
    module = built(model)
    assert module.takes_labels
    module.eval()  # no dropout
    tokens, *rest = example_inputs(model.input, 2)
    labels = torch.randint(0, model.output.size, tokens.shape, generator=torch.Generator().manual_seed(3))
    labels[0, :2] = IGNORED
    expected = summed_cross_entropy(module(tokens, *rest).flatten(0, 1), labels.flatten())
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    loss = module(tokens, *rest, labels=labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)


@each_case
def test_examples_of_a_batch_do_not_see_each_other_in_evaluation(case: Case) -> None:
    model = bound_model(case)
    module: nn.Module = built(model).eval()
    inputs = example_inputs(model.input, 3)
    with torch.no_grad():
        together = module(*inputs)
        alone = torch.cat([module(*(each[number : number + 1] for each in inputs)) for number in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
