from __future__ import annotations

import torch

from trainer.rng import forward_seed, seed_forward


def test_a_forward_draws_the_same_numbers_whatever_was_drawn_before() -> None:
    seed_forward(1, 2, 3)
    first = torch.rand(4)
    torch.rand(100)
    seed_forward(1, 2, 3)
    assert torch.equal(torch.rand(4), first)


def test_no_two_forwards_share_a_seed() -> None:
    seeds = {forward_seed(seed, step, k) for seed in range(10) for step in range(30) for k in range(30)}
    assert len(seeds) == 10 * 30 * 30
    assert min(seeds) >= 0 and max(seeds) < 2**63
    forward_seed(2**63 - 1, 10**9, 10**6)
