"""Bytes by part: against closed forms, and against real tensors under the same bookkeeping."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import RunConfig
from tests.configs.minimal import minimal
from trainer import memory
from trainer.bound import BoundModel, BoundTask
from trainer.example_batch import example_batch
from trainer.initialization import materialize
from trainer.memory import CPU_BASE_BYTES, Memory, predict_memory
from trainer.models import cnn, gpt, lstm
from trainer.parts.recompute import Recompute
from trainer.storages import LogitsShape, Storages
from trainer.tasks import image_classification, language_modeling

BATCH, SEQ_LEN, VOCAB, WIDTH = 4, 64, 300, 48
TEXT = BoundTask(
    language_modeling,
    language_modeling.Config.model_validate({"seq_len": SEQ_LEN, "tokenizer": {"name": "bpe", "vocab_size": VOCAB}}),
)
PICTURES = BoundTask(image_classification, image_classification.Config(num_classes=5, image_size=16))

PICTURE_MODEL = BoundModel(cnn, cnn.Config(blocks=(1, 1), width=16), *PICTURES.io())


def gpt_model(**settings: Any) -> BoundModel:
    sizes = {"num_layers": 2, "hidden_size": WIDTH, "num_heads": 4} | settings
    return BoundModel(gpt, gpt.Config(**sizes), *TEXT.io())


def config_of(stage: int = 0, precision: str = "fp32", micro_batch_size: int = BATCH, **changes: Any) -> RunConfig:
    values = {
        "batch": {"global_batch_size": 4 * BATCH, "micro_batch_size": micro_batch_size},
        "zero": {"stage": stage},
        "precision": precision,
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "checkpoint": {"every": 10},
        "steps": 5,
    }
    return RunConfig.model_validate(minimal(**(values | changes)))


@pytest.fixture
def tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU the peak is that of tensors, and not of what malloc holds."""
    monkeypatch.setattr(memory, "Storages", lambda *, one_memory, **_: Storages(one_memory=one_memory))


def predicted(model: BoundModel, config: RunConfig, size: int = 1, *, on_gpu: bool = True) -> Memory:
    return predict_memory(model, TEXT, config, size, on_gpu=on_gpu)


# --- activations


def test_a_perceptrons_activations_are_those_that_its_backward_pass_reads() -> None:
    """Of each layer the output of its ReLU stays, which the next one multiplies with, and the last output."""
    rows, width, layers, outputs = 32, 64, 3, 8
    module = nn.Sequential(*(each for _ in range(layers) for each in (nn.Linear(width, width), nn.ReLU())))
    module.append(nn.Linear(width, outputs))
    inputs = torch.randn(rows, width)
    storages = Storages(one_memory=True)
    storages.assign("inputs", inputs)
    for parameter in module.parameters():
        storages.assign("weights", parameter)
    with storages:
        output = module(inputs)
        assert storages.live["activations", False] == 4 * rows * (layers * width + outputs)
        output.sum().backward()
    del output
    weights = 4 * sum(parameter.numel() for parameter in module.parameters())
    assert storages.live["weights", False] == weights
    assert storages.live["activations", False] == weights, "the gradients, which nobody has named"


def test_the_more_is_computed_again_the_less_is_kept() -> None:
    policies: list[Recompute] = [True, 2, "selective", False]
    kept = [
        predicted(gpt_model(num_layers=4, activation_checkpointing=policy), config_of(stage=3)).device["activations"]
        for policy in policies
    ]
    assert kept == sorted(kept) and kept[2] < 0.8 * kept[3], kept


@pytest.mark.parametrize("layers", [3, 5])
def test_with_recompute_each_block_adds_its_input_alone(layers: int) -> None:
    """Korthikanti et al. 2022, section 5: s b h values a layer with full recomputation; here of 4 bytes."""
    one, more = (
        predicted(gpt_model(num_layers=count, activation_checkpointing=True), config_of(stage=3)).device
        for count in (2, layers)
    )
    assert more["activations"] - one["activations"] == (layers - 2) * 4 * BATCH * SEQ_LEN * WIDTH
    without = [predicted(gpt_model(num_layers=count), config_of(stage=3)).device for count in (2, layers)]
    assert without[1]["activations"] - without[0]["activations"] > 5 * (more["activations"] - one["activations"])


def test_activations_grow_with_the_micro_batch() -> None:
    small, large = (predicted(gpt_model(), config_of(3, micro_batch_size=size)).device for size in (4, 16))
    assert large["activations"] + large["logits"] == pytest.approx(
        4 * (small["activations"] + small["logits"]), rel=0.05
    )


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (gpt_model(), TEXT),
        (gpt_model(activation_checkpointing=True), TEXT),
        (gpt_model(activation_checkpointing="selective"), TEXT),
        (BoundModel(lstm, lstm.Config(num_layers=2, hidden_size=WIDTH), *TEXT.io()), TEXT),
        (PICTURE_MODEL, PICTURES),
    ],
    ids=["gpt", "gpt, recompute", "gpt, selective", "lstm", "cnn"],
)
@pytest.mark.usefixtures("tensors_alone")
def test_fake_tensors_live_as_long_as_real_ones(model: BoundModel, task: BoundTask) -> None:
    """The same bookkeeping over a forward and a backward pass that compute something."""
    with torch.device("meta"):
        module = model.build()
    materialize(module, model.init_parameter, seed=0)
    storages = Storages(one_memory=True)
    for tensor in (*module.parameters(), *module.buffers()):
        storages.assign("weights", tensor)
    batch = example_batch(task, BATCH)
    for tensor in batch.values():
        storages.assign("activations", tensor)
    gc.collect()
    with storages:
        task.loss(module, batch).backward()
    real = storages.peak_bytes
    # Stage 0, one micro-batch, SGD: weights and gradients are all that stays, as above. Then comes an all-reduce,
    # whose peak lies below that of the backward pass for models as small as these.
    config = config_of(
        optimizer={"name": "sgd", "lr": 0.1}, batch={"global_batch_size": BATCH, "micro_batch_size": BATCH}
    )
    fake = predict_memory(model, task, config, 1, on_gpu=False)
    snapshot = sum(fake.host.values())
    within = 0.15 if model.module is lstm else 0.01  # oneDNN's workspace is told by a formula
    assert fake.tensors - snapshot == pytest.approx(real, rel=within)


