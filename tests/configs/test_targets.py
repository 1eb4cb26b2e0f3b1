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


def test_a_level_too_many_is_named(here: Path) -> None:
    (here / "targets.yaml").write_text("targets:\n" + "".join(f"  {line}\n" for line in GOOD.splitlines()))
    with pytest.raises(ConfigError, match=r"targets: this holds targets.*write lab, hpc, prod at the top of the file"):
        load_target("lab")


def test_a_kuberay_target(here: Path) -> None:
    (here / "targets.yaml").write_text(
        "a: {type: kuberay, image: r/s:1, memory: 1Gi, secrets: [a, b.c], node_selector: {gpu: h100}}\n"
        "b: {type: kuberay, image: r/s:1, memory: 1Ti, shared_memory: 1024Gi}\n"
    )
    prod = load_target("a")
    assert isinstance(prod, KuberayTarget)
    assert (prod.shm, prod.secrets, prod.node_selector) == ("256Mi", ("a", "b.c"), {"gpu": "h100"})
    big = load_target("b")
    assert isinstance(big, KuberayTarget) and big.shm == "1024Gi"


def test_what_kubernetes_would_not_take(here: Path) -> None:
    (here / "targets.yaml").write_text(
        "a:\n"
        "  type: kuberay\n"
        "  image: r/s 1\n"
        "  namespace: ML\n"
        "  queue: team_a\n"
        "  memory: 8GB\n"
        "  secrets: [a, B]\n"
        f"  claim: {'a' * 254}\n"
        "  node_selector: {gpu: 1}\n"
        "  grace_s: 0\n"
        "b: {type: kuberay, image: i, memory: 1023Mi, shared_memory: 1Gi}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_target("a")
    expected = (
        "targets.yaml:3 a.image: 'r/s 1' does not match",
        "targets.yaml:4 a.namespace: 'ML' cannot name an object of Kubernetes; use lower-case",
        "targets.yaml:5 a.queue: 'team_a' cannot name",
        "targets.yaml:6 a.memory: '8GB' is no amount of memory; write 512Mi, 16Gi or 1Ti",
        "targets.yaml:7 a.secrets[1]: 'B' cannot name",
        "targets.yaml:8 a.claim: 'aaa",
        "targets.yaml:9 a.node_selector.gpu: 1 is a whole number; text is needed",
        "targets.yaml:10 a.grace_s: 0 is out of range",
        "targets.yaml:11 b.shared_memory: 1Gi is part of the pod's memory, and more than memory=1023Mi",
    )
    lines = sorted(str(caught.value).splitlines(), key=lambda line: int(line.split(":")[1].split()[0]))
    assert len(lines) == len(expected), lines
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
