"""What devices can do, have and cost: `configs/devices.yaml`, and a file of the user's own over it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from configs.errors import NotFound, UsageError
from configs.messages import explain, nearest
from configs.problems import ConfigError, Problem, where
from configs.schema import Section
from configs.yaml_text import parse

FILE = "devices.yaml"
BUILT_IN = Path(__file__).parent / FILE


class Device(Section):
    """One kind of device. Peaks are dense; 10^12 operations, 10^9 bytes a second, 10^9 bytes."""

    fp32_tflops: float | None = Field(gt=0, description="Peak in fp32, without TF32; null is measured.")
    half_tflops: float | None = Field(gt=0, description="Peak in bf16 and fp16; null is measured.")
    memory_gb: float | None = Field(gt=0, description="Memory; null is what this machine has.")
    bandwidth_gb_s: float | None = Field(gt=0, description="Bandwidth of the memory; null is not known.")
    link_gb_s: float = Field(gt=0, description="Bandwidth to its neighbours, each way.")
    usd_per_hour: float = Field(ge=0, description="Price of one.")
    matches: str | None = Field(default=None, min_length=1, description="Part of the name that its driver gives.")

    def peak_flops(self, precision: str) -> float | None:
        """Operations a second at most; None where it is to be measured. precision: "fp32", "bf16" or "fp16"."""
        tflops = self.fp32_tflops if precision == "fp32" else self.half_tflops
        return None if tflops is None else tflops * 1e12


def load_devices() -> dict[str, Device]:
    """All devices by name: the built-in ones, and over them those of the user's file.

    Raises:
        ConfigError: all that is wrong with a file. UsageError: it cannot be read.
    """
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    own = next((path for path in (Path(FILE), home / "shardyard" / FILE) if path.is_file()), None)
    return read_devices(BUILT_IN) | ({} if own is None else read_devices(own))


def find_device(name: str) -> Device:
    """The device of this name. Raises NotFound, with the nearest one, and as load_devices."""
    devices = load_devices()
    if name not in devices:
        close = nearest(name, devices)
        hint = f" Did you mean '{close}'?" if close else ""
        raise NotFound(
            f"There is no device '{name}'.{hint} There is: {', '.join(devices)}. Write others into {FILE}, as in "
            "docs/plan.md."
        )
    return devices[name]


def device_named(driver_name: str) -> str | None:
    """The device whose `matches` is part of the name that a driver gives (the longest such); None if there is none."""
    fitting = {name: each.matches for name, each in load_devices().items() if each.matches}
    found = [name for name, part in fitting.items() if part in driver_name]
    return max(found, key=lambda name: len(fitting[name]), default=None)


def read_devices(file: Path) -> dict[str, Device]:
    """The devices of one file. Raises as load_devices."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}. Check the file and its permissions.") from None
    parsed = parse(text)
    origins = {".".join(path): f"{file}:{line}" for path, line in parsed.lines.items() if path}
    problems = [Problem(f"{file}:{line}", ".".join(path), message) for line, path, message in parsed.problems]
    if not isinstance(parsed.values, Mapping):
        raise ConfigError(problems or [Problem(str(file), "", "write devices in it, each as 'name: {...}'")])
    devices = {}
    for name, values in parsed.values.items():
        try:
            devices[name] = Device.model_validate(values)
        except ValidationError as error:
            given = values if isinstance(values, Mapping) else {}
            found = explain(error, Device, given)
            problems += [
                Problem(where(f"{name}.{key}", origins, str(file)), f"{name}.{key}", told) for key, told in found
            ]
    if problems:
        raise ConfigError(problems)
    return devices
