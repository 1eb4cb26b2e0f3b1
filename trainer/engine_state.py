"""Reads and writes an engine's fp32 masters and optimizer state in a form that no ZeRO stage or world size shows.

Where they lie is told by engine_layout.py. Optimizer state is created where it does not exist yet, so that a fresh
engine is restored without a throw-away step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.errors import Damaged, ShardyardError, Unreachable, UsageError
from trainer.distributed import all_gather_json, all_sum
from trainer.engine_layout import (
    Part,
    frozen_parts,
    full_shape,
    is_trained,
    parts_of,
    persistent_buffers,
    share,
    share_of_parts,
)

if TYPE_CHECKING:
    from trainer.engine import Engine

# (name, kind, start, stop) -> elements [start, stop) of that parameter or buffer, 1-D
Read = Callable[[str, str, int, int], Tensor]

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_CHUNK_ELEMENTS = 1 << 20  # read at once, so that a load holds little beside what it fills
_SAME_STATE = {"Adam", "AdamW"}  # optimizers that may take over each other's state


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(tensor)) of a flattened parameter's state, or of a buffer.

    kind: "master" (fp32 weights), "ema" (their average), "frozen", "buffer", or a key of the optimizer's state
    ("exp_avg", ...).
    shape: of the whole. tensor: 1-D, this rank's part; a view of live memory where that is possible.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor


# --- what there is


def describe(engine: Engine) -> dict[str, Any]:
    """Shapes and dtypes of all parameters and buffers, and the other names of tied parameters; alike on all ranks."""
    named = engine.module.named_parameters(remove_duplicate=False)
    names: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in named:
        first = names.setdefault(id(parameter), name)
        if first != name:
            aliases.setdefault(first, []).append(name)
    parameters = {
        name: {"shape": list(full_shape(p)), "dtype": _dtype_name(p), "frozen": not is_trained(p)}
        for name, p in engine.module.named_parameters()
    }
    buffers = {
        name: {"shape": list(buffer.shape), "dtype": _dtype_name(buffer)}
        for name, buffer in persistent_buffers(engine.module).items()
    }
    return {"parameters": parameters, "buffers": buffers, "aliases": aliases}


def fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's fragments; over all ranks every element of every kind comes exactly once.

    What is replicated is cut into equal shares, so that the ranks share the writing; buffers are rank 0's.
    """
    optimizer = _torch_optimizer(engine)
    parts = parts_of(engine)
    if engine.zero_stage == 0:
        parts = share_of_parts(parts, engine.world.rank, engine.world.size)
    for part in parts:
        yield Fragment(part.name, "master", part.shape, part.start, _slice(part.flat, part))
        for kind, state in _element_state(optimizer, part.flat).items():
            yield Fragment(part.name, kind, part.shape, part.start, _slice(state, part))
        if engine.average is not None:
            yield Fragment(part.name, "ema", part.shape, part.start, _slice(engine.average.of(part.flat), part))
    yield from _frozen_fragments(engine)
    if engine.world.rank == 0:
        for name, buffer in persistent_buffers(engine.module).items():
            yield Fragment(name, "buffer", tuple(buffer.shape), 0, buffer.detach().reshape(-1))


def scalars(engine: Engine) -> dict[str, Any]:
    """What is no tensor: the optimizer's name, the kinds of state it has by now, its own scalars, the fp16 loss scaler.

    kinds: of a parameter's state. other_kinds: by name, of those parameters that have other kinds and no scalars, which
    only stage 0 has (Muon's matrices); elsewhere every element is treated alike.
    ema: how often the average of the weights was updated, where there is one. exact: exponents of the gradients' quanta
    (trainer/exact.py), in exact mode.
    The optimizer's `step` differs from the run's after an fp16 overflow; before its first step `kinds` is empty.
    """
    optimizer, parts = _torch_optimizer(engine), parts_of(engine)
    kinds: list[str] = []
    values: dict[str, float] = {}
    for flat in {id(part.flat): part.flat for part in parts}.values():
        found = sorted(_element_state(optimizer, flat))
        state = optimizer.state.get(flat, {})
        own = {key: float(value) for key, value in state.items() if key not in found and value is not None}
        assert not values or not own or own == values, f"the optimizer's groups disagree: {own} and {values}"
        if own and not values:
            kinds, values = found, own
        kinds = kinds or found
    other_kinds = {
        part.name: found for part in parts if (found := sorted(_element_state(optimizer, part.flat))) != kinds
    }
    return {
        "optimizer": type(optimizer).__name__,
        "kinds": kinds,
        "optimizer_scalars": values,
        **({"other_kinds": other_kinds} if other_kinds else {}),
        **({} if engine.average is None else {"ema": {"num_updates": engine.average.num_updates}}),
        **({} if engine.exact is None else {"exact": dict(engine.exact.exponents)}),
        "loss_scaler": _read_scaler(engine),
    }


