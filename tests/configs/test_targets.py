"""targets.yaml: what it may hold, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import NotFound, UsageError
from configs.problems import ConfigError
from configs.targets import KuberayTarget, LocalTarget, RayTarget, SlurmTarget, load_target

GOOD = """\
lab:  {type: ray,     address: "http://head:8265"}
hpc:  {type: slurm,   partition: h100, time: "2-00:00:00"}
prod: {type: kuberay, namespace: ml, queue: team-a, image: "registry/shardyard:1"}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and an empty home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path


def test_each_type_is_read_and_local_is_always_there(here: Path) -> None:
    assert load_target("local") == LocalTarget()
    (here / "targets.yaml").write_text(GOOD)
    assert load_target("lab") == RayTarget(address="http://head:8265")
    assert load_target("hpc") == SlurmTarget(partition="h100", time="2-00:00:00")
    assert load_target("prod") == KuberayTarget(namespace="ml", queue="team-a", image="registry/shardyard:1")
    assert load_target("local") == LocalTarget()


def test_the_current_folder_goes_before_the_home(here: Path) -> None:
    (here / "home/shardyard").mkdir(parents=True)
    (here / "home/shardyard/targets.yaml").write_text(GOOD)
    assert load_target("hpc") == SlurmTarget(partition="h100", time="2-00:00:00")
    (here / "targets.yaml").write_text("hpc: {type: slurm}\n")
    assert load_target("hpc") == SlurmTarget()


def test_an_unknown_target_is_answered_with_the_nearest_and_all(here: Path) -> None:
    with pytest.raises(NotFound, match=r"no target 'hcp'.*targets\.yaml"):
        load_target("hcp")
    (here / "targets.yaml").write_text(GOOD)
    with pytest.raises(NotFound, match=r"Did you mean 'hpc'\? targets.yaml has: hpc, lab, local, prod"):
        load_target("hcp")


def test_all_that_is_wrong_is_told_with_its_line(here: Path) -> None:
    (here / "targets.yaml").write_text(
        "a: {type: slrm}\nb: {type: slurm, tme: 3}\nc: {type: ray}\nd: 3\ne: {type: slurm, time: soon}\nf: {}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_target("a")
    lines = str(caught.value).splitlines()
    expected = (
        "targets.yaml:1 a.type: 'slrm' is no type of target; did you mean 'slurm'?",
        "targets.yaml:2 b.tme: unknown key; did you mean 'time'?",
        "targets.yaml:3 c.address: missing",
        "targets.yaml:4 d: a target is a mapping with a type",
        "targets.yaml:5 e.time: 'soon' is no time of Slurm's",
        "targets.yaml:6 f.type: null is no type of target",
    )
    assert len(lines) == len(expected)
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize("text", ["", "- a\n", "lab\n"])
def test_what_holds_no_targets_says_so(here: Path, text: str) -> None:
    (here / "targets.yaml").write_text(text)
    with pytest.raises(ConfigError, match="write targets in it"):
        load_target("lab")


def test_a_file_that_cannot_be_read(here: Path) -> None:
    (here / "targets.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match="cannot be read"):
        load_target("lab")
