"""First values of a model that was built on the meta device, one module at a time.

The values of a parameter depend on the run's seed and the parameter's name alone, so they are the same at every ZeRO
stage and world size. Where a callback shards each module as soon as it is filled, no process ever holds more than its
own shards and one module's parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for one parameter, on the CPU: a GPU would draw others."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def materialize(
    module: nn.Module,
    init: Callable[[str, Tensor, torch.Generator], None],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    partition: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give a module on the meta device memory on `device` and first values, in place.

    init: (name, tensor, generator) fills one full fp32 tensor on the CPU. It is called once for each parameter, under
        its first name in `module.named_parameters()`; tied parameters stay tied. The values are then converted to the
        dtype that the parameter has on the meta device.
    partition: called with each submodule once its own parameters and those below it have values (ZeRO-3 shards it
        there and then), but not where it owns none, or only tied ones that came before.

    Buffers get their values from the submodule's `reset_buffers()`, which a submodule with buffers must have.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    filled: dict[Tensor, nn.Parameter] = {}
    for owner in reversed(list(module.modules())):  # children before their parents
        found_new = False
        for attribute, blank in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            assert blank.is_meta, f"{names[blank]} has values already"
            if blank not in filled:
                filled[blank] = _filled(blank, names[blank], init, seed, device)
                found_new = True
            setattr(owner, attribute, filled[blank])
        _fill_buffers(owner, device)
        if found_new and partition is not None:
            partition(owner)


def _filled(
    blank: nn.Parameter,
    name: str,
    init: Callable[[str, Tensor, torch.Generator], None],
    seed: int,
    device: torch.device | str,
) -> nn.Parameter:
    values = torch.empty(blank.shape, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        init(name, values, parameter_generator(seed, name))
    return nn.Parameter(values.to(device, blank.dtype), requires_grad=blank.requires_grad)


def _fill_buffers(owner: nn.Module, device: torch.device | str) -> None:
    buffers = list(owner.named_buffers(recurse=False, remove_duplicate=False))
    if not buffers:
        return
    reset = getattr(owner, "reset_buffers", None)
    assert callable(reset), f"{type(owner).__name__} has buffers but no reset_buffers() to compute them"
    for attribute, blank in buffers:
        setattr(owner, attribute, torch.empty_like(blank, device=device))
    reset()
