from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.errors import UsageError
from trainer.initialization import materialize
from trainer.models import cnn, detector
from trainer.shapes import Boxes, Image

SMALL = {"blocks": (1, 1, 1), "width": 4, "stride": 4, "channels": 8}


def built(image: Image, **settings: Any) -> tuple[detector.Detector, detector.Config]:
    config = detector.Config.model_validate(SMALL | settings)
    with torch.device("meta"):
        module = detector.build(config, image, Boxes(3))
    materialize(module, lambda *args: detector.init_parameter(config, *args), seed=0)
    return module, config


@pytest.mark.parametrize(
    ("image", "settings", "grid"),
    [
        (Image(1, 32, 32), {}, (8, 8)),
        (Image(3, 48, 32), {"stride": 1}, (48, 32)),
        (Image(1, 96, 96), {"patch": 2, "stride": 8}, (12, 12)),
        (Image(3, 200, 200), {"stride": 8}, (25, 25)),
        (Image(3, 200, 200), {"stride": 16, "block": "bottleneck", "norm": "group"}, (13, 13)),
    ],
)
def test_the_grid_has_the_stride_that_was_asked_for(
    image: Image, settings: dict[str, Any], grid: tuple[int, int]
) -> None:
    module, config = built(image, **settings)
    with torch.no_grad():
        output = module(torch.randn(2, image.channels, image.height, image.width))
    assert output.shape == (2, *grid, 8)
    assert (output[..., 3:7] >= 0).all()
    assert detector.num_parameters(config, image, Boxes(3)) == sum(each.numel() for each in module.parameters())


def test_strides_of_stages_are_those_of_their_maps() -> None:
    for image in (Image(1, 40, 40), Image(3, 200, 136)):
        config = detector.Config.model_validate(SMALL | {"blocks": (2, 1, 3, 1)})
        module = cnn.Trunk(config, image)
        maps = module.maps(torch.randn(2, image.channels, image.height, image.width))
        known = cnn.stage_maps(config, image)
        assert [tuple(each.shape[1:]) for each in maps] == [(each.channels, each.height, each.width) for each in known]
        assert [-(-image.height // each.stride) for each in known] == [each.height for each in known]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 3}, r"model.stride=3: .* have the strides 1, 2, 4\. Set model.stride to one of them"),
        ({"patch": 5}, r"model.patch=5 does not divide images of 32 x 32"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    config = detector.Config.model_validate(SMALL | settings)
    for use in (detector.build, detector.num_parameters):
        with pytest.raises(UsageError, match=message):
            use(config, Image(1, 32, 32), Boxes(3))


def test_at_first_hardly_anything_is_found() -> None:
    module, _ = built(Image(1, 32, 32))
    probabilities = module.eval()(torch.randn(4, 1, 32, 32))[..., :3].sigmoid()
    assert 0.005 < probabilities.mean() < 0.02
