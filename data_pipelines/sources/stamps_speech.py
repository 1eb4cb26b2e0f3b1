"""Spoken sentences: descriptions of the drawing program Tux Paint's stamps, read aloud by people.

From: Debian tuxpaint-stamps-default, **/NAME_desc_LL.ogg, and the sentences in NAME.txt (`LL.utf8=`). Licence: GPL-2.
One language at a time; ru, fr and es have some 750 clips each, 18 to 25 minutes.
audio: one channel at `sample_rate`, -1 to 1. text: the sentence as written. Left out are clips that are another's copy,
and those with fewer than 4 or more than 25 characters a second (read otherwise than written).
The split is by sentence: a held-out one, whoever reads it, was never trained on.
It does not show: many voices. A language has one or few, and they are on both sides; sentences are short and alike.

It needs the package soundfile (pip install 'shardyard[audio]').
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from pydantic import Field

from configs.errors import UsageError
from data_pipelines.packages import Package, members
from data_pipelines.sound import decode_sound
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # each row names its group

PACKAGE = Package(
    "apt-get",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
FOLDER = "usr/share/tuxpaint/stamps/"
MIN_CHARACTERS_PER_S, MAX_CHARACTERS_PER_S = 4, 25


class Config(SourceConfig):
    """Which language, and how it is sampled."""

    language: str = Field(
        default="ru", pattern="^[a-z]{2}$", description="Language spoken: ru, fr, es, ca, bg, el, ..."
    )
    sample_rate: int = Field(default=8000, ge=4000, le=48000, description="Samples a second.")
    validation_fraction: float = Field(
        default=0.15, ge=0.0, lt=1.0, description="Share of the sentences that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A clip and what is said in it."""
    return Column("audio", "float32", (None,)), Column("text", "utf8")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once: clips and sentences lie anywhere in the archive."""
    return [Partition("stamps_speech", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The clips by name. Raises UsageError for an unknown language or without soundfile, and as `packages.fetch`."""
    ending = f"_desc_{config.language}.ogg"
    files = {name.removeprefix(FOLDER): content for name, content in members(PACKAGE, f"*{ending}", f"{FOLDER}*.txt")}
    names = sorted(name.removesuffix(ending) for name in files if name.endswith(ending))
    if not names:
        raise UsageError(
            f"Tux Paint's stamps have no clips in '{config.language}'. Use data.language=ru, fr, es, ca or el."
        )
    seen: set[bytes] = set()
    for name in names:
        sound = files[name + ending]
        text = sentence(files.get(f"{name}.txt", b"").decode("utf-8", "replace"), config.language)
        digest = hashlib.sha256(sound).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        try:
            audio = decode_sound(sound, config.sample_rate)
        except ValueError as error:
            yield Bad(name + ending, None, str(error), text)
            continue
        seconds = len(audio) / config.sample_rate
        if MIN_CHARACTERS_PER_S * seconds <= len(text) <= MAX_CHARACTERS_PER_S * seconds:
            yield Row(name, {"audio": audio, "text": text}, group=" ".join(text.lower().split()))


def sentence(description: str, language: str) -> str:
    """The sentence of one language in a stamp's description: the line that begins with `LL.utf8=`; "" without one."""
    for line in description.splitlines():
        name, equals, text = line.partition("=")
        if equals and name == f"{language}.utf8":
            return text.strip()
    return ""


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
