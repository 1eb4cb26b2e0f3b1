"""Using a checkpoint's weights outside training: one process, no DeepSpeed, no process group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import Damaged, UsageError
from configs.load import Resolved
from configs.schema import RunConfig
from data_pipelines.tokenizer import Tokenizer
from trainer.bound import BoundModel
from trainer.checkpoint_files import CheckpointReader
from trainer.validate import validate


def load_model(reader: CheckpointReader) -> tuple[nn.Module, Tokenizer]:
    """The checkpoint's model in fp32 and evaluation mode, on the CPU, and its tokenizer.

    Raises:
        Damaged: the checkpoint lacks a parameter of the model.
    """
    model = bound_model(reader)
    with torch.device("meta"):
        module = model.build()
    weights = dict(reader.weights())
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
    absent = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if absent or unexpected:
        raise Damaged(
            f"Checkpoint {reader.name} does not fit its own model: missing {absent}, unknown {list(unexpected)}. "
            "It was written by another version of the model's file; use that version, or another checkpoint."
        )
    return module.eval(), Tokenizer.from_json(reader.manifest["tokenizer"])
