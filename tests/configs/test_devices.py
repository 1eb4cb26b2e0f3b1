"""Devices: the built-in file, the user's own over it, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.devices import BUILT_IN, device_named, find_device, load_devices, read_devices
from configs.errors import NotFound
from configs.problems import ConfigError

MINE = "{fp32_tflops: 1.0, half_tflops: 2.0, memory_gb: 3.0, bandwidth_gb_s: 4.0, link_gb_s: 5.0, usd_per_hour: 6.0}"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_every_built_in_device_but_the_cpu_is_complete() -> None:
    devices = read_devices(BUILT_IN)
    assert {"cpu", "a100-40gb", "a100-80gb", "h100", "h200", "b200", "l4", "l40s", "t4", "v100", "mi300x"} <= set(
        devices
    )
    for name, device in devices.items():
        complete = None not in (device.fp32_tflops, device.half_tflops, device.memory_gb, device.bandwidth_gb_s)
        assert complete == (name != "cpu"), name


def test_a_file_of_ones_own_adds_and_replaces(tmp_path: Path) -> None:
    home = tmp_path / "config" / "shardyard"
    home.mkdir(parents=True)
    (home / "devices.yaml").write_text(f"h100: {MINE}\nmine: {MINE}\n")
    assert find_device("h100").usd_per_hour == find_device("mine").usd_per_hour == 6.0
    assert find_device("mine").peak_flops("bf16") == 2e12 and find_device("mine").peak_flops("fp32") == 1e12
    Path("devices.yaml").write_text(f"mine: {MINE.replace('6.0', '7.0')}\n")
    assert find_device("mine").usd_per_hour == 7.0, "the current folder's file comes first"
    assert "h200" in load_devices()


def test_all_faults_of_a_file_are_told_with_their_lines() -> None:
    Path("devices.yaml").write_text("mine:\n  fp32_tflops: fast\n  usd_per_hour: -1\n  memry_gb: 3.0\n")
    with pytest.raises(ConfigError) as error:
        load_devices()
    found = {problem.key: problem.where for problem in error.value.problems}
    assert found["mine.fp32_tflops"] == "devices.yaml:2" and found["mine.usd_per_hour"] == "devices.yaml:3"
    assert found["mine.memry_gb"] == "devices.yaml:4" and "mine.half_tflops" in found


def test_an_unknown_device_is_answered_with_the_nearest() -> None:
    with pytest.raises(NotFound, match=r"There is no device 'h10'. Did you mean 'h100'"):
        find_device("h10")


def test_a_gpu_is_known_by_the_longest_part_of_its_drivers_name() -> None:
    assert device_named("NVIDIA L40S") == "l40s"
    assert device_named("NVIDIA A100-SXM4-80GB") == "a100-80gb"
    assert device_named("Something else") is None
