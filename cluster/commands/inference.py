"""`shardyard generate` and `shardyard export`: what a checkpoint's weights are good for."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from cluster.commands.output import say
from configs.errors import UsageError
from data_pipelines.storage import Store
from trainer.checkpoint_files import CheckpointReader


def generate(arguments: Namespace) -> dict[str, Any]:
    """Continue a prompt, printing the text as it comes."""
    from trainer.generate import generate_text
    from trainer.inference import load_model

    reader = find_checkpoint(arguments.run, arguments.store)
    model, tokenizer = load_model(reader)
    pieces = []
    if not arguments.json:
        print(arguments.prompt, end="", flush=True)
    for piece in generate_text(
        model,
        tokenizer,
        arguments.prompt,
        max_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    ):
        pieces.append(piece)
        if not arguments.json:
            print(piece, end="", flush=True)
    if not arguments.json:
        print()
    return {"run": arguments.run, "checkpoint": reader.name, "prompt": arguments.prompt, "text": "".join(pieces)}


def export(arguments: Namespace) -> dict[str, Any]:
    """Write the weights as a folder that `transformers` loads."""
    from trainer.inference import export_checkpoint

    reader = find_checkpoint(arguments.run, arguments.store)
    export_checkpoint(reader, arguments.folder)
    say(
        arguments,
        f"Wrote {arguments.folder} from {reader.name}. Load it with "
        f"transformers.AutoModelForCausalLM.from_pretrained({arguments.folder!r}).",
    )
    return {"checkpoint": reader.name, "folder": arguments.folder}


def find_checkpoint(run: str, store: str) -> CheckpointReader:
    """The checkpoint that RUN or RUN@STEP names; without a step the newest good one.

    Raises:
        NotFound: no such run, or no such checkpoint. Damaged: the one asked for fails its digests.
    """
    from trainer import checkpoint
    from trainer.record import RunRecord

    name, _, step = run.partition("@")
    if step and not step.isdigit():
        raise UsageError(f"'{run}' names no checkpoint: after '@' stands a step, as in {name}@100.")
    record = RunRecord.open(store, name)
    found = checkpoint.find(record.store.child("checkpoints"), int(step) if step else None)
    for message in found.skipped:
        print(message, file=sys.stderr)
    return found


def parent_folder(source: str, store: str) -> str:
    """Where `--from` points: a checkpoint folder of a run, or a Hugging Face folder as it is."""
    if Store(source).exists("config.json"):
        return Store(source).uri
    return find_checkpoint(source, store).store.uri