# --- writing it


def restore(engine: Engine, read: Read, scalars: dict[str, Any]) -> None:
    """Give the engine the whole state that `read` and `scalars` hold, whatever stage and world size wrote it.

    Every rank takes part. Each reads only what it holds; when all have read, low-precision weights are gathered.

    Raises:
        UsageError: the state is another optimizer's.
        Damaged: some rank could not read its part, and the engine is left half filled; on all ranks.
        ShardyardError: a parameter was not set.
    """
    optimizer = _torch_optimizer(engine)
    name = type(optimizer).__name__
    if scalars["kinds"] and name != scalars["optimizer"] and {name, scalars["optimizer"]} - _SAME_STATE:
        raise UsageError(
            f"The checkpoint holds the state of {scalars['optimizer']}, but this run's optimizer is {name}. Set "
            "optimizer.name to the old one, or start from the checkpoint's weights alone (train --from)."
        )
    parts = parts_of(engine)
    damage = None
    try:
        _read_weights(engine, parts, read)
        with torch.no_grad():
            _restore_optimizer_state(optimizer, parts, read, scalars)
            if engine.average is not None and "ema" in scalars:
                for part in parts:
                    _fill(engine.average.of(part.flat), part, read, "ema")
                engine.average.num_updates = scalars["ema"]["num_updates"]
    except ShardyardError as error:
        damage = error
    _refuse_damage(engine, damage)
    _publish_weights(engine, parts)
    if engine.exact is not None:
        engine.exact.exponents.update(scalars.get("exact", {}))
    zero = engine.deepspeed.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False  # DeepSpeed's links point to the state before the load
    _write_scaler(engine, scalars["loss_scaler"])


def restore_weights(engine: Engine, read: Read) -> None:
    """Set masters, frozen parameters and buffers, and the low-precision weights that forward uses.

    An average of the weights begins anew with them.

    Raises:
        Damaged: as restore. ShardyardError: a parameter was not set.
    """
    parts = parts_of(engine)
    damage = None
    try:
        _read_weights(engine, parts, read)
    except ShardyardError as error:
        damage = error
    _refuse_damage(engine, damage)
    _publish_weights(engine, parts)


def _read_weights(engine: Engine, parts: list[Part], read: Read) -> None:
    engine.reading.wait()
    with torch.no_grad():
        for part in parts:
            _fill(part.flat, part, read, "master")
        for name, start, tensor in frozen_parts(engine):
            tensor.copy_(read(name, "frozen", start, start + tensor.numel()).view(tensor.shape))
        for name, buffer in persistent_buffers(engine.module).items():
            buffer.copy_(read(name, "buffer", 0, buffer.numel()).view(buffer.shape))
        if engine.average is not None:
            engine.average.reset()


def _refuse_damage(engine: Engine, error: ShardyardError | None) -> None:
    """Raise, on every rank, what any of them could not read."""
    kind = Unreachable if isinstance(error, Unreachable) else Damaged
    own = None if error is None else [kind.__name__, str(error)]
    found = [each for each in (all_gather_json(own) if engine.world.size > 1 else [own]) if each is not None]
    if found:
        kind = Unreachable if any(name == Unreachable.__name__ for name, _ in found) else Damaged
        messages = list(dict.fromkeys(message for _, message in found))
        more = f" And {len(messages) - 1} more like it." if len(messages) > 1 else ""
        raise kind(messages[0] + more) from error


def _publish_weights(engine: Engine, parts: list[Part]) -> None:
    with torch.no_grad():
        publish(engine)
    _assert_restored(engine, parts)


