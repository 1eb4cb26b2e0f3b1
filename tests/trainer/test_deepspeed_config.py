from __future__ import annotations

from typing import Any

from configs.schema import RunConfig
from tests.configs.minimal import minimal
from trainer.deepspeed_config import LARGEST_BUCKET, deepspeed_config


def settings(stage: int, num_parameters: int = 1001, **changes: Any) -> dict[str, Any]:
    config = RunConfig.model_validate(minimal(zero={"stage": stage}, **changes))
    return deepspeed_config(config, 3, num_parameters, on_gpu=False)


def test_accumulation_follows_from_the_batch_and_the_workers() -> None:
    batch = {"global_batch_size": 9, "micro_batch_size": 2}
    assert settings(1, batch=batch)["gradient_accumulation_steps"] == 2


def test_buffers_are_no_larger_than_the_model_and_bounded() -> None:
    for num_parameters, elements in ((1001, 1002), (70 * 10**9, LARGEST_BUCKET)):
        zero = settings(2, num_parameters)["zero_optimization"]
        assert {zero[key] for key in zero if key.endswith("bucket_size")} == {elements}


def test_stage_3_alone_averages() -> None:
    assert [settings(stage).get("gradient_allreduce_op") for stage in range(4)] == ["sum", "sum", "sum", None]


def test_stage_0_leaves_clipping_to_the_engine() -> None:
    assert [settings(stage)["gradient_clipping"] for stage in (0, 1)] == [0.0, 1.0]
    off = {"lr": 1e-3, "clip_grad_norm": None}
    assert settings(1, optimizer=off)["gradient_clipping"] == 0.0
