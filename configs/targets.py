"""Where runs can go: the targets of a site, by name, in a file of their own that serves every recipe.

    lab:  {type: ray,     address: "http://head:8265"}
    hpc:  {type: slurm,   partition: h100, time: "2-00:00:00"}
    prod: {type: kuberay, namespace: ml, queue: team-a, image: "registry/shardyard:1"}

`local`, this machine, is always there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from configs.errors import NotFound, UsageError
from configs.messages import explain, nearest, shown
from configs.problems import ConfigError, Problem, where
from configs.schema import Section
from configs.yaml_text import parse

FILE = "targets.yaml"
_SLURM_TIME = re.compile(r"(?:\d+-)?\d+(?::\d\d){0,2}")
_SIZE = re.compile(r"[1-9]\d*[MGT]i")
_OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


class Target(Section):
    """What all targets may say."""

    device: str | None = Field(
        default=None, min_length=1, description="Device of a worker, by its name in devices.yaml, for the plan."
    )


class LocalTarget(Target):
    """This machine: a Ray of the run's own, or one that is running already; without `device`, what it finds."""

    address: str | None = Field(
        default=None,
        min_length=1,
        description="A Ray to join (auto, HOST:PORT); null starts one for the run.",
    )


class RayTarget(Target):
    """A Ray cluster that is there already, by its Jobs API."""

    address: str = Field(pattern=r"^https?://", description="The head's dashboard.", examples=["http://head:8265"])


def _checked_time(value: Any) -> Any:
    if isinstance(value, str) and not _SLURM_TIME.fullmatch(value):
        text = f"{shown(value)} is no time of Slurm's; write 90 (minutes), 12:00:00 or 2-00:00:00 (days-hours)"
        raise PydanticCustomError("slurm_time", "{text}", {"text": text})
    return value


class SlurmTarget(Target):
    """A Slurm site, from one of its login nodes; the store is on a file system that all nodes see."""

    partition: str | None = Field(default=None, min_length=1, description="Partition; null is the site's default.")
    time: Annotated[str | None, BeforeValidator(_checked_time)] = Field(
        default=None, description="Time limit of a job; null is the partition's.", examples=["2-00:00:00"]
    )
    account: str | None = Field(default=None, min_length=1, description="Account; null is the user's default.")
    workers_per_node: int = Field(default=1, ge=1, description="Workers on each node, by its devices.")
    notice_s: int = Field(
        default=120, ge=1, description="Seconds before the time limit at which the run saves and is queued again."
    )
    python: str | None = Field(
        default=None, min_length=1, description="Python on the nodes; null is the one that submits."
    )
    setup: tuple[str, ...] = Field(
        default=(), description="Shell lines before anything else, such as `module load cuda`."
    )
    options: tuple[str, ...] = Field(
        default=(), description="Further options of sbatch, such as --qos=long or --exclusive."
    )


def _checked_size(value: Any) -> Any:
    if isinstance(value, str) and not _SIZE.fullmatch(value):
        text = f"{shown(value)} is no amount of memory; write 512Mi, 16Gi or 1Ti"
        raise PydanticCustomError("size", "{text}", {"text": text})
    return value


def _checked_object_name(value: Any) -> Any:
    if isinstance(value, str) and not (_OBJECT_NAME.fullmatch(value) and len(value) <= 253):
        text = (
            f"{shown(value)} cannot name an object of Kubernetes; use lower-case letters, digits, '-' and '.', "
            "beginning and ending with a letter or a digit"
        )
        raise PydanticCustomError("object_name", "{text}", {"text": text})
    return value


Size = Annotated[str, BeforeValidator(_checked_size)]
ObjectName = Annotated[str, BeforeValidator(_checked_object_name)]


