"""Image generation: images of a class, made from noise (denoising diffusion, trainer/parts/diffusion.py).

A stored row has `image`, its pixels, uint8 (S, S, K), and `label`, the number of its class. The model sees an image
with noise of a random strength, and tells the noise. Strength and noise are drawn when a row is made ready, by the
example's own generator: they do not depend on ranks or micro-batches. In evaluation they are drawn from the image's
own bytes, so that they are always the same.

A batch, B = examples, S = image_size, K = channels: image (B, S, S, K) uint8; noise (B, S, S, K) fp32; step (B,) int32;
kind (B,) int32: the class, `num_classes` where the model is not told it, -100 where the example does not count.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.cross_entropy import IGNORED
from trainer.parts.diffusion import denoise, signal_shares, with_noise
from trainer.parts.pixels import check_pixels
from trainer.pictures import enlarged, grid
from trainer.shapes import NoisyImage, Pixels

if TYPE_CHECKING:
    from data_pipelines.columns import Column

SHOWN = 8  # images of each class in a picture
SHOWN_PX = 32  # smaller images are enlarged to about this
MOST_SHOWN_CLASSES = 32
AT_ONCE = 250  # images made together


class Config(Section):
    """What images look like, how noise is added to them, and how they are made."""

    num_classes: int = Field(ge=1, description="Classes; labels are 0 to num_classes - 1.", examples=[10])
    image_size: int = Field(ge=8, description="Height and width of an image, in pixels.", examples=[32])
    channels: int = Field(default=3, ge=1, description="Values a pixel: 3 for colour, 1 for grey.")
    noise_steps: int = Field(default=1000, ge=2, description="Strengths of noise.")
    noise_schedule: Literal["cosine", "linear"] = Field(default="cosine", description="How noise grows over them.")
    untold: float = Field(
        default=0.1, ge=0, lt=1, description="Share of training examples whose class the model is not told."
    )
    sampling_steps: int = Field(default=50, ge=1, description="Steps from noise to an image.")
    guidance: float = Field(
        default=2.0,
        ge=0,
        description="How far to go from an image of any class to one of the class asked for: 1 is to it.",
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> Config:
        if self.sampling_steps > self.noise_steps:
            raise ValueError(
                f"sampling_steps={self.sampling_steps} is more than noise_steps={self.noise_steps}, of which they are "
                "taken. Use as many at most"
            )
        if self.guidance != 1 and not self.untold:
            raise ValueError(
                f"guidance={self.guidance:g} asks what the model makes when it is not told the class, which untold=0 "
                "never trains. Use guidance=1, or an untold of about 0.1"
            )
        return self


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("image", "label")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Random pixels, and any class."""
    shape = (config.image_size, config.image_size, config.channels)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    return {"image": image, "label": np.int64(rng.integers(config.num_classes))}


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def io(config: Config) -> tuple[NoisyImage, Pixels]:
    """A noisy image in, its noise out."""
    size = config.image_size
    return NoisyImage(config.channels, size, size, config.noise_steps, config.num_classes), Pixels(config.channels)


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """Draws the noise of each row.

    Raises:
        UsageError: the stored images are not pixels of the configured size.
    """
    image = next(column for column in stored if column.name == "image")
    check_pixels(image, config.image_size, config.channels)
    return partial(_prepare, config=config, training=training)


def _prepare(
    row: Mapping[str, Any], rng: np.random.Generator, *, config: Config, training: bool
) -> dict[str, np.ndarray]:
    image = np.ascontiguousarray(row["image"])
    if not training:
        rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    told = not training or rng.random() >= config.untold
    return {
        "image": image,
        "noise": rng.standard_normal(image.shape, dtype=np.float32),
        "step": np.asarray(rng.integers(config.noise_steps), np.int32),
        "kind": np.asarray(row["label"] if told else config.num_classes, np.int32),
    }


def check(batch: Mapping[str, Tensor], config: Config) -> None:
    """Raises UsageError for a label that is none of the classes."""
    kind = batch["kind"]
    wrong = kind[(kind != IGNORED) & ((kind < 0) | (kind > config.num_classes))]
    if len(wrong):
        raise UsageError(
            f"An example has the label {int(wrong[0])}, but task.num_classes={config.num_classes} allows 0 to "
            f"{config.num_classes - 1}. Set task.num_classes to the number of classes in the data."
        )


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Values of the images that count."""
    return int((batch["kind"] != IGNORED).sum()) * batch["image"][0].numel()


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no image that counts: its loss is zero, and so is every gradient."""
    return {**batch, "kind": torch.full_like(batch["kind"], IGNORED)}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum over all values of (noise as told - noise)^2: an fp32 scalar."""
    image = batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = batch["noise"].permute(0, 3, 1, 2)
    step, kind = batch["step"].long(), batch["kind"].long()
    shares = signal_shares(config.noise_schedule, config.noise_steps).to(image.device)
    noisy = with_noise(image, noise, shares[step]).contiguous()
    told = model(noisy.to(next(model.parameters()).dtype), step, kind.clamp(min=0)).float()
    counts = (kind != IGNORED).view(-1, 1, 1, 1)
    return ((told - noise) ** 2).masked_fill(~counts, 0.0).sum()


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:
    """Sums over the images that count: squared_error, values."""
    return {"squared_error": float(loss(model, batch, config)), "values": float(num_items(batch))}


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss: the mean squared error of the noise, of variance 1; nothing where no image counted.

    How good the images are it does not tell: benchmarks/generation.py looks at them.
    """
    if not sums.get("values"):
        return {}
    return {"loss": sums["squared_error"] / sums["values"]}


def generate(model: nn.Module, config: Config, kinds: Sequence[int], seed: int) -> np.ndarray:
    """An image of each kind, uint8 (N, S, S, K); seed, number and kind decide it. `num_classes` is any kind."""
    device = next(model.parameters()).device
    shares = signal_shares(config.noise_schedule, config.noise_steps)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: a GPU would draw others
    made = []
    for chunk in torch.tensor(kinds).split(AT_ONCE):
        noise = torch.randn(len(chunk), config.channels, *[config.image_size] * 2, generator=generator)
        image = denoise(
            model,
            noise.to(device),
            chunk.to(device),
            shares,
            any_kind=config.num_classes,
            guidance=config.guidance,
            steps=config.sampling_steps,
        )
        made.append(((image + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(made).numpy()


def pictures(
    model: nn.Module,
    batch: Mapping[str, Tensor],  # noqa: ARG001 - the signature of every task
    config: Config,
    tokenizer: Any,  # noqa: ARG001
    seed: int,
) -> dict[str, np.ndarray]:
    """A row of images for each class."""
    classes = range(min(config.num_classes, MOST_SHOWN_CLASSES))
    images = generate(model, config, [kind for kind in classes for _ in range(SHOWN)], seed)
    images = images if config.channels == 3 else images[..., 0]
    times = max(1, SHOWN_PX // config.image_size)
    return {"samples": grid([enlarged(image, times) for image in images], columns=SHOWN)}
