"""Update rules: torch.optim's own where ZeRO can cut them, since DeepSpeed's are compiled and need a compiler.

ZeRO hands an optimizer flat pieces of the weights, so at stages 1 to 3 only rules that treat every element by itself
are right. Muon looks at whole matrices: `configs/rules.py` refuses it there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerConfig
from trainer.optimizers import whole_vectors
from trainer.optimizers.adagrad import Adagrad
from trainer.optimizers.muon import MuonWithAdamW

_HEADS = ("head", "lm_head", "classifier", "decoder", "score")  # what models call the layer that gives their output


def build(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    shapes: Mapping[str, torch.Size],
    tables: Collection[str] = (),
    *,
    exact: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters.

    exact: one whose bits do not show where ZeRO cuts (docs/exact.md).

    shapes: full shape by name; that of a parameter itself is empty once ZeRO-3 has cut it.
    tables: names of embeddings and heads, which Muon leaves to AdamW.
    """
    lr, decay, momentum = config.lr, config.weight_decay, config.momentum
    if config.name == "muon":
        trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        hidden = {name for name, _ in trainable if len(shapes[name]) == 2 and name not in tables}
        return MuonWithAdamW(
            [parameter for name, parameter in trainable if name in hidden],
            parameter_groups(config, [each for each in trainable if each[0] not in hidden], shapes),
            lr=lr,
            momentum=0.95 if momentum is None else momentum,
            betas=config.betas,
            eps=config.eps,
            weight_decay=decay,
        )
    groups = parameter_groups(config, named_parameters, shapes)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum or 0.0, nesterov=config.nesterov, weight_decay=decay)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, eps=config.eps, momentum=momentum or 0.0, weight_decay=decay)
    if config.name == "adagrad":
        return Adagrad(groups, lr=lr, eps=config.eps, weight_decay=decay)
    rules: Any = whole_vectors if exact else torch.optim
    rule = rules.AdamW if config.name == "adamw" else rules.Adam
    # Fused is one pass over memory, several times faster on a CPU.
    return rule(groups, lr=lr, betas=config.betas, eps=config.eps, weight_decay=decay, fused=True)  # type: ignore[no-any-return]


def tables(module: nn.Module) -> set[str]:
    """Names of matrices whose rows stand for ids or classes: embeddings, what is tied to one, and heads."""
    embedded = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    return {
        name
        for name, parameter in module.named_parameters()
        if id(parameter) in embedded or any(part in _HEADS for part in name.split(".")[:-1])
    }


def parameter_groups(
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], shapes: Mapping[str, torch.Size]
) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for norms and biases, which have one axis. One group where there is no decay.

    Fewer groups are fewer collectives: ZeRO flattens each by itself.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    decayed = [parameter for name, parameter in trainable if len(shapes[name]) > 1]
    exempt = [parameter for name, parameter in trainable if len(shapes[name]) <= 1]
    if config.weight_decay == 0 or not decayed or not exempt:
        decay = config.weight_decay if decayed else 0.0
        return [{"params": [parameter for _, parameter in trainable], "weight_decay": decay}]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
