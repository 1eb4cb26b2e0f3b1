"""A training script as a careful person writes it: torchrun, DeepSpeed, one loop; nothing is recorded or saved.

The same model file, loss, precision and threads as the product; its batches lie ready in memory.

    torchrun --nproc-per-node=2 benchmarks/bare_deepspeed.py RECIPE.yaml OUT.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch

from configs.load import load
from trainer.distributed import World
from trainer.run_data import Position, RunData, open_datasets
from trainer.validate import validate

BATCHES_IN_MEMORY = 16


def main(recipe: str, out: str) -> None:
    plan = validate(load(recipe))
    config = plan.config
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(config.resources.threads)
    deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    model = plan.model.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, betas=config.optimizer.betas, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
            "gradient_accumulation_steps": config.accumulation(world_size),
            "gradient_clipping": config.optimizer.clip_grad_norm,
            "zero_optimization": {"stage": config.zero.stage, "reduce_bucket_size": 50_000_000},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        },
    )
    data = RunData.of(open_datasets(plan), plan)
    loader = data.loader(config, World(rank, world_size, rank, torch.device("cpu")), Position())
    batches = [
        [{name: tensor.clone() for name, tensor in micro.tensors.items()} for micro in loader.step(step)]
        for step in range(BATCHES_IN_MEMORY)
    ]
    loader.close()
    ended = []
    for step in range(config.steps):
        for batch in batches[step % BATCHES_IN_MEMORY]:
            loss = plan.task.loss(engine, batch) / plan.task.num_items(batch)
            engine.backward(loss)
            engine.step()
        loss.item()  # what every script prints
        ended.append(time.time())
    if rank == 0:
        Path(out).write_text(json.dumps(ended))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
