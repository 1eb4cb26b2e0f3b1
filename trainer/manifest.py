"""What a checkpoint's manifest must be like before anything in it is used: it may come from anybody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.tensor_files import OLD_BLOCK_BYTES

_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_Name = Annotated[str, Field(pattern=r"^rank-\d{5,}-[0-9a-f]+-\d{6}\.(safetensors|json)$")]  # none elsewhere
_Range = tuple[_Count, _Count, _Count]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Strict):
    name: _Name
    size: _Count
    block_bytes: Annotated[int, Field(gt=0, lt=1 << 62)] = OLD_BLOCK_BYTES
    blocks: list[str]


class _Tensor(_Strict):
    shape: list[_Count]


class _Parameter(_Tensor):
    frozen: bool


class _Scalars(_Strict):
    kinds: list[str]
    other_kinds: dict[str, list[str]] = {}


class _Manifest(_Strict):
    """The fields that a reader uses; what a run adds is its own."""

    step: _Count
    save: str
    files: list[_File]
    parameters: dict[str, _Parameter]
    buffers: dict[str, _Tensor]
    aliases: dict[str, list[str]]
    ranges: dict[str, list[Annotated[_Range, Field(strict=False)]]]  # JSON knows no tuples
    scalars: _Scalars
    data: dict[str, Any]

    @model_validator(mode="after")
    def _every_element_once(self) -> Self:
        tensors: dict[str, _Tensor] = {**self.parameters, **self.buffers}
        if self.ranges.keys() != tensors.keys():
            raise ValueError("`ranges` is not of the parameters and buffers")
        for name, tensor in tensors.items():
            end = 0
            for index, start, stop in self.ranges[name]:
                if index >= len(self.files) or start != end or stop <= start:
                    raise ValueError(f"the ranges of '{name}' do not join")
                end = stop
            if end != math.prod(tensor.shape):
                raise ValueError(f"the ranges of '{name}' do not cover it")
        return self


def manifest_misfit(manifest: Mapping[str, Any]) -> str | None:
    """The first thing that is missing, of another type or size, or does not fit the rest; None: it is a manifest."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first["loc"] else first["msg"]
    return None
