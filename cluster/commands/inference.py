"""`shardyard generate` and `shardyard export`: what a checkpoint's weights are good for."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.output import run_and_step, say

if TYPE_CHECKING:
    from trainer.checkpoint_files import CheckpointReader


def generate(arguments: Namespace) -> dict[str, Any]:
    """Continue a prompt, printing the text as it comes."""
    reader = find_checkpoint(arguments.run, arguments.store)

    from trainer.generate import generate_text
    from trainer.inference import load_model

    model, tokenizer = load_model(reader)
    pieces = generate_text(
        model,
        tokenizer,
        arguments.prompt,
        max_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    text = ""
    if not arguments.json:
        print(arguments.prompt, end="", flush=True)
    for piece in pieces:
        text += piece
        if not arguments.json:
            print(piece, end="", flush=True)
    if not arguments.json:
        print()
    return {"checkpoint": reader.store.path(), "prompt": arguments.prompt, "text": text}


def export(arguments: Namespace) -> dict[str, Any]:
    """Write the weights as a folder that `transformers` loads."""
    reader = find_checkpoint(arguments.run, arguments.store)

    from trainer.inference import export_checkpoint

    loads = export_checkpoint(reader, Path(arguments.folder))
    say(
        arguments,
        f"Wrote {arguments.folder} from {reader.store.path()}. Load it in Python: "
        f"transformers.{loads}.from_pretrained({arguments.folder!r})",
    )
    return {"checkpoint": reader.store.path(), "folder": arguments.folder}


def find_checkpoint(source: str, store: str) -> CheckpointReader:
    """The checkpoint that RUN or RUN@STEP names; without a step the newest good one, damaged ones are named on stderr.

    Raises:
        NotFound: no such run, or no such checkpoint. Damaged: the one asked for fails its digests.
    """
    from trainer.record import RunRecord

    name, step = run_and_step(source)
    checkpoints = RunRecord.open(store, name).store.child("checkpoints")

    from trainer import checkpoint

    if step is None:
        found = checkpoint.newest(checkpoints, lambda message: print(message, file=sys.stderr))
        if found is not None:
            return found[1]
    return checkpoint.find(checkpoints, step)
