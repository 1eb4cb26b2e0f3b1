"""The smallest run that goes through everything: a few KB of text, bytes as tokens, one layer, seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew", "potions")


def tiny_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run on a text that is written into `folder`, its store beside it; `changes` to the top level."""
    text = folder / "text.txt"
    if not text.exists():
        words = random.Random(1)
        documents = [" ".join(words.choice(WORDS) for _ in range(words.randrange(5, 40))) for _ in range(60)]
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text("\n\n".join(documents))
    return {
        "name": "tiny",
        "steps": 8,
        "store": str(folder / "runs"),
        "task": {"name": "language_modeling", "seq_len": 32, "tokenizer": {"name": "bytes", "vocab_size": 257}},
        "model": {"name": "gpt", "num_layers": 1, "hidden_size": 32, "num_heads": 2, "dropout": 0.1},
        "data": {"name": "text", "paths": [str(text)], "separator": "\n\n", "validation_fraction": 0.1},
        "batch": {"global_batch_size": 5, "micro_batch_size": 2},
        "optimizer": {"lr": 0.01},
        "evaluation": {"every": 4, "examples": 3, "sample_tokens": 4},
        "checkpoint": {"every": 2, "keep": None},
        "tracking": {"mlflow": None},
    } | changes


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The same as a file (JSON is YAML, a value a line)."""
    path = folder / "run.yaml"
    path.write_text(json.dumps(tiny_config(folder, **changes), indent=1))
    return path
