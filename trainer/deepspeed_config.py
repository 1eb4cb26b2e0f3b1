"""DeepSpeed's dictionary, from ours."""

from __future__ import annotations

from typing import Any

from configs.schema import RunConfig

LARGEST_BUCKET = 50_000_000  # elements: 200 MB in fp32, large enough to fill a network


def deepspeed_config(config: RunConfig, world_size: int, num_parameters: int, *, on_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given, and why each key is there (DeepSpeed 0.19).

    train_micro_batch_size_per_gpu, gradient_accumulation_steps: ours; the last only says when a step is complete, since
        losses arrive divided by the global count of items.
    gradient_allreduce_op: the ranks' gradients are summed, for the same reason. Stage 3 knows only the mean, which
        trainer/engine.py undoes.
    gradient_clipping: stage 0 clips in fp32 without telling the norm, so there the engine does it; also in exact mode,
        since DeepSpeed's norm depends on how parameters are cut.
    data_types, communication_data_type: micro-batches and ranks are added in fp32. By default bf16 is added in bf16.
    zero_allow_untested_optimizer: torch's SGD and RMSprop are right, but not on DeepSpeed's list.
    zero_force_ds_cpu_optimizer: offloading works with torch's optimizers; DeepSpeed's own needs a compiler.
    memory_efficient_linear: otherwise stage 3 swaps in a linear layer whose forward differs in the last bit.
    *_bucket_size: buffers are allocated in full, 500 million elements by default.
    stage3_param_persistence_threshold: norms and biases stay whole; by default small models would not be cut at all.
    overlap_comm: reduce behind the backward pass; on a CPU there is nothing to reduce behind.
    check_grad_overflow: a NaN never reaches the weights in bf16 either.
    timers.throughput: waits for the device twice a micro-batch.
    """
    stage, exact = config.zero.stage, config.determinism == "exact"
    bucket = min(LARGEST_BUCKET, num_parameters + num_parameters % 2)  # must be even
    zero: dict[str, Any] = {
        "stage": stage,
        "memory_efficient_linear": False,
        "overlap_comm": on_gpu and stage >= 2,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": min(100_000, num_parameters // 1000),
    }
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": (config.optimizer.clip_grad_norm or 0.0) if stage > 0 and not exact else 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    if stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if config.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0}  # 0: dynamic
    return settings
