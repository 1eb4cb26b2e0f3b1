from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.examples import built
from trainer.bound import BoundModel
from trainer.models import unet
from trainer.shapes import NoisyImage, Pixels

CONFIG = unet.Config(width=4, multipliers=(1, 2, 3), blocks=2, attention_heads=2)


def bound(input: NoisyImage) -> BoundModel:
    return BoundModel(unet, CONFIG, input, Pixels(input.channels))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (13, 22), (5, 9)])
def test_any_size_keeps_its_size_and_is_counted(size: tuple[int, int]) -> None:
    model = bound(NoisyImage(2, *size, steps=50, classes=3))
    module = built(model)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        output = module(torch.randn(1, 2, *size), torch.tensor([7]), torch.tensor([3]))
        output.sum().backward()
    assert output.shape == (1, 2, *size)
    assert model.num_parameters() == sum(each.numel() for each in module.parameters())
    assert model.flops_per_example() == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert all(each.grad is not None and each.grad.any() for each in module.parameters())


def test_a_residual_block_is_the_papers_written_out() -> None:
    block = unet.Residual(4, 6, 5, CONFIG).double()
    x, embedding = torch.randn(2, 4, 7, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    first = nn.Sequential(block.norm, nn.SiLU(), block.convolution)
    scale, shift = block.condition(embedding).split(6, dim=1)
    y = first(x).reshape(2, 3, -1)  # three groups of two channels
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y.reshape(2, 6, 7, 5) * (1 + scale)[:, :, None, None] + shift[:, :, None, None]
    wanted = torch.conv2d(nn.functional.silu(y), block.last.weight, padding=1) + block.shortcut(x)
    torch.testing.assert_close(block(x, embedding), wanted)


def test_attention_is_torchs() -> None:
    config = unet.Config(width=8, attention_heads=2)
    attention = unet.Attention(8, config)
    reference = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.inputs.weight)
        reference.out_proj.weight.copy_(attention.last.weight)
    x = torch.randn(3, 8, 4, 5)
    places = attention.norm(x).flatten(2).transpose(1, 2)
    seen, _ = reference(places, places, places)
    torch.testing.assert_close(attention(x), x + seen.transpose(1, 2).reshape(x.shape))


def test_step_and_kind_change_what_it_says() -> None:
    module = built(bound(NoisyImage(1, 8, 8, steps=50, classes=3))).eval()
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        said = [module(image, torch.tensor([step]), torch.tensor([kind])) for step, kind in ((0, 0), (1, 0), (0, 3))]
    assert all((said[0] - other).abs().max() > 1e-6 for other in said[1:])


def test_steps_are_spread_over_the_same_waves_however_many_there_are() -> None:
    few, many = (unet.Embedding(8, NoisyImage(1, 8, 8, steps, 2)) for steps in (10, 100))
    many.load_state_dict(few.state_dict())
    kind = torch.tensor([1])
    torch.testing.assert_close(few(torch.tensor([3]), kind), many(torch.tensor([30]), kind))


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="a number of heads that divides 32"):
        unet.Config(width=8, attention_heads=3)
