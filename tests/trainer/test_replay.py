"""Steps of runs once more: the record's bits, and the example that does not belong there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from configs.errors import NotFound
from tests.pool import WorkerFailed, run_workers
from tests.tiny import tiny_config
from tests.trainer.attempts import train
from tests.trainer.test_divergence import NAN, SPIKE, events
from tests.trainer.test_divergence import config as signals
from trainer.distributed import World
from trainer.record import RunRecord
from trainer.replay import Target, find_target, replay

pytestmark = pytest.mark.distributed


def work(world: World, store: str, run: str, targets: list[tuple[Target, int | None]]) -> list[dict[str, Any]]:
    return [replay(world, store, run, target, checkpoint_step) for target, checkpoint_step in targets]


def replayed(
    record: RunRecord, *steps: tuple[int, int | None], world_size: int = 2
) -> list[tuple[Target, dict[str, Any]]]:
    """Of each (step, step of the checkpoint) what is recorded and what rank 0 finds; the folder stays as it is."""
    folder = Path(record.store.path())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    targets = [find_target(record, step) for step, _ in steps]
    asked = [(target, origin) for target, (_, origin) in zip(targets, steps, strict=True)]
    found = run_workers(work, world_size, record.config.store, record.name, asked)[0]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    return list(zip(targets, found, strict=True))


def assert_same_bits(target: Target, found: dict[str, Any]) -> None:
    assert (found["loss"], found["grad_norm"]) == (target.loss, target.grad_norm), target


def text_with_garbage(folder: Path) -> None:
    """Ordinary documents, and some of letters at random: keys tell them apart by their numbers."""
    rng = random.Random(2)
    documents = [" ".join(rng.choice(("the", "lazy", "dog", "jumps")) for _ in range(40)) for _ in range(30)]
    documents += ["".join(chr(rng.randrange(33, 127)) for _ in range(200)) for _ in range(4)]
    (folder / "text.txt").write_text("\n\n".join(documents))


def test_steps_of_a_language_model(tmp_path: Path) -> None:
    """With dropout and an idle slot; from a checkpoint, from an older one, and from the beginning."""
    text_with_garbage(tmp_path)
    quiet = {"evaluation": {"every": None, "examples": 3, "sample_tokens": 0}}
    record = train(tiny_config(tmp_path, steps=5, **quiet), world_size=2)
    seen = replayed(record, (5, 4), (5, 2), (2, None))
    for target, found in seen:
        assert_same_bits(target, found)
        assert len(found["examples"]) == 5
        losses = [each["loss"] for each in found["examples"]]
        assert losses == sorted(losses, reverse=True)
    assert [found["from_step"] for _, found in seen] == [4, 2, 0]
    assert seen[0][1] == seen[1][1] | {"from_step": 4}
    first, *_, last = seen[0][1]["examples"]
    ordinary = set("the lazy dog jumps")
    assert set(last["preview"]) <= ordinary and not set(first["preview"]) <= ordinary
    assert len(first["documents"]) >= 1 and not set(first["documents"]) & set(last["documents"])


def test_a_poisoned_row_comes_first_and_a_run_that_it_ended_can_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed):
        train(signals(tmp_path, "ends", "stop", NAN), world_size=1)
    record = RunRecord.open(str(tmp_path / "runs"), "ends")
    (event,) = events(record, "diverged")
    ((_, found),) = replayed(record, (event["step"], None), world_size=1)
    assert found["examples"][0]["documents"] == ["0017"]
    with pytest.raises(NotFound, match=r"no loss of step 99. The nearest are"):
        find_target(record, 99)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_steps_after_a_divergence(tmp_path: Path, policy: str) -> None:
    record = train(signals(tmp_path, policy, policy, SPIKE), world_size=2)
    (first, *_) = events(record, "diverged")
    origin = first["step"] // 7 * 7 - 7
    for target, found in replayed(record, (first["step"], origin), (first["step"] + 2, origin)):
        assert_same_bits(target, found)
    if policy == "skip":
        ((_, found),) = replayed(record, (first["step"], origin))
        assert found["examples"][0]["documents"] == ["0017"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_any_stage_and_exact_mode_on_any_number_of_workers(tmp_path: Path, stage: int) -> None:
    exact = stage == 3
    settings = tiny_config(tmp_path, zero={"stage": stage}, determinism="exact" if exact else "cluster", steps=5)
    record = train(settings, world_size=2)
    ((target, found),) = replayed(record, (4, 2), world_size=3 if exact else 2)
    assert_same_bits(target, found)
