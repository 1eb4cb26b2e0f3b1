from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.schema import OptimizerConfig
from trainer import optimizers


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def build(module: nn.Module, **settings: object) -> torch.optim.Optimizer:
    config = OptimizerConfig.model_validate({"lr": 0.1} | settings)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return optimizers.build(config, module.named_parameters(), shapes)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
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


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_a_flat_tensor_may_be_cut_anywhere(name: str) -> None:
    """ZeRO cuts it by world size: a rule that looked at shapes would depend on the number of workers."""
    generator = torch.Generator().manual_seed(0)
    weights, gradient = torch.randn(1001, generator=generator), torch.randn(1001, generator=generator)

    def stepped(cuts: list[int]) -> torch.Tensor:
        parts = []
        for weight, grad in zip(weights.tensor_split(cuts), gradient.tensor_split(cuts), strict=True):
            config = OptimizerConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.1)  # type: ignore[arg-type]
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
