from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from configs.errors import UsageError
from data_pipelines.columns import Column
from trainer.bound import BoundTask
from trainer.example_batch import batch_of
from trainer.initialization import materialize
from trainer.models import lstm
from trainer.shapes import Frames, Logits
from trainer.tasks import speech_recognition as speech

AUDIO, TEXT = Column("audio", "float32", (None,)), Column("text", "utf8")


def task(**settings: Any) -> BoundTask:
    return BoundTask(speech, speech.Config(**({"alphabet": " abc"} | settings)))


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def row(samples: int, text: str, seed: int = 0) -> dict[str, np.ndarray]:
    return {"audio": noise(samples, seed), "text": np.frombuffer(text.encode(), np.uint8)}


def prepared(each: dict[str, np.ndarray], seed: int = 0, training: bool = True, **settings: Any) -> Any:
    prepare = task(**settings).preparation([AUDIO, TEXT], training=training)
    assert prepare is not None
    return prepare(each, np.random.default_rng(seed))


# --- what is heard


def test_log_mels_are_what_their_definition_gives() -> None:
    """Window by window, a sum over samples for each frequency, and each triangle by its own formula."""
    rate, bands, audio = 8000, 12, noise(1000)
    found = speech.log_mels(audio, rate, bands)
    assert found.shape == (math.ceil(1000 / 80), bands)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 199)
    places = np.arange(200)

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    for frame in (0, 5, 12):
        window = np.zeros(200)
        heard = audio[80 * frame : 80 * frame + 200]
        window[: len(heard)] = heard
        power = [abs(np.sum(window * hann * np.exp(-2j * np.pi * k * places / 256))) ** 2 for k in range(129)]
        for band in range(bands):
            step = mel(4000) / (bands + 1)
            ends = [700 * (10 ** ((band + n) * step / 2595) - 1) for n in range(3)]
            total = 0.0
            for k in range(129):
                hz = k * 8000 / 256
                if ends[0] < hz <= ends[1]:
                    total += power[k] * (hz - ends[0]) / (ends[1] - ends[0])
                elif ends[1] < hz < ends[2]:
                    total += power[k] * (ends[2] - hz) / (ends[2] - ends[1])
            assert found[frame, band] == pytest.approx(math.log(total + speech.FLOOR), abs=1e-3)


def test_a_tone_is_loudest_in_its_own_band() -> None:
    filters = speech.mel_filters(256, 8000, 20)
    assert filters.shape == (20, 129)
    for hz in (400, 1000, 2500):
        found = speech.log_mels(np.sin(2 * np.pi * hz * np.arange(4000) / 8000).astype(np.float32), 8000, 20)
        assert found[20].argmax() == filters[:, round(hz * 256 / 8000)].argmax()


def test_bands_are_normalised_over_the_clip_whatever_its_loudness() -> None:
    quiet, loud = noise(4000), 8 * noise(4000)
    features = [speech.normalised(speech.log_mels(each, 8000, 10)) for each in (quiet, loud)]
    np.testing.assert_allclose(features[0], features[1], atol=0.01)
    np.testing.assert_allclose(features[0].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(features[0].std(0), 1, atol=0.01)
    assert not speech.normalised(speech.log_mels(np.zeros(4000, np.float32), 8000, 10)).any()


def test_moments_hold_frames_in_their_order_and_no_clip_is_too_short() -> None:
    frames = np.arange(14, dtype=np.float32).reshape(7, 2)
    moments = speech.stacked(frames, 3)
    assert moments.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 0, 0, 0, 0]]
    for samples in (0, 1, 90):
        features = prepared(row(samples, "a"), speed=0.1, mask_frames=5, mask_mels=3)["features"]
        assert features.shape == (1, 120) and np.isfinite(features).all()


def test_only_so_many_seconds_are_heard_and_the_model_is_told_of_as_many_moments() -> None:
    bound = task(max_seconds=1.0, num_mels=8, stack=3)
    assert bound.io() == (Frames(24, 34), Logits(5))
    assert prepared(row(20_000, "a"), training=False, max_seconds=1.0, num_mels=8)["features"].shape == (34, 24)


def test_faster_is_shorter_and_higher() -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(8000) / 8000).astype(np.float32)
    faster = speech.played(tone, 1.25)
    assert len(faster) == 6400 and faster.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(faster))
    assert spectrum.argmax() * 8000 / 6400 == pytest.approx(625, abs=2)
    np.testing.assert_array_equal(speech.played(tone, 1.0), tone[:-1])


def test_masks_blank_bands_and_frames_and_leave_the_rest() -> None:
    each = row(8000, "a")
    plain = prepared(each, training=False, stack=1)["features"]
    bands, frames = set(), set()
    for seed in range(40):
        found = prepared(each, seed, stack=1, mask_mels=5, mask_frames=9)["features"]
        blank_bands, blank_frames = (found == 0).all(0), (found == 0).all(1)
        kept = ~blank_frames[:, None] & ~blank_bands[None]
        np.testing.assert_array_equal(found[kept], plain[kept])
        bands.add(int(blank_bands.sum()))
        frames.add(int(blank_frames.sum()))
    assert min(bands) < max(bands) <= 10 and min(frames) < max(frames) <= 18
    short = prepared(row(800, "a"), 1, stack=1, mask_frames=1000)["features"]
    assert (short == 0).all(1).sum() <= 4  # a fifth of 10, twice
    np.testing.assert_array_equal(prepared(each, 3, training=False, stack=1, mask_mels=5, speed=0.2)["features"], plain)


