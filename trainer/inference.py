"""Using a checkpoint's weights outside training: one process, no DeepSpeed, no process group."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import Damaged, UsageError
from configs.load import load
from data_pipelines.tokenizer import Tokenizer
from trainer.bound import BoundModel
from trainer.checkpoint_files import CheckpointReader
from trainer.initialization import materialize
from trainer.shapes import Tokens
from trainer.validate import validate


def load_model(reader: CheckpointReader) -> tuple[nn.Module, Tokenizer]:
    """The model of `load_module`, and its tokenizer.

    Raises:
        UsageError: it is no language model, or its model's file is not there.
        Damaged: a block fails its digest, or the checkpoint lacks a parameter of the model.
    """
    if not isinstance(_bound_model(reader).input, Tokens):
        task = reader.manifest["config"]["task"]["name"]
        raise UsageError(f"Checkpoint {reader.name} is of the task '{task}'; only language models continue a text.")
    tokenizer = _tokenizer(reader)
    return load_module(reader), tokenizer


def load_module(reader: CheckpointReader) -> nn.Module:
    """The checkpoint's model in fp32 and evaluation mode, on the CPU.

    Raises:
        UsageError: its model's file is not there.
        Damaged: a block fails its digest, or the checkpoint lacks a parameter of the model.
    """
    model = _bound_model(reader)
    with torch.device("meta"):
        module = model.build()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    stored = {name: reader.shape(name) for name in reader.manifest["parameters"]}
    differing = sorted(name for name in shapes | stored if shapes.get(name) != stored.get(name))
    if differing:
        raise Damaged(
            f"Checkpoint {reader.store.path()} does not fit its own model: {', '.join(differing[:3])} "
            f"{'differs' if len(differing) == 1 else 'differ'} in shape or presence. It was written by another version "
            "of the model's file: use that version, or another checkpoint."
        )

    def read(name: str, tensor: Tensor, _: torch.Generator) -> None:
        tensor.copy_(_full(reader, name))

    materialize(module, read, seed=0, device="cpu")
    module.load_state_dict({name: _full(reader, name) for name in reader.manifest["buffers"]}, strict=False)
    return module.eval()


def export_checkpoint(reader: CheckpointReader, folder: Path) -> str:
    """Write the weights and the tokenizer as a Hugging Face folder; it appears whole or not at all.

    Returns the class of transformers that loads it.

    Raises:
        UsageError: something is at `folder` already, or transformers has no such model.
        Damaged: a block fails its digest. ShardyardError: it cannot be written.
    """
    from trainer.huggingface import export_llama, export_own
    from trainer.models import gpt, hf

    model = _bound_model(reader)
    if isinstance(model.config, hf.Config):
        module = load_module(reader)
        assert isinstance(module, hf.Wrapped)
        export_own(module, _tokenizer(reader) if "tokenizer" in reader.manifest else None, folder)
        return hf.CLASSES[module.use]
    if not isinstance(model.config, gpt.Config):
        name = reader.manifest["config"]["model"]["name"]
        raise UsageError(
            f"Only gpt and hf have a counterpart at Hugging Face; checkpoint {reader.name} is of a model '{name}'."
        )
    export_llama(dict(reader.weights()), model.config, (model.input, model.output), _tokenizer(reader), folder)
    return hf.CLASSES["causal"]


def _bound_model(reader: CheckpointReader) -> BoundModel:
    """The model with the config that the checkpoint was trained with."""
    return validate(load(reader.manifest["config"])).model


def _full(reader: CheckpointReader, name: str) -> Tensor:
    shape = reader.shape(name)
    return reader.read(name, reader.weights_kind(name), 0, math.prod(shape)).view(shape)


def _tokenizer(reader: CheckpointReader) -> Tokenizer:
    if "tokenizer" not in reader.manifest:
        raise UsageError(f"Checkpoint {reader.store.path()} has no tokenizer: it is not of a language model.")
    return Tokenizer.from_json(reader.manifest["tokenizer"])
