"""Diffusion: noise that hides an image step by step, and the way back from noise alone to an image.

Ho et al. 2020 (a model that tells the noise of a noisy image; linear schedule), Nichol and Dhariwal 2021 (cosine
schedule), Song et al. 2020 (DDIM: the way back in few steps, without noise of its own), Ho and Salimans 2022
(classifier-free guidance).

B = examples, K = channels, H, W = height and width, S = steps.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

LARGEST_BETA = 0.999  # of the cosine schedule, whose last step would leave nothing of the image


def signal_shares(schedule: Literal["cosine", "linear"], steps: int) -> Tensor:
    """What is left of an image's variance at each step, (S,) fp32 on the CPU, falling: alpha-bar in the papers."""
    if schedule == "linear":
        scale = 1000 / steps  # the paper's are for 1,000 steps
        betas = torch.linspace(1e-4 * scale, 2e-2 * scale, steps, dtype=torch.float64)
    else:
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        left = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - left[1:] / left[:-1]
    return (1 - betas.clamp(max=LARGEST_BETA)).cumprod(0).float()


def with_noise(image: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """The image with noise: (B, K, H, W) both, share (B,)."""
    share = share.view(-1, 1, 1, 1)
    return share.sqrt() * image + (1 - share).sqrt() * noise


def denoise(
    model: nn.Module, noise: Tensor, kind: Tensor, shares: Tensor, *, any_kind: int, guidance: float, steps: int
) -> Tensor:
    """Images in [-1, 1] of these kinds, (B,) int64, from pure noise (B, K, H, W) fp32; the same for the same noise.

    shares: of `signal_shares`. guidance: how far to go from what the model says of any kind to what it says of this
    one: 1 is to it, more is beyond. steps: of the schedule's S, spread evenly, so many are taken.
    """
    shares = shares.to(noise.device)
    taken = torch.linspace(len(shares) - 1, 0, steps, device=noise.device).round().long()
    x = noise
    for number, step in enumerate(taken):
        share = shares[step]
        image = _image(x, _noise_of(model, x, step.expand(len(x)), kind, any_kind, guidance), share)
        if number + 1 == steps:
            return image
        # The noise that goes with the image after its values were bounded.
        left = (x - share.sqrt() * image) / (1 - share).sqrt()
        after = shares[taken[number + 1]]
        x = after.sqrt() * image + (1 - after).sqrt() * left
    raise AssertionError("at least one step")


def _noise_of(model: nn.Module, x: Tensor, step: Tensor, kind: Tensor, any_kind: int, guidance: float) -> Tensor:
    dtype = next(model.parameters()).dtype
    if guidance == 1:
        return model(x.to(dtype), step, kind).float()
    kinds = torch.cat([kind, torch.full_like(kind, any_kind)])
    of_kind, of_any = model(x.to(dtype).repeat(2, 1, 1, 1), step.repeat(2), kinds).float().chunk(2)
    return of_any + guidance * (of_kind - of_any)


def _image(x: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    return ((x - (1 - share).sqrt() * noise) / share.sqrt()).clamp(-1, 1)