def _restore_optimizer_state(
    optimizer: torch.optim.Optimizer, parts: list[Part], read: Read, scalars: dict[str, Any]
) -> None:
    """Replace the optimizer's state, created where the optimizer has not stepped yet."""
    groups = {id(flat): group for group in optimizer.param_groups for flat in group["params"]}
    others: dict[str, list[str]] = scalars.get("other_kinds", {})
    for flat, name in {id(part.flat): (part.flat, part.name) for part in parts}.values():
        kinds = others.get(name, scalars["kinds"])
        if not kinds:
            optimizer.state.pop(flat, None)
            continue
        state = optimizer.state[flat]
        group = groups.get(id(flat), {})
        device = flat.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        for key, value in scalars["optimizer_scalars"].items() if name not in others else ():
            state[key] = torch.tensor(value, dtype=torch.float32, device=device)  # as torch.optim makes its `step`
        for kind in kinds:
            if not isinstance(state.get(kind), Tensor):
                state[kind] = torch.zeros_like(flat, requires_grad=False)
    for part in parts:
        for kind in others.get(part.name, scalars["kinds"]):
            _fill(optimizer.state[part.flat][kind], part, read, kind)


def publish(engine: Engine) -> None:
    """Bring the masters into the weights that forward reads, as the end of DeepSpeed's step() does."""
    zero = engine.deepspeed.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def _assert_restored(engine: Engine, parts: list[Part]) -> None:
    """That forward now sees every restored element: DeepSpeed's own loaders silently load nothing in places."""
    for part in parts:
        weights, start = part.parameter.detach().reshape(-1), part.start
        if weights.numel() != math.prod(part.shape):  # stage 3, not gathered
            weights, start = part.parameter.ds_tensor, 0  # type: ignore[attr-defined]
        master = _slice(part.flat, part)
        if not _same_bits(weights[start : start + part.numel], master.to(weights.device, weights.dtype)):
            raise ShardyardError(
                f"Parameter '{part.name}' was not set by the load: forward's weights differ from the checkpoint's. "
                "This is a mismatch with the installed DeepSpeed; install the pinned version."
            )
    held = sum(part.numel for part in parts)
    if engine.zero_stage > 0:
        held = int(all_sum([held])[0])
    expected = sum(math.prod(full_shape(p)) for p in engine.module.parameters() if is_trained(p))
    if held != expected:
        raise ShardyardError(
            f"The load set {held:,} of the model's {expected:,} trainable elements. "
            "This is a mismatch with the installed DeepSpeed; install the pinned version."
        )


def _frozen_fragments(engine: Engine) -> Iterator[Fragment]:
    parameters = dict(engine.module.named_parameters())
    total, offset = sum(p.numel() for p in parameters.values() if not is_trained(p)), 0
    for name, start, tensor in frozen_parts(engine):
        shape, flat = full_shape(parameters[name]), tensor.reshape(-1)
        if not hasattr(parameters[name], "ds_tensor"):
            start, stop = share(offset, flat.numel(), total, engine.world.rank, engine.world.size)
            offset += flat.numel()
            flat = flat[start:stop]
        if flat.numel() > 0:
            yield Fragment(name, "frozen", shape, start, flat)


# --- small things


def _torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    optimizer = engine.deepspeed.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _element_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """The optimizer's state that has one value an element, sorted by kind."""
    state = optimizer.state.get(flat, {})
    return {
        kind: value
        for kind, value in sorted(state.items())
        if kind != "step" and isinstance(value, Tensor) and value.shape == flat.shape
    }


def _slice(flat: Tensor, part: Part) -> Tensor:
    return flat.detach().reshape(-1)[part.offset : part.offset + part.numel]


def _fill(flat: Tensor, part: Part, read: Read, kind: str) -> None:
    """Read a part's state of one kind into its place of `flat`, piece by piece."""
    place = flat.detach().view(-1)[part.offset : part.offset + part.numel]
    for first in range(0, part.numel, _CHUNK_ELEMENTS):
        target = place[first : first + _CHUNK_ELEMENTS]
        values = read(part.name, kind, part.start + first, part.start + first + target.numel())
        assert values.numel() == target.numel(), f"{part.name}: {values.numel()} elements instead of {target.numel()}"
        target.copy_(values)


def _read_scaler(engine: Engine) -> dict[str, Any] | None:
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    return {field: getattr(scaler, field) for field in _SCALER_FIELDS}


def _write_scaler(engine: Engine, values: dict[str, Any] | None) -> None:
    """A run that goes on in another precision keeps its own scaler."""
    if values is not None and _read_scaler(engine) is not None:
        for field in _SCALER_FIELDS:
            setattr(engine.deepspeed.optimizer.loss_scaler, field, values[field])


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that also holds for NaN."""
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(as_integer), right.contiguous().view(as_integer))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
