"""Speech recognition: the letters of what is said, by connectionist temporal classification (CTC; Graves et al. 2006).

A stored row has `audio`, float32 (samples,), and `text`, what is said in it. The text is read in small letters, and of
those what `alphabet` holds; each gap between words is one space. A clip without any such letter does not count.

The model hears the logarithm of the power in `num_mels` bands of the mel scale, every 10 ms in windows of 25 ms, each
band with mean 0 and deviation 1 over the clip; `stack` such frames make a moment (Pundak and Sainath 2016), so that
there are fewer. At each moment it says one of the letters (1 to len(alphabet)) or nothing (0). In training a clip may
be played faster or slower (Ko et al. 2015), and bands and stretches of time be blanked (SpecAugment, Park et al. 2019),
seeded by its place in the order of the data. Clips of like length share micro-batches.

A batch, B = examples, T = moments of the longest, K = num_mels * stack, U = letters of the longest: features (B, T, K)
float32, then 0; features_length (B,) int32; target (B, U) int64, then 0; target_length (B,) int32, 0 where it does not
count. N = samples, F = frames.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from trainer.shapes import Frames, Logits

if TYPE_CHECKING:
    from data_pipelines.columns import Column

RAGGED = {"features": 1, "target": 1}
BLANK = 0
WINDOW_S, HOP_S = 0.025, 0.01
MASKS = 2  # of bands, and as many of time
MOST_MASKED = 0.2  # of a clip's frames, by each mask
FLOOR = 1e-8  # of a band's power: silence has a logarithm too


class Config(Section):
    """What is heard, which letters there are, and how clips are changed in training."""

    alphabet: str = Field(
        default=" 'abcdefghijklmnopqrstuvwxyz0123456789",
        min_length=1,
        description="The letters, small ones, and what else counts; letter n of it, from 1, is what the model calls n.",
    )
    sample_rate: int = Field(default=8000, ge=1000, description="Samples a second of the data.")
    max_seconds: float = Field(default=20.0, gt=0, description="Of longer clips the end is not heard.")
    num_mels: int = Field(default=40, ge=4, description="Bands of the mel scale.")
    stack: int = Field(default=3, ge=1, description="Frames of 10 ms that make a moment.")
    speed: float = Field(
        default=0.0, ge=0, lt=0.5, description="Play a training clip faster or slower by up to this share."
    )
    mask_mels: int = Field(default=0, ge=0, description="Blank up to so many bands of a training clip, twice.")
    mask_frames: int = Field(
        default=0, ge=0, description="Blank up to so many frames of a training clip, and at most a fifth, twice."
    )

    @model_validator(mode="after")
    def _letters_are_small_and_told_once(self) -> Self:
        if len(set(self.alphabet)) != len(self.alphabet) or self.alphabet != small(self.alphabet):
            raise ValueError("alphabet holds a letter twice, or a capital one, of which no text is made; leave it out")
        return self


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("audio", "text")


def example(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Half a second of noise, and a word that fits into it."""
    samples = int(config.sample_rate * rng.uniform(0.3, 0.6))
    letters = rng.permutation([letter for letter in config.alphabet if letter != " "])[: int(rng.integers(1, 4))]
    return {"audio": (0.1 * rng.standard_normal(samples)).astype(np.float32), "text": "".join(letters)}


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def length_column(config: Config) -> str:  # noqa: ARG001
    """Clips of like length are put side by side."""
    return "audio"


