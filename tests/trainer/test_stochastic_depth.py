from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainer.bound import BoundModel
from trainer.initialization import materialize
from trainer.models import cnn, gpt
from trainer.parts.stochastic_depth import DropBranch, rates
from trainer.shapes import ClassLogits, Image, Logits, Tokens


def test_rates_rise_in_a_straight_line() -> None:
    """Huang et al. 2016, equation 4: a block of L survives with 1 - l/L (1 - p)."""
    assert rates(0.4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_whole_examples_are_dropped_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    drop = DropBranch(0.25)
    made = drop(torch.ones(4000, 2, 3))
    assert made.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (made == made[:, :1, :1]).all(), "an example's values are dropped together"
    assert made.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(made), made)


def made(model: BoundModel) -> nn.Module:
    with torch.device("meta"):
        module = model.build()
    materialize(module, model.init_parameter, seed=0)
    return module


def small_cnn(rate: float) -> tuple[nn.Module, Tensor]:
    config = cnn.Config(blocks=(2, 2), width=4, norm="group", groups=2, stochastic_depth=rate)
    return made(BoundModel(cnn, config, Image(1, 8, 8), ClassLogits(3))), torch.randn(6, 1, 8, 8)


def small_gpt(rate: float, *, recomputed: bool = False) -> tuple[nn.Module, Tensor]:
    config = gpt.Config(
        num_layers=4, hidden_size=8, num_heads=2, stochastic_depth=rate, activation_checkpointing=recomputed
    )
    return made(BoundModel(gpt, config, Tokens(11, 5), Logits(11))), torch.randint(0, 11, (6, 5))


@pytest.mark.parametrize("build", [small_cnn, small_gpt])
def test_blocks_are_left_out_in_training_alone(build: Callable[[float], tuple[nn.Module, Tensor]]) -> None:
    torch.manual_seed(0)
    module, batch = build(0.5)
    plain, _ = build(0.0)
    module.eval(), plain.eval()
    assert torch.equal(module(batch), plain(batch))
    module.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(module(batch))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    found = [each.rate for each in module.modules() if isinstance(each, DropBranch)]
    assert found == pytest.approx([0.125, 0.25, 0.375, 0.5])


def test_a_dropped_block_is_its_input() -> None:
    module, _ = small_gpt(0.5)
    block = module.blocks[3]
    block.dropout[1].rate = 1 - 1e-9  # type: ignore[index, union-attr]
    x = torch.randn(2, 5, 8)
    assert torch.equal(block(x, module.rotary(5, None), None), x)  # type: ignore[operator]


def test_recomputed_activations_drop_the_same_branches() -> None:
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(3)
        module, batch = small_gpt(0.5, recomputed=recomputed)
        torch.manual_seed(4)
        module(batch).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
