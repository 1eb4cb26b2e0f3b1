"""Checkpoints of real engines. The oracle is DeepSpeed's own reader (safe_get_full_*), or never having stopped.

Each test is one or two launches of workers; a worker goes through many cells of (stage, precision, offload, optimizer).
"""

from __future__ import annotations

import contextlib
import gc
import io
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import CheckpointConfig, RunConfig
from data_pipelines.storage import Store
from tests.distributed.language_batches import rank_micro_batches
from tests.distributed.small_runs import allow_emulated_fp16
from tests.distributed.test_parity import Case, task
from tests.pool import WorkerFailed, run_workers
from trainer import checkpoint, engine_state
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import file_name, save_id
from trainer.engine import Engine, _import_deepspeed
from trainer.progress import Progress
from trainer.snapshot import Reading

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Cell:
    stage: int
    precision: str = "fp32"
    offload: bool = False
    optimizer: str = "AdamW"
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"stage{self.stage}", self.precision, "offload" * self.offload, self.optimizer, *self.settings]
        return "-".join(part for part in parts if part)


class Model(nn.Module):
    """Sizes that no world size divides; a tied, a frozen and a one-element parameter; buffers that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.norm = nn.LayerNorm(7)
        self.inner = nn.Linear(7, 7)
        self.fixed = nn.Linear(7, 7)
        self.fixed.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += int(self.training)
        hidden = self.norm(self.embed(tokens))
        hidden = hidden + self.fixed(torch.tanh(self.inner(hidden))) * self.scale
        logits: Tensor = self.head(hidden)
        return logits


def make_engine(world: Any, cell: Cell, seed: int = 0) -> Any:
    gc.freeze()  # DeepSpeed collects garbage for each engine, which walks all that the warm process imported
    deepspeed = _import_deepspeed()
    if cell.precision == "fp16":
        allow_emulated_fp16()
    torch.manual_seed(seed)
    module = Model()
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    options = {"momentum": 0.9} if cell.optimizer != "AdamW" else {"weight_decay": 0.1}
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = getattr(torch.optim, cell.optimizer)(groups, lr=0.03, **options)
    zero = {"stage": cell.stage, "stage3_param_persistence_threshold": 10, **cell.settings}  # some persist, some do not
    if cell.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "bf16": {"enabled": cell.precision == "bf16"},
        # the first scales overflow, so that scaler and optimizer are off the run's step
        "fp16": {
            "enabled": cell.precision == "fp16",
            "initial_scale_power": 22,
            "hysteresis": 1,
            "loss_scale_window": 3,
        },
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return SimpleNamespace(
        deepspeed=engine,
        module=engine.module,
        world=world,
        zero_stage=cell.stage,
        average=None,
        exact=None,
        reading=Reading(),
    )


def train(engine: Any, steps: range, *, same_data: bool = False) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + (0 if same_data else engine.world.rank))
        tokens = torch.randint(0, 13, (6,), generator=generator)
        loss = nn.functional.cross_entropy(engine.deepspeed(tokens).float(), tokens.flip(0))
        engine.deepspeed.backward(loss)
        engine.reading.wait()
        engine.deepspeed.step()
        losses.append(loss.item())
    return losses


def everything(engine: Any) -> dict[str, Tensor]:
    """Masters and optimizer state in full, by DeepSpeed's own functions; the weights of forward; the rest."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine.deepspeed.optimizer
    base = getattr(zero, "optimizer", zero)
    if engine.zero_stage in (1, 2) and base.state:
        zero._hp_optimizer_states_linked = False  # DeepSpeed links the first group alone
        zero._lazy_init_hp_params_optimizer_state()
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            found[f"{name}.forward"] = parameter.detach().clone()
        if not parameter.requires_grad:
            continue
        if engine.zero_stage == 0:
            found[f"{name}.master"] = parameter.detach().clone()
            found |= {
                f"{name}.{kind}": value.clone() for kind, value in base.state[parameter].items() if kind != "step"
            }
            continue
        found[f"{name}.master"] = safe_get_full_fp32_param(parameter)
        for kind in sorted({key for state in base.state.values() for key in state} - {"step"}):
            found[f"{name}.{kind}"] = safe_get_full_optimizer_state(parameter, kind)
    found |= {f"{name}.buffer": buffer.clone() for name, buffer in engine.module.named_buffers()}
    steps = {float(state["step"]) for state in base.state.values() if "step" in state}
    found |= {f"step {index}": torch.tensor(step) for index, step in enumerate(sorted(steps))}
    return found


