"""Against PyTorch's own BatchNorm2d."""

from __future__ import annotations

import torch
from torch import nn

from trainer.parts.batch_norm import BatchNorm2d, RunningStatistics


def pair(channels: int = 3) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Ours and PyTorch's, with the same weights."""
    ours, plain = BatchNorm2d(channels), nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("weight", "bias"):
            values = torch.randn(channels, generator=generator)
            getattr(ours, name).copy_(values)
            getattr(plain, name).copy_(values)
    return ours, plain


def batches(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [3 * torch.randn(2 + number, 3, 4, 5, generator=generator) + number for number in range(count)]


def test_forward_and_gradients_are_those_of_pytorch_in_training_and_evaluation() -> None:
    ours, plain = pair()
    for training in (True, False):
        ours.train(training)
        plain.train(training)
        inputs = [batches(1)[0].requires_grad_() for _ in range(2)]
        outputs = [module(x) for module, x in zip((ours, plain), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
        torch.testing.assert_close(ours.bias.grad, plain.bias.grad)
        statistics = RunningStatistics(ours)
        statistics.add(0)
        statistics.fold(1)


def test_a_step_moves_the_statistics_as_pytorch_does_micro_batch_by_micro_batch() -> None:
    ours, plain = pair()
    statistics = RunningStatistics(nn.Sequential(ours))
    before = ours.running_mean.clone()
    inputs = batches()
    for index in (3, 0, 4, 1, 2):  # the order in which they run does not count
        ours(inputs[index])
        statistics.add(index)
    assert torch.equal(ours.running_mean, before), "not before the end of the step"
    statistics.fold(len(inputs))
    for x in inputs:
        plain(x)
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_what_was_not_added_counts_for_nothing() -> None:
    """An idle micro-batch; and a micro-batch that nobody ran, since all of its examples are left out."""
    ours, plain = pair()
    statistics = RunningStatistics(ours)
    first, idle = batches(2)
    ours(first)
    statistics.add(1)
    ours(idle)
    statistics.fold(3)
    plain(first)
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)
    kept = ours.running_var.clone()
    statistics.fold(3)
    assert torch.equal(ours.running_var, kept), "the next step begins with nothing"


def test_an_overflow_does_not_stay() -> None:
    ours, _ = pair()
    ours(torch.full((2, 3, 2, 2), float("inf")))
    ours(batches(1)[0])
    assert ours.batch_mean.isfinite().all() and ours.batch_var.isfinite().all()


def test_conversion_leaves_the_statistics_as_they_are() -> None:
    ours, _ = pair()
    ours.running_mean.fill_(1 + 2**-20)
    ours.to(torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    assert ours.running_mean.dtype == ours.batch_var.dtype == torch.float32
    assert torch.equal(ours.running_mean, torch.full((3,), 1 + 2**-20))
    x = batches(1)[0].bfloat16()
    assert ours(x).dtype == torch.bfloat16
