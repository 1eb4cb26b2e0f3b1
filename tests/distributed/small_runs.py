"""Small runs for tests: a tiny GPT and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.schema import RunConfig
from tests.configs.minimal import minimal
from tests.distributed.language_batches import SEQ_LEN, VOCAB_SIZE
from trainer.bound import BoundModel, BoundTask
from trainer.models import gpt
from trainer.tasks import language_modeling


@dataclass(frozen=True)
class Case:
    """7 examples in micro-batches of 2 are K = 4, the last with one example: at 3 workers 2 of 6 slots are idle."""

    stage: int = 0
    optimizer: str = "adamw"
    precision: str = "fp32"
    tied: bool = False
    offload: bool = False
    checkpointing: bool = False
    clip: float | None = 0.5
    micro_batch_size: int = 2
    num_layers: int = 1
    steps: int = 50
    nesterov: bool = False
    ema_decay: float | None = None

    def config(self) -> RunConfig:
        lr = {"sgd": 0.1, "rmsprop": 1e-3, "adagrad": 0.03}.get(self.optimizer, 3e-3)
        momentum = 0.9 if self.optimizer in ("sgd", "rmsprop") else 0.0
        return RunConfig.model_validate(
            minimal(
                seed=11,
                steps=self.steps,
                batch={"global_batch_size": 7, "micro_batch_size": self.micro_batch_size},
                precision=self.precision,
                zero={"stage": self.stage, "offload_optimizer": self.offload},
                optimizer={
                    "name": self.optimizer,
                    "lr": lr,
                    "momentum": momentum,
                    "nesterov": self.nesterov,
                    "weight_decay": 0.1,
                    "clip_grad_norm": self.clip,
                    "ema_decay": self.ema_decay,
                },
            )
        )

    def model(self) -> BoundModel:
        config = gpt.Config(
            num_layers=self.num_layers,
            hidden_size=24,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=32,
            tie_embeddings=self.tied,
            dropout=0.1,
            activation_checkpointing=self.checkpointing,
        )
        return BoundModel(gpt, config, *task().io())

    def plain(self) -> Case:
        """The same for all cases that must train alike."""
        return replace(self, stage=1, offload=False, checkpointing=False)


def task() -> BoundTask:
    tokenizer = {"name": "bytes", "vocab_size": VOCAB_SIZE}
    return BoundTask(
        language_modeling, language_modeling.Config.model_validate({"seq_len": SEQ_LEN, "tokenizer": tokenizer})
    )


def allow_emulated_fp16() -> None:
    """PyTorch computes fp16 on any CPU, slowly: lets a worker see the path of processors that have it."""
    import deepspeed

    import trainer.engine

    type(deepspeed.get_accelerator()).is_fp16_supported = lambda self: True
    trainer.engine.unsupported = lambda device, precision: None  # type: ignore[assignment]
