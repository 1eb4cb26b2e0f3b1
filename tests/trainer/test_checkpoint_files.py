"""The format on disk, one process, no DeepSpeed: a torch optimizer alone is what DeepSpeed gives at ZeRO stage 0."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from configs.errors import Damaged, NotFound, ShardyardError, UsageError
from configs.schema import CheckpointConfig, KeepBestConfig
from data_pipelines.storage import Store
from trainer import checkpoint, engine_state, tensor_files
from trainer.checkpoint import Checkpointer, Retention
from trainer.checkpoint_files import (
    MANIFEST,
    CheckpointReader,
    file_name,
    save_id,
    tensor_key,
    write_manifest,
    write_part,
)
from trainer.progress import Progress
from trainer.snapshot import Reading

WORLD = SimpleNamespace(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Model(nn.Module):
    """Tied, frozen and 0-dimensional parameters, a buffer that is state and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.norm = nn.BatchNorm1d(6)
        self.fixed = nn.Linear(6, 6)
        self.fixed.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.fixed(self.norm(self.embed(tokens)))) * self.scale
        return logits


def make_engine(seed: int = 0, optimizer: str = "AdamW") -> Any:
    torch.manual_seed(seed)
    module = Model()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    options = {"lr": 0.05} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    torch_optimizer = getattr(torch.optim, optimizer)(trained, **options)
    return SimpleNamespace(
        module=module,
        world=WORLD,
        zero_stage=0,
        average=None,
        exact=None,
        reading=Reading(),
        deepspeed=SimpleNamespace(optimizer=torch_optimizer),
    )


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(0, 13, (5,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(engine.module(tokens), tokens.flip(0))
        loss.backward()
        engine.reading.wait()
        engine.deepspeed.optimizer.step()
        engine.deepspeed.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state(engine: Any) -> dict[str, torch.Tensor]:
    """Everything that the engine holds, copied: the oracle of what a load must give."""
    optimizer = engine.deepspeed.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    everything = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    for parameter, entries in optimizer.state.items():
        everything |= {f"{names[parameter]}.{kind}": value.clone() for kind, value in entries.items()}
    return everything


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different
    assert all(left[name].dtype == right[name].dtype for name in left)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run" / "checkpoints")


def save(store: Store, engine: Any, *steps: int, keep: int | None = None, **rule: Any) -> Checkpointer:
    checkpointer = Checkpointer(store, WORLD, CheckpointConfig(keep=keep, **rule), Progress())  # type: ignore[arg-type]
    for step in steps:
        checkpointer.save(step, engine, {"examples_seen": step * 8}, wait=True)
        assert checkpointer.last_error is None
    return checkpointer


def files(store: Store) -> list[str]:
    root = Path(store.uri)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def step_folder(store: Store, step: int) -> Path:
    return Path(store.uri) / f"step-{step:08d}"


def tensor_path(store: Store, step: int) -> Path:
    return next(step_folder(store, step).glob("*.safetensors"))


# --- round trips


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_a_loaded_engine_goes_on_as_if_never_stopped(store: Store, optimizer: str) -> None:
    engine = make_engine(optimizer=optimizer)
    train(engine, range(3))
    save(store, engine, 3)
    saved = state(engine)
    losses, end = train(engine, range(3, 8)), state(engine)

    other = make_engine(seed=9, optimizer=optimizer)
    checkpoint.load(other, checkpoint.find(store, 3))
    assert_equal(state(other), saved)
    assert train(other, range(3, 8)) == losses
    assert_equal(state(other), end)


def test_the_loss_scaler_goes_with_the_checkpoint(store: Store) -> None:
    """DeepSpeed's dynamic fp16 scaler, by its own class's fields; a run in another precision takes no notice of it."""
    engine, other, without = make_engine(), make_engine(), make_engine()
    values = {"cur_scale": 512.0, "cur_iter": 9, "last_overflow_iter": 7, "cur_hysteresis": 1}
    engine.deepspeed.optimizer.loss_scaler = SimpleNamespace(dynamic=True, **values)
    fresh = {"cur_scale": 65536.0, "cur_iter": 0, "last_overflow_iter": -1, "cur_hysteresis": 2}
    other.deepspeed.optimizer.loss_scaler = SimpleNamespace(dynamic=True, **fresh)
    without.deepspeed.optimizer.loss_scaler = SimpleNamespace(dynamic=False, cur_scale=1.0)
    save(store, engine, 1)
    checkpoint.load(other, checkpoint.find(store))
    assert vars(other.deepspeed.optimizer.loss_scaler) == {"dynamic": True, **values}
    checkpoint.load(without, checkpoint.find(store))
    assert without.deepspeed.optimizer.loss_scaler.cur_scale == 1.0


def test_before_the_first_step_there_is_no_optimizer_state(store: Store) -> None:
    engine = make_engine()
    save(store, engine, 0)
    losses = train(engine, range(3))
    other = make_engine(seed=9)
    train(other, range(2))  # leaves state that the load must take away
    checkpoint.load(other, checkpoint.find(store, 0))
    assert not other.deepspeed.optimizer.state
    assert train(other, range(3)) == losses


def test_a_snapshot_is_not_changed_by_training_on(store: Store) -> None:
    engine = make_engine()
    train(engine, range(2))
    saved = state(engine)
    checkpointer = Checkpointer(store, WORLD, CheckpointConfig(keep=None), Progress())  # type: ignore[arg-type]
    checkpointer.save(2, engine, {})
    train(engine, range(2, 6))
    checkpointer.close()
    other = make_engine(seed=9)
    checkpoint.load(other, checkpoint.find(store))
    assert_equal(state(other), saved)


def test_weights_fill_a_plain_module(store: Store) -> None:
    engine = make_engine()
    train(engine, range(2))
    save(store, engine, 2)
    weights = dict(checkpoint.find(store).weights())
    assert_equal(weights, engine.module.state_dict())
    assert weights["head.weight"] is weights["embed.weight"]
    module = Model()
    module.load_state_dict(weights, strict=True)
    assert_equal(dict(module.state_dict()), engine.module.state_dict())


def test_tied_weights_are_stored_once(store: Store) -> None:
    save(store, make_engine(), 0)
    reader = checkpoint.find(store)
    assert reader.manifest["aliases"] == {"embed.weight": ["head.weight"]}
    assert "head.weight" not in reader.manifest["ranges"]
    assert "table" not in reader.manifest["buffers"]


def test_weights_alone_leave_a_fresh_optimizer(store: Store) -> None:
    engine = make_engine()
    train(engine, range(2))
    save(store, engine, 2)
    for source in (checkpoint.find(store), dict(engine.module.state_dict())):
        other = make_engine(seed=9)
        checkpoint.load_weights(other, source)
        assert_equal(state(other), dict(engine.module.state_dict()))


def test_the_safetensors_library_reads_the_files(store: Store) -> None:
    engine = make_engine()
    train(engine, range(1))
    save(store, engine, 1)
    with safe_open(tensor_path(store, 1), framework="pt") as file:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            stored = file.get_tensor(f"{kind}/embed.weight/0")
            weight = engine.module.embed.weight
            held = weight.detach() if kind == "master" else engine.deepspeed.optimizer.state[weight][kind]
            assert torch.equal(stored, held.flatten())


@settings(max_examples=25, deadline=None)
@given(
    numel=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    data=st.data(),
)
def test_any_range_of_any_partition_reads_back(
    tmp_path_factory: pytest.TempPathFactory, numel: int, cuts: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    whole = torch.randint(0, 100, (numel,)).to(dtype)
    edges = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    store = Store(tmp_path_factory.mktemp("partition"))
    parts = []
    for rank, (start, stop) in enumerate(itertools.pairwise(edges)):
        save = save_id("ab", 1)
        tensors = {tensor_key("frozen", "w", start): whole[start:stop]} if stop > start else {}
        write_part(store, rank, save, tensors, {"w": [[start, stop]]})
        parts.append(json.loads(store.read_text(f"rank-{rank:05d}-{save}.json")))
    header = {
        "step": 1,
        "save": save_id("ab", 1),
        "data": {},
        "parameters": {"w": {"shape": [numel], "dtype": str(dtype), "frozen": True}},
        "buffers": {},
        "aliases": {},
        "scalars": {"kinds": []},
    }
    write_manifest(store, header, parts)
    for reader in (CheckpointReader(store), CheckpointReader(RemoteStore(store.uri))):
        assert reader.verify() == []
        start = data.draw(st.integers(0, numel))
        stop = data.draw(st.integers(start, numel))
        assert torch.equal(reader.read("w", "frozen", start, stop).to(dtype), whole[start:stop])


@pytest.mark.parametrize("ranges", [[[0, 4]], [[0, 6], [5, 10]], [[0, 5], [6, 10]], []])
def test_a_manifest_is_refused_unless_every_element_is_there_once(tmp_path: Path, ranges: list[list[int]]) -> None:
    header = {"parameters": {"w": {"shape": [2, 5], "dtype": "float32", "frozen": False}}, "buffers": {}}
    entry = {"name": file_name(0, save_id("ab", 1)), "size": 0, "blocks": []}
    with pytest.raises(ShardyardError, match="'w'"):
        write_manifest(Store(tmp_path), header, [{"file": entry, "ranges": {"w": ranges}}])
    assert not (tmp_path / MANIFEST).exists()


class RemoteStore(Store):
    """A local folder reached as an object store is: no path, no memory map."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.uri = f"file://{self.uri}"
        self._root = None

    def child(self, *parts: str) -> Store:
        folder = Path(self.uri.removeprefix("file://"), *parts)
        folder.mkdir(parents=True, exist_ok=True)  # object stores need no folders
        return RemoteStore(folder)


def test_a_store_without_paths(tmp_path: Path) -> None:
    store = RemoteStore(tmp_path).child("checkpoints")
    engine = make_engine()
    train(engine, range(2))
    save(store, engine, 1, 2, keep=1)
    assert checkpoint.saved_steps(store) == [2]
    other = make_engine(seed=9)
    checkpoint.load(other, checkpoint.find(store))
    assert_equal(state(other), state(engine))


def test_a_range_is_read_without_its_neighbours(tmp_path: Path) -> None:
    store, big = RemoteStore(tmp_path), torch.arange(3_000_000, dtype=torch.float32)
    entry = tensor_files.write_tensors(store, "big.safetensors", {"big": big})
    path = tmp_path / "big.safetensors"
    assert len(entry["blocks"]) == -(-path.stat().st_size // entry["block_bytes"])
    flip(path, -5)  # damage in the last block is no concern of who reads the first
    for place in (store, Store(tmp_path)):
        file = tensor_files.TensorFile(place, entry)
        assert torch.equal(file.read("big", 200_000, 900_000), big[200_000:900_000])
        assert 700_000 * 4 <= file.bytes_read <= 700_000 * 4 + 3 * entry["block_bytes"]  # the header's block, two edges
        before = file.bytes_read
        file.read("big", 200_000, 900_000)
        assert file.bytes_read == before
        with pytest.raises(Damaged, match=f"block {len(entry['blocks']) - 1} "):
            file.read("big", 2_900_000, 3_000_000)
        assert len(file.verify()) == 1
        assert file.bytes_read == entry["size"]


def test_blocks_are_small_and_few() -> None:
    for size in (1, 5000, 10 << 20, 16 << 20, (16 << 20) + 1, 1 << 30):
        found = tensor_files.block_bytes(size)
        assert found in (4 << 10, 8 << 10, 256 << 10) and size / found <= 4096
    assert tensor_files.block_bytes(1 << 40) == 256 << 10


def test_files_of_blocks_of_a_mebibyte_are_read_as_before(tmp_path: Path) -> None:
    values = torch.arange(700_000, dtype=torch.float32)
    entry = tensor_files.write_tensors(Store(tmp_path), "old.safetensors", {"old": values})
    raw = (tmp_path / "old.safetensors").read_bytes()
    blocks = [xxhash.xxh3_64_hexdigest(raw[at : at + 2**20]) for at in range(0, len(raw), 2**20)]
    old = {"name": entry["name"], "size": entry["size"], "blocks": blocks}
    file = tensor_files.TensorFile(Store(tmp_path), old)
    assert file.verify() == [] and len(blocks) == 3
    assert torch.equal(file.read("old", 250_000, 270_000), values[250_000:270_000])


# --- another model or optimizer


def test_another_model_is_refused(store: Store) -> None:
    save(store, make_engine(), 0)
    other = make_engine()
    other.module.head = nn.Linear(6, 14)
    with pytest.raises(UsageError, match=r"head\.weight.*missing"):
        checkpoint.load(other, checkpoint.find(store))


def test_another_optimizer_is_refused(store: Store) -> None:
    engine = make_engine()
    train(engine, range(1))
    save(store, engine, 1)
    with pytest.raises(UsageError, match=r"AdamW.*SGD"):
        checkpoint.load(make_engine(optimizer="SGD"), checkpoint.find(store))


def test_a_load_that_sets_nothing_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, make_engine(), 0)
    monkeypatch.setattr(engine_state, "parts_of", lambda engine: [])
    with pytest.raises(ShardyardError, match="set 0 of"):
        checkpoint.load(make_engine(seed=9), checkpoint.find(store))


# --- damage


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Store], object]] = {
    "a flipped bit in a header": lambda store: flip(tensor_path(store, 3), 9),
    "a flipped bit in a tensor": lambda store: flip(tensor_path(store, 3), -1),
    "a truncated file": lambda store: cut(tensor_path(store, 3)),
    "an emptied file": lambda store: tensor_path(store, 3).write_bytes(b""),
    "a missing file": lambda store: tensor_path(store, 3).unlink(),
    "a missing manifest": lambda store: (step_folder(store, 3) / MANIFEST).unlink(),
    "a flipped bit in the manifest": lambda store: flip(step_folder(store, 3) / MANIFEST, 40),
    "a truncated manifest": lambda store: cut(step_folder(store, 3) / MANIFEST),
    "another checkpoint's manifest": lambda store: shutil.copy(
        step_folder(store, 2) / MANIFEST, step_folder(store, 3) / MANIFEST
    ),
    "an empty folder": lambda store: (shutil.rmtree(step_folder(store, 3)), step_folder(store, 3).mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_named_and_skipped(store: Store, damage: str) -> None:
    engine = make_engine()
    save(store, engine, 1, 2)
    at_2 = state(engine)
    train(engine, range(1))
    save(store, engine, 3)
    DAMAGE[damage](store)

    messages: list[str] = []
    found = checkpoint.newest(store, messages.append)
    assert found is not None and found[0] == 2
    assert len(messages) == 1 and "step-00000003" in messages[0]
    other = make_engine(seed=9)
    checkpoint.load(other, found[1])
    assert_equal(state(other), at_2)
    with pytest.raises((Damaged, NotFound), match=r"step-00000003|step 3"):
        checkpoint.load(other, checkpoint.find(store, 3))


def test_every_flipped_bit_is_noticed(store: Store) -> None:
    save(store, make_engine(), 1)
    for path in (tensor_path(store, 1), step_folder(store, 1) / MANIFEST):
        good = path.read_bytes()
        for offset in range(0, len(good), 97):
            flip(path, offset)
            assert checkpoint.newest(store, lambda _: None) is None, f"{path.name} at {offset}"
            path.write_bytes(good)
    assert checkpoint.newest(store) is not None


def test_what_is_not_there_is_said(store: Store) -> None:
    with pytest.raises(NotFound, match="no checkpoint"):
        checkpoint.find(store)
    save(store, make_engine(), 1, 2)
    with pytest.raises(NotFound, match="steps 1, 2"):
        checkpoint.find(store, 7)
    for step in (1, 2):
        cut(tensor_path(store, step))
    with pytest.raises(Damaged, match="No checkpoint"):
        checkpoint.find(store)


# --- saves that fail, leftovers, retention


def test_a_full_disk_loses_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    checkpointer = save(store, engine, 1)
    before = files(store)
    step_folder(store, 2).mkdir()
    full = step_folder(store, 2) / file_name(0, save_id(checkpointer._attempt_id, 2))
    full.symlink_to("/dev/full")  # every write to it fails as on a full disk
    checkpointer.save(2, engine, {}, wait=True)
    assert checkpointer.last_error is not None and "disk is full" in checkpointer.last_error
    assert "disk is full" in caplog.text
    assert files(store) == before and not step_folder(store, 2).exists()

    checkpointer.save(3, engine, {}, wait=True)
    assert checkpointer.last_error is None
    assert checkpoint.find(store).manifest["step"] == 3


def test_a_failed_second_save_of_a_step_leaves_the_first(store: Store) -> None:
    engine = make_engine()
    checkpointer = save(store, engine, 1)
    before = files(store)
    full = step_folder(store, 1) / file_name(0, save_id(checkpointer._attempt_id, 2))
    full.symlink_to("/dev/full")
    checkpointer.save(1, engine, {}, wait=True)
    assert checkpointer.last_error is not None
    assert files(store) == before
    assert checkpoint.find(store).verify() == []


def test_saving_a_step_again_replaces_it(store: Store) -> None:
    engine = make_engine()
    save(store, engine, 1)
    train(engine, range(2))
    save(store, engine, 1)
    assert len(files(store)) == 2
    other = make_engine(seed=9)
    checkpoint.load(other, checkpoint.find(store, 1))
    assert_equal(state(other), state(engine))


def test_leftovers_of_a_killed_save_are_cleaned_at_the_next_start(store: Store) -> None:
    save(store, make_engine(), 1, 2)
    before = files(store)
    shutil.copytree(step_folder(store, 2), step_folder(store, 3))
    (step_folder(store, 3) / MANIFEST).unlink()
    shutil.copy(tensor_path(store, 2), step_folder(store, 2) / file_name(0, save_id("0badf00d", 1)))
    (step_folder(store, 2) / f".{MANIFEST}.tmp-host-1-1").write_bytes(b"{")
    save(store, make_engine())
    assert [name for name in files(store) if ".tmp-" not in name] == before


def test_events_reach_the_record(store: Store) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    flushed: list[list[str]] = []
    record = SimpleNamespace(
        name="run",
        attempt=2,
        config=SimpleNamespace(model_dump=lambda mode: {"model": {"name": "gpt"}}),
        event=lambda kind, **fields: events.append((kind, fields)),
        flush=lambda: flushed.append(files(store)),
    )
    checkpointer = Checkpointer(store, WORLD, CheckpointConfig(keep=None), Progress(), record)  # type: ignore[arg-type]
    checkpointer.save(1, make_engine(), {"examples_seen": 8}, {"tokenizer": "{}"}, wait=True)
    # A run that is killed now goes on from here, so the metrics of the steps before must be on disk first.
    assert len(flushed) == 1 and f"step-00000001/{MANIFEST}" not in flushed[0]
    Path(store.uri, "step-00000002").write_text("a file where a folder should be")
    checkpointer.save(2, make_engine(), {}, wait=True)
    assert [kind for kind, _ in events] == ["checkpoint", "checkpoint_failed"]
    assert events[0][1]["step"] == 1 and events[0][1]["size_bytes"] == checkpoint.find(store, 1).size_bytes
    manifest = checkpoint.find(store, 1).manifest
    expected = {"run": "run", "attempt": 2, "tokenizer": "{}", "data": {"examples_seen": 8}}
    assert expected.items() <= manifest.items() and manifest["config"]["model"] == {"name": "gpt"}


def test_retention_counts_only_what_verifies(store: Store) -> None:
    engine = make_engine()
    save(store, engine, 1, 2, 3)
    flip(tensor_path(store, 3), -1)
    save(store, engine, 4, keep=2)
    assert checkpoint.saved_steps(store) == [4, 3, 2]  # 3 is damaged, so 2 is the second good one
    save(store, engine, 5, keep=2)
    assert checkpoint.saved_steps(store) == [5, 4]


def test_retention_keeps_every_nth_the_best_and_what_is_protected(store: Store) -> None:
    engine = make_engine()
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 9.0, 5: 2.5, 6: 2.0}
    checkpointer = Checkpointer(
        store,
        WORLD,  # type: ignore[arg-type]
        CheckpointConfig(keep=1, keep_every=4, keep_best=KeepBestConfig(metric="loss")),
        Progress(),
    )
    there = []
    for step, loss in losses.items():
        extra = {"evaluation": {"loss": loss}} if step != 3 else {}  # 3 was saved without one
        if step < 4:
            extra |= {"early_stopping": {"best_step": 1}}
        checkpointer.save(step, engine, {}, extra, wait=True)
        there.append(checkpoint.saved_steps(store))
    assert there == [[1], [2, 1], [3, 2, 1], [4, 2], [5, 4, 2], [6, 4, 2]]
    most = CheckpointConfig(keep=1, keep_best=KeepBestConfig(metric="loss", goal="max"))
    assert Retention(store, most).going() == [2]


def test_the_last_good_one_is_kept(store: Store) -> None:
    engine = make_engine()
    checkpointer = save(store, engine, 1, 2, keep=1)
    assert checkpoint.saved_steps(store) == [2]
    step_folder(store, 3).mkdir()
    (step_folder(store, 3) / file_name(0, save_id(checkpointer._attempt_id, 3))).symlink_to("/dev/full")
    checkpointer.save(3, engine, {}, wait=True)
    assert checkpoint.saved_steps(store) == [2] and checkpoint.find(store).verify() == []