def differences(left: dict[str, Tensor], right: dict[str, Tensor], *, skip: tuple[str, ...] = ()) -> list[str]:
    names = [name for name in {*left, *right} if not name.endswith(skip)] if skip else [*{*left, *right}]
    return sorted(
        name
        for name in names
        if name not in left or name not in right or not torch.equal(left[name].flatten(), right[name].flatten())
    )


def make_checkpointer(folder: str, world: Any) -> Checkpointer:
    return Checkpointer(Store(folder), world, CheckpointConfig(keep=None), Progress())


# --- the same stage and world size: as if never stopped


def resume_worker(world: Any, folder: str, cells: list[Cell]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for cell in cells:
        path = f"{folder}/{cell}"
        engine = make_engine(world, cell)
        before = train(engine, range(4))
        saver = make_checkpointer(path, world)
        saver.save(4, engine, {})
        saved, scaler = everything(engine), engine_state.scalars(engine)
        after, end = train(engine, range(4, 9)), everything(engine)
        saver.close()
        torch.distributed.barrier()  # the manifest is there once rank 0 has closed

        resumed = make_engine(world, cell, seed=7)
        checkpoint.load(resumed, checkpoint.find(Store(path), 4))
        report[str(cell)] = {
            "error": saver.last_error,
            "at load": differences(everything(resumed), saved),
            "scalars": engine_state.scalars(resumed) == scaler,
            "losses": train(resumed, range(4, 9)) == after,
            "at the end": differences(everything(resumed), end),
            "moved": before != after and bool(differences(saved, end)),
            "step": scaler["optimizer_scalars"].get("step"),
            "class": type(engine.deepspeed.optimizer).__name__,
        }
    return report


def assert_resumed(reports: list[dict[str, Any]], cells: list[Cell]) -> None:
    good = {"error": None, "at load": [], "scalars": True, "losses": True, "at the end": [], "moved": True}
    for rank, report in enumerate(reports):
        assert report.keys() == {str(cell) for cell in cells}
        for cell, outcome in report.items():
            assert good.items() <= outcome.items(), f"rank {rank}, {cell}: {outcome}"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_is_bit_identical_to_never_having_stopped(tmp_path: Path, world_size: int) -> None:
    cells = [Cell(stage) for stage in (0, 1, 2, 3)]
    cells += [Cell(stage, "bf16") for stage in (1, 2, 3)]
    if world_size == 2:
        cells += [Cell(1, offload=True), Cell(2, "bf16", offload=True), Cell(3, "bf16", offload=True)]
        cells += [Cell(stage, optimizer=name) for stage, name in ((0, "SGD"), (2, "SGD"), (3, "SGD"), (1, "RMSprop"))]
        cells += [Cell(3, settings={"sub_group_size": 40}), Cell(2, settings={"round_robin_gradients": True})]
    reports = run_workers(resume_worker, world_size, str(tmp_path), cells)
    assert_resumed(reports, cells)
    classes = {cell: outcome["class"] for cell, outcome in reports[0].items()}
    assert classes["stage0-fp32-AdamW"] == "AdamW"
    assert classes["stage1-bf16-AdamW"] == "BF16_Optimizer"
    assert classes["stage2-fp32-AdamW"] == "DeepSpeedZeroOptimizer"
    assert classes["stage3-fp32-AdamW"] == "DeepSpeedZeroOptimizer_Stage3"


def test_fp16_resumes_with_its_loss_scaler(tmp_path: Path) -> None:
    cells = [Cell(stage, "fp16") for stage in (1, 2, 3)]
    reports = run_workers(resume_worker, 2, str(tmp_path), cells)
    assert_resumed(reports, cells)
    assert all(outcome["step"] != 4 for outcome in reports[0].values()), "no step overflowed"


def engine_worker(world: Any, folder: str, cases: list[Case]) -> list[dict[str, Any]]:
    gc.freeze()
    report = []
    for index, case in enumerate(cases):
        path, config = f"{folder}/{index}", case.config()

        def steps(engine: Engine, numbers: range, config: RunConfig = config) -> list[tuple[float, float | None]]:
            stats = []
            for step in numbers:
                micro_batches = rank_micro_batches(config, step, world.rank, world.size)
                stats.append(engine.train_step(task(), micro_batches, lr=0.001 * step, step=step))
            return [(each.loss, each.grad_norm) for each in stats]

        engine = Engine(case.model(), config, world)
        steps(engine, range(3))
        saver = make_checkpointer(path, world)
        saver.save(3, engine, {}, wait=True)
        after, end = steps(engine, range(3, 6)), everything(engine)
        resumed = Engine(case.model(), config.model_copy(update={"seed": 12}), world)  # other weights at first
        resumed.config = config
        checkpoint.load(resumed, checkpoint.find(Store(path), 3))
        report.append({"stats": steps(resumed, range(3, 6)) == after, "end": differences(everything(resumed), end)})
    return report


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_trainers_engine_resumes(tmp_path: Path, world_size: int) -> None:
    cases = [Case(stage) for stage in (0, 1, 2, 3)]
    cases += [Case(0, optimizer="muon", tied=True), Case(3, optimizer="adagrad")]
    if world_size == 2:
        cases += [Case(2, tied=True, offload=True), Case(3, tied=True, offload=True)]
        cases += [Case(stage, precision="bf16") for stage in (1, 3)]
    for report in run_workers(engine_worker, world_size, str(tmp_path), cases):
        assert report == [{"stats": True, "end": []}] * len(cases)


def muon_worker(world: Any, path: str, write: bool) -> tuple[dict[str, Any], list[float]]:
    """The state in full after three steps or a load of it, by kind; then the losses of three more steps."""
    gc.freeze()
    case = Case(0, optimizer="muon", tied=True)
    engine = Engine(case.model(), case.config(), world)

    def losses(numbers: range) -> list[float]:
        batches = [rank_micro_batches(case.config(), step, world.rank, world.size) for step in numbers]
        return [engine.train_step(task(), each, lr=0.01, step=n).loss for n, each in zip(numbers, batches, strict=True)]

    if write:
        losses(range(3))
        make_checkpointer(path, world).save(3, engine, {}, wait=True)
    else:
        checkpoint.load(engine, checkpoint.find(Store(path), 3))
    state = {
        name: {kind: value.tolist() for kind, value in engine.deepspeed.optimizer.state[parameter].items()}
        for name, parameter in engine.module.named_parameters()
    }
    return state, losses(range(3, 6))


@pytest.mark.parametrize(("written_by", "read_by"), [(2, 1), (1, 2)])
def test_parameters_with_different_state_load_at_another_world_size(
    tmp_path: Path, written_by: int, read_by: int
) -> None:
    saved, next_losses = run_workers(muon_worker, written_by, str(tmp_path), True)[0]
    assert {"momentum_buffer"} in map(set, saved.values())
    assert set(saved["embedding.weight"]) == {"exp_avg", "exp_avg_sq", "step"}
    for loaded, losses in run_workers(muon_worker, read_by, str(tmp_path), False):
        assert loaded == saved
        assert losses == pytest.approx(next_losses, abs=1e-4)
    with pytest.raises(WorkerFailed, match=r"state of MuonWithAdamW, but this run's optimizer is AdamW"):
        run_workers(load_as_adamw, 1, str(tmp_path))


def load_as_adamw(world: Any, path: str) -> None:
    case = Case(1, tied=True)
    checkpoint.load(Engine(case.model(), case.config(), world), checkpoint.find(Store(path), 3))


# --- any stage and world size to any other


def save_worker(world: Any, folder: str, cells: list[Cell]) -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    held = {}
    for cell in cells:
        engine = make_engine(world, cell)
        train(engine, range(3), same_data=True)
        saver = make_checkpointer(f"{folder}/{cell}", world)
        saver.save(3, engine, {}, wait=True)
        full = {name: tensor.cpu() for name, tensor in everything(engine).items()}
        held[str(cell)] = ({k: v.float().numpy() for k, v in full.items()}, train(engine, range(3, 6), same_data=True))
    return held  # type: ignore[return-value]


def load_worker(world: Any, folder: str, pairs: list[tuple[Cell, Cell]]) -> dict[str, tuple[Any, list[float]]]:
    loaded = {}
    for source, target in pairs:
        engine = make_engine(world, target, seed=7)
        checkpoint.load(engine, checkpoint.find(Store(f"{folder}/{source}"), 3))
        full = {name: tensor.float().numpy() for name, tensor in everything(engine).items()}
        loaded[f"{source} to {target}"] = (full, train(engine, range(3, 6), same_data=True))
    return loaded


SLOW = pytest.mark.slow
PAIRS = [(3, 2), pytest.param(1, 4, marks=SLOW), pytest.param(4, 1, marks=SLOW), pytest.param(2, 3, marks=SLOW)]


@pytest.mark.parametrize(("written_by", "read_by"), PAIRS)
def test_a_checkpoint_loads_at_any_stage_and_world_size(tmp_path: Path, written_by: int, read_by: int) -> None:
    sources = [Cell(stage) for stage in (0, 1, 2, 3)] + [Cell(1, "bf16"), Cell(3, "bf16"), Cell(2, optimizer="SGD")]
    pairs = [(Cell(s), Cell(t)) for s, t in ((0, 3), (3, 1), (1, 2), (2, 0))]  # test_matrix.py has the others
    pairs += [(Cell(1, "bf16"), Cell(3, "bf16")), (Cell(3, "bf16"), Cell(2, "bf16", offload=True))]
    pairs += [(Cell(3, "bf16"), Cell(1, "bf16")), (Cell(2, optimizer="SGD"), Cell(3, optimizer="SGD"))]
    pairs += [(Cell(1, "bf16"), Cell(0)), (Cell(0), Cell(3, "bf16"))]  # another precision: the masters are the same
    saved = run_workers(save_worker, written_by, str(tmp_path), sources)[0]
    for loaded in run_workers(load_worker, read_by, str(tmp_path), pairs):
        for source, target in pairs:
            before, next_losses = saved[str(source)]
            after, losses = loaded[f"{source} to {target}"]
            same_precision = source.precision == target.precision
            different = [
                name
                for name in {*before, *after}
                if (same_precision or not name.endswith(("forward", "fixed.weight", "fixed.bias")))
                and (name not in before or name not in after or (before[name] != after[name]).any())
            ]
            assert not different, f"{source} to {target}: {different}"
            tolerance = 1e-5 if source.precision == target.precision == "fp32" else 3e-2
            assert losses == pytest.approx(next_losses, abs=tolerance), f"{source} to {target}"


# --- before the first step; weights alone; fragments


def fresh_worker(world: Any, folder: str, cells: list[Cell]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for cell in cells:
        engine = make_engine(world, cell)
        saver = make_checkpointer(f"{folder}/{cell}", world)
        saver.save(0, engine, {}, wait=True)
        torch.distributed.barrier()
        reader = checkpoint.find(Store(f"{folder}/{cell}"), 0)
        losses, end = train(engine, range(3)), everything(engine)

        resumed = make_engine(world, cell, seed=7)
        train(resumed, range(10, 12))  # state that the load must take away
        checkpoint.load(resumed, reader)
        fine_tuned = make_engine(world, cell, seed=8)
        checkpoint.load_weights(fine_tuned, dict(reader.weights()))
        report[str(cell)] = {
            "kinds": reader.manifest["scalars"]["kinds"],
            "losses": train(resumed, range(3)) == losses,
            "at the end": differences(everything(resumed), end),
            "weights alone": train(fine_tuned, range(3)) == losses,
            "weights alone at the end": differences(everything(fine_tuned), end),
        }
    return report


def test_saving_and_loading_before_the_first_step(tmp_path: Path) -> None:
    cells = [*(Cell(stage) for stage in range(4)), *(Cell(stage, "bf16") for stage in (1, 2, 3)), Cell(3, offload=True)]
    good = {"kinds": [], "losses": True, "at the end": [], "weights alone": True, "weights alone at the end": []}
    for report in run_workers(fresh_worker, 2, str(tmp_path), cells):
        assert report == {str(cell): good for cell in cells}


def fragments_worker(world: Any, cells: list[Cell]) -> dict[str, list[tuple[str, str, int, int]]]:
    held = {}
    for cell in cells:
        engine = make_engine(world, cell)
        train(engine, range(1))
        fragments = list(engine_state.fragments(engine))
        held[str(cell)] = [(f.kind, f.name, f.start, f.start + f.tensor.numel()) for f in fragments]
    return held


def test_fragments_hold_every_element_once_and_ranks_share_them(tmp_path: Path) -> None:
    cells = [*(Cell(stage) for stage in range(4)), *(Cell(stage, "bf16") for stage in (1, 2, 3))]
    reports = run_workers(fragments_worker, 3, cells)
    shapes = {name: parameter for name, parameter in Model().named_parameters()}
    trained = {name: p.numel() for name, p in shapes.items() if p.requires_grad}
    frozen = {name: p.numel() for name, p in shapes.items() if not p.requires_grad}
    expected = {("buffer", "calls"): 1} | {("frozen", name): numel for name, numel in frozen.items()}
    kinds = ("master", "exp_avg", "exp_avg_sq")
    expected |= {(kind, name): numel for kind in kinds for name, numel in trained.items()}
    for cell in map(str, cells):
        covered: dict[tuple[str, str], list[int]] = {}
        for report in reports:
            for kind, name, start, stop in report[cell]:
                covered.setdefault((kind, name), []).extend(range(start, stop))
        assert {key: sorted(elements) for key, elements in covered.items()} == {
            key: list(range(numel)) for key, numel in expected.items()
        }, cell
        shares = [sum(stop - start for kind, _, start, stop in report[cell] if kind == "master") for report in reports]
        assert max(shares) - min(shares) <= 2 * len(trained), f"{cell}: {shares}"


# --- one rank fails


def failing_worker(world: Any, folder: str) -> tuple[str | None, str | None]:
    engine = make_engine(world, Cell(1))
    saver = make_checkpointer(folder, world)
    saver.save(1, engine, {}, wait=True)
    full = Path(folder, "step-00000002", file_name(1, save_id(saver._attempt_id, 2)))
    if world.rank == 1:
        full.parent.mkdir()
        full.symlink_to("/dev/full")  # every write to it fails as on a full disk
    saver.save(2, engine, {}, wait=True)
    failed = saver.last_error
    saver.save(3, engine, {}, wait=True)
    return failed, saver.last_error


def test_one_rank_with_a_full_disk_fails_the_save_and_nothing_else(tmp_path: Path) -> None:
    (first, later), (other, other_later) = run_workers(failing_worker, 2, str(tmp_path))
    assert first is not None and "Rank 1" in first and "disk is full" in first
    assert other is not None and "disk is full" in other
    assert later is None and other_later is None
    assert checkpoint.saved_steps(Store(tmp_path)) == [3, 1]
    found = checkpoint.newest(Store(tmp_path))
    assert found is not None and found[0] == 3
    assert not [
        path
        for path in tmp_path.rglob("*")
        if ".tmp-" in path.name or (path.suffix == ".json" and path.name != "manifest.json")
    ]
