"""A model whose first values are weights that transformers wrote, as far as these have them.

A parameter is filled by itself (initialization.py) and read from the mapped file when its turn comes: so no process
holds anything twice, at any ZeRO stage. Only safetensors are read: no code comes with weights.

The model's file says what transformers calls each of its parameters, in `pretrained_name(name)`, and with which
PRETRAINED_PREFIX before it where the model has a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import Damaged, NotFound, UsageError
from configs.schema import WarmStartConfig
from data_pipelines import pretrained
from trainer.bound import BoundModel

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class WarmModel(BoundModel):
    """A model that begins with stored values.

    stored: of each parameter that takes them, by our name: the open file, and what the tensor is called there.
    unused: tensors that have no place in the model.
    """

    stored: Mapping[str, tuple[Any, str]]
    unused: tuple[str, ...]

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one full parameter in place: with its stored values, or with those of a new model."""
        if name in self.stored:
            file, theirs = self.stored[name]
            tensor.copy_(file.get_tensor(theirs))
        else:
            super().init_parameter(name, tensor, generator)


def warm(model: BoundModel, config: WarmStartConfig) -> WarmModel:
    """The model with the weights that the config names; nothing but their names and shapes is read yet.

    Raises:
        UsageError: the weights lack a parameter, or have it in another shape, and `fresh` does not name it; `fresh`
            names none; or the model's file knows no weights of transformers.
        NotFound, Damaged: the weights are not there, or cannot be read. And what packages.fetch raises.
    """
    if not hasattr(model.module, "pretrained_name"):
        raise UsageError(
            f"warm_start: {model.module.__name__} has no pretrained_name, so what transformers calls its parameters is "
            "not known. Use a model that has it (bert), or take a checkpoint of Shardyard's own with --from."
        )
    found = {name.removeprefix(model.module.PRETRAINED_PREFIX): (file, name) for name, file in _open(config.weights)}
    there = {theirs: tuple(file.get_slice(name).get_shape()) for theirs, (file, name) in found.items()}
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in model.build().named_parameters()}
    taken = {name: model.module.pretrained_name(name) for name in shapes if not name.startswith(config.fresh)}
    misfits = [
        f"'{name}' is {shapes[name]} in this model, and '{theirs}' is {there.get(theirs, 'missing')} there"
        for name, theirs in taken.items()
        if there.get(theirs) != shapes[name]
    ]
    misfits += [
        f"no parameter is named '{each}...'"
        for each in config.fresh
        if not any(name.startswith(each) for name in shapes)
    ]
    if misfits:
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        raise UsageError(
            f"The weights of {config.weights} do not fit: {'; '.join(misfits[:_SHOWN])}{more}. Set `model` and "
            "`task.tokenizer` to what they were trained with; name in warm_start.fresh what shall begin anew."
        )
    unused = tuple(sorted(found.keys() - taken.values()))
    stored = {name: found[theirs] for name, theirs in taken.items()}
    return WarmModel(model.module, model.config, model.input, model.output, stored, unused)


def _open(address: str) -> Iterator[tuple[str, Any]]:
    """Each tensor's name, and the open file that it is in."""
    from safetensors import SafetensorError, safe_open

    for path in _paths(address):
        try:
            file = safe_open(path, "pt")
        except FileNotFoundError as error:
            raise NotFound(
                f"There is no {path}, and only safetensors can be read. Check warm_start.weights, or convert them."
            ) from error
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{path} cannot be read: {error}. Copy it again.") from error
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            yield name, file


def _paths(address: str) -> list[Path]:
    """The files that hold the weights; a large model's folder has several, and an index."""
    if address.startswith(pretrained.SCHEME):
        return [pretrained.weights_of(address)]
    folder = Path(address)
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{index} does not say which file holds which tensor. Copy it again.") from error