@pytest.mark.parametrize(
    ("model", "task"),
    [(gpt_model(), TEXT), (gpt_model(activation_checkpointing=True), TEXT), (PICTURE_MODEL, PICTURES)],
    ids=["gpt", "gpt, recompute", "cnn"],
)
def test_operations_are_those_of_a_real_micro_batch(model: BoundModel, task: BoundTask) -> None:
    """Forward and backward of a second micro-batch, which adds to the gradients of the first."""
    with torch.device("meta"):
        module = model.build()
    materialize(module, model.init_parameter, seed=0)
    batch = example_batch(task, BATCH)
    task.loss(module, batch).backward()
    with Storages(one_memory=True) as storages:
        task.loss(module, batch).backward()
    found, of_two = (predict_memory(model, task, config_of(), size, on_gpu=False).dispatched for size in (1, 2))
    assert found.micro_batch == storages.operations
    assert of_two.micro_batch == storages.operations + 1, "the buffer of stage 0's all-reduce"
    assert found.parameters == len(list(module.parameters()))


def test_logits_are_a_part_of_their_own() -> None:
    module = gpt_model(num_layers=1).build()
    storages = Storages(one_memory=True)
    for tensor in (*module.parameters(), *module.buffers()):
        storages.assign("weights", tensor)
    storages.logits = LogitsShape(VOCAB, frozenset(parameter.numel() for parameter in module.parameters()))
    with storages:
        logits = module(torch.ones(BATCH, SEQ_LEN, dtype=torch.int64))
        assert storages.live["logits", False] == 4 * logits.numel() == 4 * BATCH * SEQ_LEN * VOCAB


# --- ZeRO


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_state_is_that_of_zero(stage: int, size: int) -> None:
    """Rajbhandari et al. 2020, section 3: 2 P of weights and 12 P of optimizer state, cut as the stage says."""
    model = gpt_model(hidden_size=96)
    numel = model.num_parameters()
    found = predicted(model, config_of(stage, "bf16"), size).device
    assert found["optimizer"] == pytest.approx(12 * numel / size, rel=0.01)
    if stage < 3:
        assert found["weights"] == pytest.approx(2 * numel + _tables(model), rel=0.01)
    else:
        gathered = 2 * numel if size > 1 else 0
        assert 2 * numel / size <= found["weights"] <= (2 * numel / size + gathered + _tables(model)) * 1.01


def _tables(model: BoundModel) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.build().buffers())


def test_on_a_cpu_what_malloc_keeps_is_a_part() -> None:
    model = gpt_model(num_layers=4, hidden_size=96)
    with_heap = predicted(model, config_of(2), on_gpu=False)
    assert with_heap.device["heap"] > 0 and predicted(model, config_of(2)).device["heap"] == 0
    assert with_heap.peak == sum(with_heap.device.values()) + sum(with_heap.host.values()) + CPU_BASE_BYTES


def test_offload_moves_state_to_the_host() -> None:
    model, zero = gpt_model(), {"stage": 2, "offload_optimizer": True}
    here, away = predicted(model, config_of(2, "bf16")), predicted(model, config_of(zero=zero, precision="bf16"))
    assert here.host.keys() <= {"buffers"} and away.device["optimizer"] == 0
    assert away.host["optimizer"] == pytest.approx(12 * model.num_parameters(), rel=0.01)
    on_cpu = predicted(model, config_of(zero=zero, precision="bf16"), on_gpu=False)
    assert on_cpu.peak > away.peak - away.base + CPU_BASE_BYTES, "a CPU has one memory"


@pytest.mark.usefixtures("tensors_alone")
def test_a_snapshot_is_held_while_training_only_where_something_is_saved_before_the_end() -> None:
    model = gpt_model()
    early, late = (predicted(model, config_of(checkpoint={"every": every}), on_gpu=False) for every in (2, 100))
    state = 12 * model.num_parameters()
    assert early.host["buffers"] == pytest.approx(state, rel=0.01)
    assert early.tensors - late.tensors == pytest.approx(state, rel=0.2)


def test_an_average_of_the_weights_is_state_and_part_of_a_snapshot() -> None:
    plain, averaged = (
        predicted(gpt_model(), config_of(optimizer={"name": "adamw", "lr": 1e-3, "ema_decay": decay}))
        for decay in (None, 0.9)
    )
    numel = gpt_model().num_parameters()
    assert averaged.device["optimizer"] - plain.device["optimizer"] == 4 * numel
    assert averaged.host["buffers"] - plain.host["buffers"] == 4 * numel