def io(config: Config) -> tuple[Frames, Logits]:
    """Moments in; at each of them a logit for each letter and for none out."""
    frames = num_frames(round(config.max_seconds * config.sample_rate), config.sample_rate)
    return Frames(config.num_mels * config.stack, -(-frames // config.stack)), Logits(len(config.alphabet) + 1)


# --- what the model hears


def preparation(
    config: Config, stored: Sequence[Column], *, training: bool
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """What is done to each row.

    Raises:
        UsageError: the stored audio is no list of samples.
    """
    audio = next(column for column in stored if column.name == "audio")
    if audio.dtype != "float32" or audio.shape != (None,):
        raise UsageError(
            f"The data set's audio is {audio.dtype} of shape {tuple(audio.shape)}; the task wants float32 samples of "
            "clips of any length. Use a source that decodes sound, such as data.name=audio."
        )
    return partial(_prepare, config=config, training=training)


def _prepare(
    row: Mapping[str, Any], rng: np.random.Generator, *, config: Config, training: bool
) -> dict[str, np.ndarray]:
    audio = np.asarray(row["audio"])[: int(config.max_seconds * config.sample_rate)]
    if training and config.speed:
        audio = played(audio, 1 + rng.uniform(-config.speed, config.speed))
    frames = normalised(log_mels(audio, config.sample_rate, config.num_mels))
    if training:
        _blank(frames.T, config.mask_mels, config.num_mels, rng)
        _blank(frames, config.mask_frames, int(MOST_MASKED * len(frames)), rng)
    return {"features": stacked(frames, config.stack), "target": spelled(bytes(row["text"]).decode(), config.alphabet)}


def num_frames(samples: int, sample_rate: int) -> int:
    """F: the windows that begin within a clip; behind its end there is silence."""
    return max(1, -(-samples // round(HOP_S * sample_rate)))


def log_mels(audio: np.ndarray, sample_rate: int, num_mels: int) -> np.ndarray:
    """Audio (N,): log of the power in each band, (F, num_mels) float32, of Hann windows of 25 ms every 10 ms."""
    hop, window = round(HOP_S * sample_rate), round(WINDOW_S * sample_rate)
    frames = num_frames(len(audio), sample_rate)
    padded = np.zeros((frames - 1) * hop + window, np.float32)
    padded[: len(audio)] = audio[: len(padded)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]  # (F, window)
    size = 1 << (window - 1).bit_length()
    power = np.abs(np.fft.rfft(windows * np.hanning(window).astype(np.float32), size)) ** 2  # (F, size / 2 + 1)
    return np.log(power @ mel_filters(size, sample_rate, num_mels).T + FLOOR).astype(np.float32)


@cache
def mel_filters(size: int, sample_rate: int, num_mels: int) -> np.ndarray:
    """(num_mels, size / 2 + 1): triangles that overlap by half, at even distances on the mel scale, up to Nyquist's.

    mel = 2595 log10(1 + Hz / 700) (O'Shaughnessy 1987), as in HTK.
    """
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, num_mels + 2) / 2595) - 1)  # in Hz
    bins = np.arange(size // 2 + 1) * sample_rate / size
    left, middle, right = (corners[first : first + num_mels, None] for first in range(3))
    return np.clip(np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)), 0, None)


def normalised(frames: np.ndarray) -> np.ndarray:
    """(F, num_mels): each band with mean 0 and deviation 1; one that stays the same is 0."""
    centred = (frames - frames.mean(0, dtype=np.float64)).astype(np.float32)
    return centred / (centred.std(0) + 1e-3)


def played(audio: np.ndarray, speed: float) -> np.ndarray:
    """Audio (N,) that is over sooner by this factor, and higher: (N / speed,), between old samples by a line."""
    places = np.arange(0, len(audio) - 1, speed)
    return np.interp(places, np.arange(len(audio)), audio).astype(np.float32) if len(places) else audio


def _blank(frames: np.ndarray, longest: int, most: int, rng: np.random.Generator) -> None:
    """Set MASKS runs of rows to 0, each of up to `longest` and `most` of them."""
    for _ in range(MASKS if longest else 0):
        length = int(rng.integers(0, min(longest, most) + 1))
        start = int(rng.integers(0, len(frames) - length + 1))
        frames[start : start + length] = 0


def stacked(frames: np.ndarray, stack: int) -> np.ndarray:
    """(F, num_mels): (ceil(F / stack), num_mels * stack), the last moment filled up with 0."""
    filled = np.pad(frames, ((0, -len(frames) % stack), (0, 0)))
    return filled.reshape(-1, stack * frames.shape[1])


# --- letters


def small(text: str) -> str:
    """In small letters, an accent and its letter being one character."""
    return unicodedata.normalize("NFC", text.lower())


def spelled(text: str, alphabet: str) -> np.ndarray:
    """The numbers of a text's letters, (U,) int64; what is no letter is left out, and counts as a gap between words."""
    number = {letter: place for place, letter in enumerate(alphabet, 1)}
    words = "".join(letter if letter in number else " " for letter in small(text)).split()
    return np.array([number[letter] for letter in " ".join(words) if letter in number], np.int64)


def written(numbers: Sequence[int], alphabet: str) -> str:
    """The text of these letters."""
    return "".join(alphabet[number - 1] for number in numbers)


def greedy(logits: Tensor, length: Tensor) -> list[list[int]]:
    """logits (B, T, S), length (B,): the likeliest of each moment, repeats told once, blanks left out."""
    best = logits.argmax(-1).tolist()
    found = []
    for numbers, valid in zip(best, length.tolist(), strict=True):
        heard = numbers[:valid]
        changes = [each for each, before in zip(heard, [BLANK, *heard], strict=False) if each != before]
        found.append([each for each in changes if each != BLANK])
    return found


# --- learning and measuring


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Letters of the clips that count."""
    return int(batch["target_length"][_reachable(batch)].sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Moments that the model hears."""
    return int(batch["features_length"].sum())


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no text that counts: its loss is zero, and so is every gradient."""
    return {**batch, "target_length": torch.zeros_like(batch["target_length"])}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:  # noqa: ARG001
    """Sum of -log p(text) in nats over the clips that count: an fp32 scalar."""
    return _summed_ctc(_logits(model, batch), batch)


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:  # noqa: ARG001
    """Sums over the clips that count: nll_nats and letters."""
    return {"nll_nats": float(_summed_ctc(_logits(model, batch), batch)), "letters": float(num_items(batch))}


def metrics(sums: Mapping[str, float], config: Config, split: Any) -> dict[str, float]:  # noqa: ARG001
    """loss: nats a letter; nothing where no clip counted."""
    return {"loss": sums["nll_nats"] / sums["letters"]} if sums.get("letters") else {}


def predict(model: nn.Module, batch: Mapping[str, Tensor], config: Config, tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ARG001
    """Of each clip that counts what is said and what was heard."""
    heard = greedy(_logits(model, batch), batch["features_length"])
    rows = zip(batch["target"].tolist(), batch["target_length"].tolist(), heard, strict=True)
    return [
        {"said": written(said[:length], config.alphabet), "heard": written(found, config.alphabet)}
        for said, length, found in rows
        if length
    ]


def scores(predictions: Sequence[Mapping[str, Any]], config: Config) -> dict[str, float]:  # noqa: ARG001
    """cer and wer: letters and words that are wrong, missing or too many, as a share of those that were said.

    Raises:
        UsageError: jiwer is not installed.
    """
    if not predictions:
        return {}
    try:
        import jiwer
    except ImportError as error:
        raise UsageError(
            "Error rates of letters and words are computed by jiwer, which is not installed. "
            'Run pip install "shardyard[metrics]".'
        ) from error
    said, heard = [each["said"] for each in predictions], [each["heard"] for each in predictions]
    return {"cer": float(jiwer.cer(said, heard)), "wer": float(jiwer.wer(said, heard))}


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T, S)."""
    return model(batch["features"].to(next(model.parameters()).dtype), batch["features_length"].to(torch.int64))


def _summed_ctc(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """An fp32 scalar."""
    length = batch["target_length"].to(torch.int64)
    each = F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),  # (T, B, S)
        batch["target"],
        batch["features_length"].to(torch.int64),
        length,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return torch.where((length > 0) & _reachable(batch), each, 0.0).sum()


def _reachable(batch: Mapping[str, Tensor]) -> Tensor:
    """(B,) bool: whether a clip has a moment for each letter and for the blank between two that are alike.

    Else CTC gives its text no probability, and it can be neither learned nor judged.
    """
    letters, length = batch["target"], batch["target_length"]
    place = torch.arange(1, letters.shape[1], device=letters.device)
    twice = (letters[:, 1:] == letters[:, :-1]) & (place < length.unsqueeze(1))
    return length + twice.sum(1) <= batch["features_length"]
