"""The sentence of the nearest clip that was trained on, by the mean and deviation of each mel band and the duration.

Beside it the best that can be said without listening: of the sentences trained on, and of the most frequent letters
of them, the one text that has the least errors where it is said of every clip trained on.
"""

from __future__ import annotations

import jiwer
import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from configs.schema import RunConfig
from data_pipelines.examples import Rows
from data_pipelines.shards import Dataset
from trainer.tasks.speech_recognition import Config, log_mels, spelled, written

CANDIDATES = 40  # texts tried of either kind, so that it takes seconds


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """cer and wer of the nearest neighbour; constant_cer and constant_wer of the one text."""
    settings = Config(**config.task.settings)
    clips, texts = _clips(dataset, "train", settings)
    held_out, said = _clips(dataset, "validation", settings)
    scaler = StandardScaler().fit(clips)
    nearest = NearestNeighbors(n_neighbors=1).fit(scaler.transform(clips))
    _, found = nearest.kneighbors(scaler.transform(held_out))
    constant = _best_constant(texts)
    return {
        "cer": float(jiwer.cer(said, [texts[row] for row in found[:, 0]])),
        "wer": float(jiwer.wer(said, [texts[row] for row in found[:, 0]])),
        "constant_cer": float(jiwer.cer(said, [constant] * len(said))),
        "constant_wer": float(jiwer.wer(said, [constant] * len(said))),
    }


def _best_constant(texts: list[str]) -> str:
    letters = sorted(set("".join(texts)) - {" "}, key="".join(texts).count, reverse=True)
    made = [letter * count for letter in letters[:4] for count in range(1, CANDIDATES // 4 + 1)]
    sentences = sorted(set(texts), key=lambda text: (abs(len(text) - np.median([len(each) for each in texts])), text))
    return min(made + sentences[:CANDIDATES], key=lambda text: jiwer.cer(texts, [text] * len(texts)))


def _clips(dataset: Dataset, name: str, settings: Config) -> tuple[np.ndarray, list[str]]:
    """What is compared of each clip, (N, 2 num_mels + 1), and its text; of those clips that count."""
    split = dataset.split(name)
    rows = Rows(split, ("audio", "text"), name).gather(np.arange(len(split)))
    found, texts = [], []
    for number in range(len(split)):
        audio = np.asarray(rows["audio"][number])[: int(settings.max_seconds * settings.sample_rate)]
        target = spelled(bytes(rows["text"][number]).decode(), settings.alphabet)
        if not len(target):
            continue
        frames = log_mels(audio, settings.sample_rate, settings.num_mels)
        found.append(np.concatenate([frames.mean(0), frames.std(0), [np.log(len(frames))]]))
        texts.append(written(target.tolist(), settings.alphabet))
    return np.stack(found), texts
