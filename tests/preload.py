"""Imported once, by the process that test workers are forked from: all that takes long to import."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # no thread may be there when a worker is forked

# What any optimizer, and any ZeRO-3 optimizer, would import later.
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.modeling_utils  # noqa: F401

from trainer.engine import _import_deepspeed

_import_deepspeed()
