"""One model trained by other people's loops: each reads the same prepared batches and starts from the same weights.

    python benchmarks/throughput_loops.py SYSTEM RECIPE.json BATCHES.safetensors OUT.json

Each writes when its steps ended (epoch seconds), their losses, and its process's peak memory. None saves or records
anything. The loss is the task's own, of trainer/tasks, and the optimizer torch's fused AdamW, everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.load import load
from trainer.bound import BoundTask
from trainer.initialization import materialize
from trainer.validate import validate

ROOT = Path(__file__).resolve().parents[1]
Batch = Mapping[str, Tensor]


class Work:
    """What all of them are given: model, task, batches, settings; and what they answer with."""

    def __init__(self, recipe: str, batches: str) -> None:
        plan = validate(load(recipe))
        self.config = plan.config
        self.task: BoundTask = plan.task
        torch.set_num_threads(self.config.resources.threads)
        with torch.device("meta"):
            self.model: nn.Module = plan.model.build()
        materialize(self.model, plan.model.init_parameter, seed=self.config.seed)
        tensors = load_file(batches)
        self.batches: list[Batch] = []
        while any(name.startswith(f"{len(self.batches)}/") for name in tensors):
            prefix = f"{len(self.batches)}/"
            self.batches.append({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
        self.ended: list[float] = []
        self.losses: list[float] = []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the batch's items."""
        return self.task.loss(model, batch) / self.task.num_items(batch)

    def optimizer(self) -> torch.optim.Optimizer:
        given = self.config.optimizer
        return torch.optim.AdamW(
            self.model.parameters(), lr=given.lr, betas=given.betas, eps=given.eps, weight_decay=0.0, fused=True
        )

    def stepped(self, loss: float) -> None:
        self.ended.append(time.time())
        self.losses.append(loss)

    def each(self) -> Iterator[Batch]:
        """The batches, again and again, one a step."""
        for step in range(self.config.steps):
            yield self.batches[step % len(self.batches)]

    def write(self, out: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(out).write_text(json.dumps({"ended": self.ended, "losses": self.losses, "peak_bytes": peak}))


class OneAStep(torch.utils.data.Dataset[Batch]):
    """For loaders: example n is the whole batch of step n."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __len__(self) -> int:
        return self._work.config.steps

    def __getitem__(self, step: int) -> Batch:
        return self._work.batches[step % len(self._work.batches)]

    def loader(self) -> torch.utils.data.DataLoader[Batch]:
        return torch.utils.data.DataLoader(self, batch_size=None)


def bare(work: Work) -> None:
    """As well as we can: batches in memory, fused AdamW, gradients given back at once, one number read a step."""
    optimizer, clip = work.optimizer(), work.config.optimizer.clip_grad_norm
    parameters = list(work.model.parameters())
    work.model.train()
    for batch in work.each():
        loss = work.loss(work.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        work.stepped(loss.item())


def hf_trainer(work: Work) -> None:
    """transformers.Trainer with its defaults but for what must agree; nothing is logged or saved."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ours(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
            return work.loss(model, inputs)

        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(OneAStep(work).loader())

        def training_step(self, *given: Any, **named: Any) -> Tensor:
            self.last = super().training_step(*given, **named)
            return self.last

    class Stamp(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            work.stepped(trainer.last.item())

    arguments = TrainingArguments(
        output_dir=os.environ["SCRATCH"],
        max_steps=work.config.steps,
        learning_rate=work.config.optimizer.lr,
        adam_beta1=work.config.optimizer.betas[0],
        adam_beta2=work.config.optimizer.betas[1],
        max_grad_norm=work.config.optimizer.clip_grad_norm,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = Ours(work.model, arguments, train_dataset=OneAStep(work), callbacks=[Stamp()])
    trainer.train()


def lightning(work: Work) -> None:
    """Lightning's Trainer with its defaults but for what must agree; no logger, bar or checkpoint."""
    import lightning as lt

    class Module(lt.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model

        def training_step(self, batch: Batch, _: int) -> Tensor:
            return work.loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.optimizer()

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            work.stepped(outputs["loss"].item())

    trainer = lt.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=work.config.steps,
        gradient_clip_val=work.config.optimizer.clip_grad_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), OneAStep(work).loader())


def deepspeed_loop(work: Work) -> None:
    """DeepSpeed's engine at the same ZeRO stage, as its documentation shows."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled
    config = work.config
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=work.model,
        optimizer=work.optimizer(),
        config={
            "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.clip_grad_norm,
            "zero_optimization": {"stage": config.zero.stage, "reduce_bucket_size": 50_000_000},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        },
    )
    for batch in work.each():
        loss = work.loss(engine, batch)
        engine.backward(loss)
        engine.step()
        work.stepped(loss.item())


def _in_ray(settings: dict[str, str]) -> None:
    sys.path.insert(0, settings["root"])
    from benchmarks import throughput_loops

    work = throughput_loops.Work(settings["recipe"], settings["batches"])
    throughput_loops.deepspeed_loop(work)
    work.write(settings["out"])


def ray_train(recipe: str, batches: str, out: str) -> None:
    """Ray Train v2 around that, as its documentation shows."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    threads = load(recipe).config.resources.threads
    ray.init(num_cpus=threads + 1, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        _in_ray,
        train_loop_config={"recipe": recipe, "batches": batches, "out": out, "root": str(ROOT)},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": threads}),
        run_config=RunConfig(storage_path=os.environ["SCRATCH"]),
    ).fit()
    ray.shutdown()


LOOPS = {"bare": bare, "hf_trainer": hf_trainer, "lightning": lightning}


def main(system: str, recipe: str, batches: str, out: str) -> None:
    if system == "ray_train":
        ray_train(recipe, batches, out)
        return
    work = Work(recipe, batches)
    LOOPS[system](work)
    work.write(out)
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
