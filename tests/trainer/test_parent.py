"""What a run may change when it starts from another's checkpoint."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.train import _parent
from configs.errors import NotFound, UsageError
from configs.load import load
from configs.schema import RunConfig
from data_pipelines.storage import Store
from tests.tiny import tiny_config, write_recipe
from trainer.parent import check_llama, check_parent
from trainer.record import RunRecord

GPT = {"name": "gpt", "num_layers": 1, "hidden_size": 32, "num_heads": 2}


def config(folder: Path, **changes: Any) -> RunConfig:
    return load(tiny_config(folder, **changes)).config


def manifest(folder: Path, step: int = 4) -> dict[str, Any]:
    """As a checkpoint of the unchanged tiny run has it: JSON."""
    return {"run": "old", "step": step, "config": json.loads(json.dumps(config(folder).model_dump(mode="json")))}


def refusal(folder: Path, state: Any, **changes: Any) -> str | None:
    try:
        check_parent(config(folder, **changes), manifest(folder), state)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("changes", "key", "weights_too"),
    [
        ({"model": GPT | {"num_layers": 2}}, "model.num_layers is 2 here and 1 there", True),
        ({"model": GPT | {"tie_embeddings": False}}, "model.tie_embeddings is False here and True there", True),
        ({"task": {"name": "language_modeling", "seq_len": 32}}, "task.tokenizer.name is 'bpe' here", True),
        (
            {"task": {"name": "language_modeling", "seq_len": 16, "tokenizer": {"name": "bytes"}}},
            "task.seq_len is 16 here and 32 there",
            False,
        ),
        ({"seed": 1}, "seed is 1 here and 0 there", False),
        ({"optimizer": {"lr": 0.1, "name": "sgd"}}, "optimizer.name is 'sgd' here and 'adamw' there", False),
        ({"data": {"name": "python_stdlib"}}, "data.name is 'python_stdlib' here", False),
    ],
)
def test_what_must_stay(tmp_path: Path, changes: dict[str, Any], key: str, weights_too: bool) -> None:
    branch = refusal(tmp_path, "all", **changes)
    assert branch is not None and key in branch and "old@4" in branch
    assert "every other key may change" in branch and "without --branch" in branch
    weights = refusal(tmp_path, "weights", **changes)
    assert (weights is not None and key in weights) if weights_too else weights is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 100, "name": "new", "optimizer": {"lr": 0.5, "weight_decay": 0.1}},
        {"batch": {"global_batch_size": 4, "micro_batch_size": 4}, "precision": "bf16", "zero": {"stage": 3}},
        {"model": GPT | {"dropout": 0.3}},
        # The defaults, spelled out: the same model.
        {"model": GPT | {"dropout": 0.1, "tie_embeddings": True, "rope_theta": 10000.0}},
        {"task": {"name": "language_modeling", "seq_len": 32, "tokenizer": {"name": "bytes"}}},
    ],
)
def test_what_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert refusal(tmp_path, "all", **changes) is None
    assert refusal(tmp_path, "weights", **changes) is None


def test_a_branch_needs_steps_beyond_its_parent(tmp_path: Path) -> None:
    assert refusal(tmp_path, "weights", steps=4) is None
    assert "set steps to more than 4" in str(refusal(tmp_path, "all", steps=4))


# --- --from


def from_(folder: Path, parent: str, *overrides: str, branch: bool = False) -> Any:
    recipe = str(write_recipe(folder))
    return _parent(Namespace(recipe=recipe, overrides=list(overrides), parent=parent, branch=branch, json=False))


def test_the_parent_has_another_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Give it one of its own: name=.*shardyard runs resume tiny"):
        from_(tmp_path, "tiny@4")


def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="--from old@4: There is no run 'old'"):
        from_(tmp_path, "old@4")


def test_a_run_that_goes_on_keeps_its_parent(tmp_path: Path) -> None:
    """Its parent may have newer checkpoints by now, or none."""
    folder = str(tmp_path / "runs" / "old" / "checkpoints" / "step-00000004")
    resolved = load(tiny_config(tmp_path), [f"parent.checkpoint={folder}", "parent.state=all"])
    RunRecord.create(Store(tmp_path / "runs"), resolved).close()
    for source in ("old", "old@4", folder):
        assert from_(tmp_path, source, branch=True).checkpoint == folder
    for source, branch in (("old@5", True), ("old", False), ("older", True)):
        with pytest.raises(NotFound):
            from_(tmp_path, source, branch=branch)


# --- Hugging Face


def llama(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    described = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(described | changes))
    return folder


def test_a_llama_of_the_same_sizes_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_llama(config(tmp_path), llama(tmp_path / "llama"))
    parent = from_(tmp_path, str(tmp_path / "llama"))
    assert (parent.checkpoint, parent.state) == (str(tmp_path / "llama"), "weights")
    assert "Starting from the weights of" in capsys.readouterr().out
    with pytest.raises(UsageError, match="Leave --branch out"):
        from_(tmp_path, str(tmp_path / "llama"), branch=True)


def test_of_another_llama_all_that_differs_is_named(tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama", num_hidden_layers=3, intermediate_size=96, tie_word_embeddings=False)
    with pytest.raises(UsageError) as error:
        check_llama(config(tmp_path), folder)
    wanted = "Set what differs: model.num_layers=3 model.intermediate_size=96 model.tie_embeddings=false"
    assert str(error.value).endswith(wanted)
    remedy = str(error.value).rpartition(": ")[2].split()
    check_llama(load(tiny_config(tmp_path), remedy).config, folder)
