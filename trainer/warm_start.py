"""A model whose first values are weights that transformers wrote, as far as these have them.

A parameter is filled by itself (initialization.py) and read from the mapped file when its turn comes: so no process
holds anything twice, at any ZeRO stage. Only safetensors are read: no code comes with weights.

The model's file says what its parameters are called there, in `pretrained_names(config, names, stored)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import Damaged, NotFound, UsageError
from configs.schema import WarmStartConfig
from data_pipelines import pretrained
from trainer.bound import BoundModel
from trainer.engine_layout import persistent_buffers

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class WarmModel(BoundModel):
    """A model that begins with stored values.

    stored: of each parameter and buffer that takes them, by our name: the open file, and the tensor's name there.
    unused: tensors that have no place in the model.
    """

    stored: Mapping[str, tuple[Any, str]]
    unused: tuple[str, ...]

    def build(self) -> nn.Module:
        """The module, whose buffers of the model's state will be the stored ones."""
        module = super().build()
        for path, owner in module.named_modules():
            here = {name: f"{path}.{name}" if path else name for name in owner._buffers}
            if any(name in self.stored for name in here.values()):
                owner.reset_buffers = partial(self._reset_buffers, owner, here, owner.reset_buffers)  # type: ignore[assignment]
        return module

    def _reset_buffers(self, owner: nn.Module, names: Mapping[str, str], reset: Callable[[], None]) -> None:
        reset()
        for name, ours in names.items():
            if ours in self.stored:
                file, theirs = self.stored[ours]
                owner.get_buffer(name).copy_(file.get_tensor(theirs))

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
    if not hasattr(model.module, "pretrained_names"):
        raise UsageError(
            f"warm_start: {model.module.__name__} has no pretrained_names, so it is not known what transformers calls "
            "its parameters. Use a model that has it (bert, hf), or take a checkpoint of Shardyard's own with --from."
        )
    found = {name: (file, name) for name, file in _open(config.weights)}
    there = {name: tuple(file.get_slice(name).get_shape()) for name, (file, _) in found.items()}
    with torch.device("meta"):
        module = model.build()
    state = dict(module.named_parameters()) | persistent_buffers(module)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = [name for name in shapes if not name.startswith(config.fresh)]
    taken = model.module.pretrained_names(model.config, wanted, there)
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
    unused = tuple(sorted(found.keys() - set(taken.values())))
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