def test_other_audio_is_refused() -> None:
    with pytest.raises(UsageError, match=r"audio is int16 of shape \(None,\); the task wants float32"):
        task().preparation([Column("audio", "int16", (None,)), TEXT], training=True)


# --- letters


def test_text_is_spelled_in_small_letters_and_gaps_are_one_space() -> None:
    alphabet = " abcñ"
    numbers = speech.spelled("  ¡Ba--n\u0303a,  C!", alphabet)
    assert speech.written(numbers.tolist(), alphabet) == "ba ña c"
    assert numbers.min() >= 1 and len(speech.spelled("¿?", alphabet)) == 0
    assert speech.spelled("ab a", "ab").tolist() == [1, 2, 1]


@pytest.mark.parametrize("alphabet", ["aba", "aB"])
def test_an_alphabet_no_text_can_be_spelled_in_is_refused(alphabet: str) -> None:
    with pytest.raises(ValidationError, match="twice, or a capital one"):
        speech.Config(alphabet=alphabet)


def test_greedy_tells_repeats_once_and_reads_no_padding() -> None:
    said = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3], [2, 2, 0, 0, 0, 3, 3, 3]])
    logits = torch.nn.functional.one_hot(said, 5).float()
    assert speech.greedy(logits, torch.tensor([7, 5])) == [[1, 1, 2], [2]]


# --- loss and measures


class Given(nn.Module):
    """Gives what it is told to, whatever it hears."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, frames: Tensor, length: Tensor) -> Tensor:
        return self.outputs


def given_batch(features_length: list[int], targets: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, targets))
    return {
        "features": torch.zeros(len(targets), max(features_length), 120),
        "features_length": torch.tensor(features_length, dtype=torch.int32),
        "target": torch.tensor([each + [0] * (longest - len(each)) for each in targets]),
        "target_length": torch.tensor([len(each) for each in targets], dtype=torch.int32),
    }


def test_the_loss_is_the_sum_over_all_paths_that_spell_the_text() -> None:
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    batch = given_batch([4, 3], [[1, 2], [2, 2]])
    expected = 0.0
    for example, (length, target) in enumerate([(4, [1, 2]), (3, [2, 2])]):
        probability = logits[example].softmax(-1).tolist()
        total = 0.0
        for path in itertools.product(range(3), repeat=length):
            one = torch.nn.functional.one_hot(torch.tensor([path]), 3).float()
            if speech.greedy(one, torch.tensor([length]))[0] == target:
                total += math.prod(probability[moment][letter] for moment, letter in enumerate(path))
        expected -= math.log(total)
    bound = task(alphabet="ab")
    assert bound.loss(Given(logits), batch).item() == pytest.approx(expected, rel=1e-5)
    assert bound.num_items(batch) == 4


def test_a_text_that_does_not_fit_and_one_without_letters_add_nothing() -> None:
    logits = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    batch = given_batch([3, 3, 3], [[1], [2, 2, 2], []])
    bound, model = task(alphabet="ab"), Given(logits)
    loss = bound.loss(model, batch)
    loss.backward()
    alone = bound.loss(Given(logits[:1]), given_batch([3], [[1]]))
    assert loss.item() == pytest.approx(alone.item())
    assert model.outputs.grad is not None and not model.outputs.grad[1:].any() and model.outputs.grad[0].any()
    assert len(bound.predict(model, batch, None)) == 2
    assert bound.num_items(batch) == 1
    twice = given_batch([2, 3], [[2, 2], [2, 2]])  # two that are alike need a blank between them
    assert bound.num_items(twice) == 2


def test_error_rates_count_letters_and_words_of_all_clips_together() -> None:
    bound = task()
    said = [{"said": "ab ca", "heard": "ab cb"}, {"said": "a", "heard": ""}, {"said": "bbbb", "heard": "bbbb"}]
    assert bound.scores(said) == {"cer": pytest.approx(2 / 10), "wer": pytest.approx(2 / 4)}
    assert bound.scores([]) == {}


def test_without_jiwer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(UsageError, match=r'pip install "shardyard\[metrics\]"'):
        task().scores([{"said": "a", "heard": "b"}])


def test_padding_changes_nothing_of_what_is_heard() -> None:
    """A short clip beside a long one, through a bidirectional model."""
    bound, config = task(), lstm.Config(num_layers=2, hidden_size=8, bidirectional=True)
    with torch.device("meta"):
        model = lstm.build(config, *bound.io())
    materialize(model, lambda *args: lstm.init_parameter(config, *args), seed=0)
    rows = [row(9000, "abc ca"), row(3000, "ab", seed=1)]
    together, alone = (batch_of(bound, each, training=False) for each in (rows, rows[1:]))
    first = batch_of(bound, rows[:1], training=False)
    with torch.no_grad():
        both, *parts = (bound.evaluate(model.eval(), batch)["nll_nats"] for batch in (together, first, alone))
        heard = [bound.predict(model, batch, None) for batch in (together, first, alone)]
    assert both == pytest.approx(sum(parts), rel=1e-5)
    assert heard[0] == heard[1] + heard[2] and any(each["heard"] for each in heard[0])
