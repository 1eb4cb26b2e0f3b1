from __future__ import annotations

import pytest
import torch

from trainer.initialization import materialize
from trainer.models import cnn
from trainer.shapes import ClassLogits, Image


@pytest.mark.parametrize(
    ("blocks", "block", "published"),
    [((2, 2, 2, 2), "basic", 11_689_512), ((3, 4, 6, 3), "bottleneck", 25_557_032)],
)
def test_resnet_18_and_50_have_the_published_number_of_parameters(
    blocks: tuple[int, ...], block: str, published: int
) -> None:
    config = cnn.Config.model_validate({"blocks": blocks, "width": 64, "block": block})
    assert cnn.num_parameters(config, Image(3, 224, 224), ClassLogits(1000)) == published


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("image", [Image(1, 8, 8), Image(3, 32, 32), Image(3, 65, 47), Image(3, 224, 224)])
def test_images_from_8_to_224_train(image: Image, block: str, norm: str) -> None:
    """Also one alone: the last map is never a single value, of which there is no variance."""
    config = cnn.Config.model_validate({"blocks": (1, 1, 1, 1, 1), "width": 2, "block": block, "norm": norm})
    with torch.device("meta"):
        module = cnn.build(config, image, ClassLogits(3))
    materialize(module, lambda *args: cnn.init_parameter(config, *args), seed=0)
    output = module(torch.randn(1, image.channels, image.height, image.width))
    assert output.shape == (1, 3)
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert cnn.num_parameters(config, image, ClassLogits(3)) == sum(p.numel() for p in module.parameters())