class KuberayTarget(Target):
    """A Kubernetes cluster with the KubeRay operator; its pods and this machine see the store alike."""

    image: str = Field(
        pattern=r"^\S+$",
        description="Image that holds Shardyard, and modules of your own.",
        examples=["registry/shardyard:1"],
    )
    namespace: ObjectName = Field(default="default", description="Namespace of the job.")
    queue: ObjectName | None = Field(default=None, description="Kueue's LocalQueue; null is no queue.")
    context: str | None = Field(
        default=None, min_length=1, description="Context of the kubeconfig; null is its current one."
    )
    service_account: ObjectName | None = Field(
        default=None, description="Service account of the pods; null is the namespace's."
    )
    memory: Size = Field(default="8Gi", description="Memory of a worker's pod.")
    shared_memory: Size | None = Field(default=None, description="Of it, /dev/shm; null is a quarter.")
    secrets: tuple[ObjectName, ...] = Field(
        default=(), description="Secrets whose keys become environment variables of the pods."
    )
    claim: ObjectName | None = Field(
        default=None, description="PersistentVolumeClaim of the store, where that is a folder; null: it is none."
    )
    node_selector: dict[str, str] = Field(
        default={}, description="Labels of the nodes that workers may run on, such as those of a kind of GPU."
    )
    time_s: int | None = Field(default=None, ge=1, description="Seconds after which the job is ended; null is never.")
    grace_s: int = Field(default=300, ge=1, description="Seconds that pods which have to go leave the run for a save.")
    retries: int = Field(
        default=3, ge=0, description="New Ray clusters on which the run goes on after its launcher has failed."
    )

    @field_validator("shared_memory")
    @classmethod
    def _is_part_of_memory(cls, value: str | None, info: ValidationInfo) -> str | None:
        memory = info.data.get("memory")
        if value is not None and memory is not None and _mebibytes(value) > _mebibytes(memory):
            text = f"{value} is part of the pod's memory, and more than memory={memory}; lower it, or raise memory"
            raise PydanticCustomError("shared_memory", "{text}", {"text": text})
        return value

    @property
    def shm(self) -> str:
        """The size of /dev/shm."""
        return self.shared_memory or f"{_mebibytes(self.memory) // 4}Mi"


def _mebibytes(size: str) -> int:
    return int(size[:-2]) << {"Mi": 0, "Gi": 10, "Ti": 20}[size[-2:]]


TYPES: dict[str, type[Target]] = {
    "local": LocalTarget,
    "ray": RayTarget,
    "slurm": SlurmTarget,
    "kuberay": KuberayTarget,
}


def target_file() -> Path | None:
    """The file that holds the targets: in the current folder, else in the user's configuration; None without one."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((path for path in (Path(FILE), home / "shardyard" / FILE) if path.is_file()), None)


def load_target(name: str) -> Target:
    """Settings of the target of this name; their class tells its type.

    Raises:
        NotFound: no target has this name. ConfigError: all that is wrong with the file. UsageError: it is no file of
        targets.
    """
    file = target_file()
    targets = {} if file is None else load_targets(file)
    if name in targets:
        return targets[name]
    if name == "local":
        return LocalTarget()
    known = sorted({*targets, "local"})
    close = nearest(name, known)
    hint = f" Did you mean '{close}'?" if close else ""
    there = f"{file} has: {', '.join(known)}." if file else f"Write it into {FILE}, as in docs/targets.md."
    raise NotFound(f"There is no target '{name}'.{hint} {there}")


def load_targets(file: Path) -> dict[str, Target]:
    """All targets of a file, by name. Raises as load_target."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}. Check the file and its permissions.") from None
    parsed = parse(text)
    origins = {".".join(path): f"{file}:{line}" for path, line in parsed.lines.items() if path}
    problems = [Problem(f"{file}:{line}", ".".join(path), message) for line, path, message in parsed.problems]
    if not isinstance(parsed.values, Mapping):
        problems = problems or [Problem(str(file), "", "write targets in it, each as 'name: {type: ..., ...}'")]
        raise ConfigError(problems)
    targets = {}
    for name, settings in parsed.values.items():
        target, found = _target(name, settings)
        targets[name] = target
        problems += [Problem(where(key, origins, str(file)), key, message) for key, message in found]
    if problems:
        raise ConfigError(problems)
    return {name: target for name, target in targets.items() if target is not None}


def _target(name: str, settings: Any) -> tuple[Target | None, list[tuple[str, str]]]:
    """The target, and (key, message) of all that is wrong with it."""
    choices = ", ".join(TYPES)
    if not isinstance(settings, Mapping):
        return None, [(name, f"a target is a mapping with a type, one of {choices}")]
    kind = settings.get("type")
    schema = TYPES.get(kind) if isinstance(kind, str) else None
    if schema is None and kind is None and any(isinstance(each, Mapping) for each in settings.values()):
        return None, [
            (name, f"this holds targets, not settings of one: write {', '.join(settings)} at the top of the file")
        ]
    if schema is None:
        close = nearest(str(kind), TYPES)
        hint = f" did you mean '{close}'?" if close else ""
        return None, [(f"{name}.type", f"{shown(kind)} is no type of target;{hint} there is {choices}")]
    values = {key: value for key, value in settings.items() if key != "type"}
    try:
        return schema.model_validate(values), []
    except ValidationError as error:
        return None, [(f"{name}.{key}", message) for key, message in explain(error, schema, values)]
