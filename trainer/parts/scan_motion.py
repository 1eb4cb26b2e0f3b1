"""How a robot moved between two laser scans, told from the scans alone.

Range flow: Jaimez et al. 2016, "Planar odometry from a radial laser scanner" (ICRA). In the robot's frame the world
moves against it: where it goes by v ahead, by u to the left and turns by w, the distance r seen at the angle a changes
by  dr = r'(a) w - (cos a + r'(a) sin a / r) v - (sin a - r'(a) cos a / r) u.  Each beam is one equation; the three
unknowns are found by least squares, again and again with less weight for beams that do not fit: other things move too,
and edges come into view (Cauchy's weights; Holland and Welsch 1977).

... = any axes, A = beams, from right to left.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 8
MISFIT_M = 0.1  # distance from the fit at which a beam counts half
FAR_M = 30.0  # beams that long say nothing of a motion
RIDGE = 1e-2  # against a motion that no beam tells, as in a long corridor


def rotation(before: Tensor, after: Tensor, field_of_view: float) -> Tensor:
    """The turn (...,) in radians, left is positive, between two scans (..., A) in metres, over so many radians."""
    angle = torch.linspace(-field_of_view / 2, field_of_view / 2, before.shape[-1], device=before.device)
    distance = ((before + after) / 2).clamp(min=0.1)
    slope = _slope(distance, angle)
    cos, sin = angle.cos(), angle.sin()
    effects = torch.stack([slope, -cos - slope * sin / distance, -sin + slope * cos / distance], dim=-1)  # (..., A, 3)
    change = (after - before).unsqueeze(-1)
    near = (before < FAR_M) & (after < FAR_M) & (slope.abs() < 10 * distance)
    trusted = (near / (1 + slope.abs() / distance)).unsqueeze(-1)  # where the slope is great, its error is
    ridge = RIDGE * torch.eye(3, device=before.device)
    motion = torch.zeros_like(effects[..., :1, :]).mT  # (..., 3, 1)
    for round_number in range(ROUNDS):
        misfit = (change - effects @ motion) / (MISFIT_M if round_number else 5 * MISFIT_M)
        weighted = effects * (trusted / (1 + misfit.square()))
        motion = torch.linalg.solve(weighted.mT @ effects + ridge, weighted.mT @ change)
    return motion[..., 0, 0]


def _slope(distance: Tensor, angle: Tensor) -> Tensor:
    """Its derivative by the angle, by central differences; one-sided at the ends."""
    if len(angle) < 2:
        return torch.zeros_like(distance)
    return torch.gradient(distance, spacing=(angle,), dim=-1)[0]


def misfits(before: Tensor, after: Tensor, shifts: int, most: float) -> Tensor:
    """How badly two scans (..., A) match when one is shifted by -shifts .. shifts beams: (..., 2 shifts + 1).

    The mean over beams that both have of the difference in log(1 + metres), at most `most`. The least is where the
    robot's turn has put the scan; the curve around it tells how sure that is.
    """
    first, second = before.log1p(), after.log1p()
    beams = before.shape[-1]
    curves = []
    for shift in range(-shifts, shifts + 1):
        ahead, behind = max(shift, 0), max(-shift, 0)
        difference = second[..., behind : beams - ahead] - first[..., ahead : beams - behind]
        curves.append(difference.abs().clamp(max=most).mean(-1))
    return torch.stack(curves, dim=-1)
