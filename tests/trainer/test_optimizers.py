from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from configs.schema import OptimizerConfig, RunConfig
from tests.configs.minimal import minimal
from trainer import optimizers


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def build(module: nn.Module, **settings: object) -> torch.optim.Optimizer:
    config = OptimizerConfig.model_validate({"lr": 0.1} | settings)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return optimizers.build(config, module.named_parameters(), shapes, optimizers.tables(module))


def trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The weights after six steps with gradients that differ from step to step; lr halves on the way."""
    for step in range(6):
        for number, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if step == 3:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


ORACLES: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ({}, lambda groups: torch.optim.SGD(groups, lr=0.1)),
    "sgd momentum": ({"momentum": 0.9}, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
    "sgd nesterov": (
        {"momentum": 0.9, "nesterov": True},
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adam": ({}, lambda groups: torch.optim.Adam(groups, lr=0.1, betas=(0.9, 0.95))),
    "adamw": ({}, lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))),
    "rmsprop": ({"momentum": 0.5}, lambda groups: torch.optim.RMSprop(groups, lr=0.1, momentum=0.5)),
    "adagrad": ({"eps": 1e-10}, lambda groups: torch.optim.Adagrad(groups, lr=0.1)),
}


@pytest.mark.parametrize("rule", ORACLES)
def test_weights_are_those_of_torch_optim(rule: str) -> None:
    settings, oracle = ORACLES[rule]
    torch.manual_seed(0)
    module = model()
    plain = copy.deepcopy(module)
    ours = trained(module, build(module, name=rule.split()[0], weight_decay=0.3, **settings))
    theirs = trained(plain, oracle(decay_groups(plain)))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


class Language(nn.Module):
    """An embedding tied to its head, a hidden matrix, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("make", [Language, lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))])
def test_muon_steps_hidden_matrices_and_adamw_the_rest(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make()
    plain = copy.deepcopy(module)
    optimizer = build(module, name="muon", weight_decay=0.3, momentum=0.9)
    ours = trained(module, optimizer)
    named = dict(plain.named_parameters())
    matrices = [p for name, p in named.items() if name in ("hidden.weight", "0.weight")]
    tables = [p for name, p in named.items() if name == "embedding.weight"]
    vectors = [p for p in named.values() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": tables, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}], 0.1)
    for group in adamw.param_groups:
        group["betas"] = (0.9, 0.95)
    both = SimpleNamespace(param_groups=[*muon.param_groups, *adamw.param_groups])
    both.step = lambda: (muon.step(), adamw.step())  # type: ignore[func-returns-value]
    for our, their in zip(ours, trained(plain, both), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)
    kinds = {name: set(optimizer.state[parameter]) for name, parameter in module.named_parameters()}
    assert [name for name, found in kinds.items() if found == {"momentum_buffer"}] == [
        name for name in named if name in ("hidden.weight", "0.weight")
    ]


def test_a_muon_step_is_orthogonal_but_for_its_size() -> None:
    module = nn.Sequential(nn.Linear(6, 16, bias=False))
    before = module[0].weight.detach().clone()
    optimizer = build(module, name="muon", lr=0.1)
    module[0].weight.grad = torch.randn(16, 6)
    optimizer.step()
    singular = torch.linalg.svdvals((before - module[0].weight.detach()) / (0.1 * 0.2 * 16**0.5))
    assert ((singular > 0.5) & (singular < 1.5)).all(), "five iterations bring every singular value close to 1"


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        ({"name": "muon"}, 1, r"zero.stage=1: .*Use zero.stage=0 .*optimizer.name=adamw"),
        ({"name": "muon"}, 3, r"zero.stage=3: .*Use zero.stage=0 .*optimizer.name=adamw"),
        ({"name": "adam", "nesterov": True}, 0, r"optimizer.nesterov=true with optimizer.name=adam"),
        ({"name": "sgd", "nesterov": True}, 0, r"optimizer.momentum=None has no effect"),
        ({"name": "adagrad", "momentum": 0.9}, 0, r"it has no momentum"),
        ({"name": "adamw", "momentum": 0.9}, 0, r"first of optimizer.betas"),
    ],
)
def test_settings_that_would_be_wrong_are_refused(settings: dict[str, Any], stage: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(minimal(optimizer={"lr": 0.1} | settings, zero={"stage": stage}))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "adagrad"])
def test_elementwise_rules_are_allowed_at_every_stage(name: str, stage: int) -> None:
    RunConfig.model_validate(minimal(optimizer={"lr": 0.1, "name": name}, zero={"stage": stage}))


def test_muon_is_allowed_at_stage_0() -> None:
    RunConfig.model_validate(minimal(optimizer={"lr": 0.1, "name": "muon"}, zero={"stage": 0}))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "adagrad", "muon"])
def test_weight_decay_leaves_norms_and_biases_out(name: str) -> None:
    module = model()
    optimizer = build(module, name=name, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {key: decay[id(parameter)] for key, parameter in module.named_parameters()}
    assert found == {key: 0.3 if key in ("0.weight", "2.weight") else 0.0 for key in found}


def test_one_group_without_weight_decay() -> None:
    assert len(build(model()).param_groups) == 1


def test_frozen_parameters_are_left_out() -> None:
    module = model()
    module[0].requires_grad_(False)  # type: ignore[index, operator]
    held = [p for group in build(module, weight_decay=0.1).param_groups for p in group["params"]]
    assert len(held) == 4 and all(parameter.requires_grad for parameter in held)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "adagrad"])
def test_a_flat_tensor_may_be_cut_anywhere(name: str) -> None:
    """ZeRO cuts it by world size: a rule that looked at shapes would depend on the number of workers."""
    generator = torch.Generator().manual_seed(0)
    weights, gradient = torch.randn(1001, generator=generator), torch.randn(1001, generator=generator)

    def stepped(cuts: list[int]) -> torch.Tensor:
        parts = []
        for weight, grad in zip(weights.tensor_split(cuts), gradient.tensor_split(cuts), strict=True):
            config = OptimizerConfig(
                name=name, lr=0.1, weight_decay=0.1, momentum=0.9 if name in ("sgd", "rmsprop") else None
            )  # type: ignore[arg-type]
            parameter = nn.Parameter(weight.clone())
            optimizer = optimizers.build(config, [("p", parameter)], {"p": torch.Size([1001, 1])})
            for _ in range(5):
                parameter.grad = grad.clone()
                optimizer.step()
            parts.append(parameter.detach())
        return torch.cat(parts)

    whole = stepped([])
    for cuts in ([500], [334, 668], [1, 8, 77]):
        torch.testing.assert_close(stepped(cuts), whole, rtol=1e-6, atol=1e-7)
