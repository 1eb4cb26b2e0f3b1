"""Image folders, WebDataset tars, sounds by a manifest."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tarfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from configs.errors import Damaged, NotFound, UsageError
from data_pipelines.sources import Bad, Row, audio, image_folder, partition_files, webdataset
from tests.data_pipelines.reading import bads_of, read_all, rows_of

# --- image_folder


def picture(kind: str, height: int = 10, width: int = 14, value: int = 0, mode: str = "RGB") -> bytes:
    image = pytest.importorskip("PIL.Image")
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[:, : width // 2] = value
    raw = io.BytesIO()
    image.fromarray(pixels).convert(mode).save(raw, kind)
    return raw.getvalue()


def images(tmp_path: Path, files: dict[str, bytes], **settings: Any) -> image_folder.Config:
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    return image_folder.Config.model_validate({"path": str(tmp_path), **settings})


def test_images_are_stored_as_they_are_with_their_folders_number(tmp_path: Path) -> None:
    files = {"dog/b.JPG": picture("jpeg"), "cat/deep/a.png": picture("png"), "cat/notes.txt": b"x", "loose.png": b"x"}
    config = images(tmp_path, {**files, ".hidden/x.png": b"x"})
    assert image_folder.class_names(config) == ("cat", "dog")
    assert [column.dtype for column in image_folder.schema(config)] == ["binary", "int64"]
    found = rows_of(image_folder, config)
    assert [(row.key, row.values["label"]) for row in found] == [("cat/deep/a.png", 0), ("dog/b.JPG", 1)]
    assert found[1].values["image"] == files["dog/b.JPG"] and found[0].split is None
    named = config.model_copy(update={"classes": ("dog",)})
    assert [(row.key, row.values["label"]) for row in rows_of(image_folder, named)] == [("dog/b.JPG", 0)]
    before = image_folder.identity(config)
    images(tmp_path, {"eel/c.png": picture("png")})
    assert image_folder.identity(config) != before and image_folder.class_names(config) == ("cat", "dog", "eel")


def test_folders_may_be_splits(tmp_path: Path) -> None:
    names = ("train/a/1.png", "train/b/1.png", "val/b/2.png", "test/a/3.png")
    found = rows_of(image_folder, images(tmp_path, dict.fromkeys(names, picture("png"))))
    assert [(row.key, row.split, row.values["label"]) for row in found] == [
        ("test/a/3.png", "test", 0),
        ("train/a/1.png", "train", 0),
        ("train/b/1.png", "train", 1),
        ("val/b/2.png", "validation", 1),
    ]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_stored_as_pixels_of_one_size(tmp_path: Path, channels: int) -> None:
    files = {
        "a/wide.png": picture("png", 10, 40),
        "a/high.jpg": picture("jpeg", 90, 30),
        "a/grey.png": picture("png", 8, 8, 9, "L"),
    }
    config = images(tmp_path, files, image_size=8, channels=channels)
    assert image_folder.schema(config)[0].shape == (8, 8, channels)
    found = {row.key: row.values["image"] for row in rows_of(image_folder, config)}
    assert all(image.shape == (8, 8, channels) and image.dtype == np.uint8 for image in found.values())
    wide = found["a/wide.png"][:, :, 0]  # its middle: the edge between dark and light
    assert (wide[:, :3] < 20).all() and (wide[:, 5:] > 180).all()
    assert (found["a/grey.png"][:, :4, 0] == 9).all()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is empty"),
        (b"no image", "is no image that Pillow reads"),
        (picture("png", 60, 60)[:-60], "cannot be"),
        (picture("jpeg", 60, 60)[:-20], "cannot be decoded"),
    ],
)
@pytest.mark.parametrize("size", [None, 8])
def test_broken_images_are_bad(tmp_path: Path, raw: bytes, reason: str, size: int | None) -> None:
    config = images(tmp_path, {"a/1.png": raw, "a/2.png": picture("png")}, image_size=size)
    found = read_all(image_folder, config)
    assert [type(row) for row in found] == [Bad, Row]
    assert found[0].file == str(tmp_path / "a" / "1.png") and reason in found[0].reason


def test_folders_without_classes_or_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match=r"no folder .*nowhere"):
        image_folder.partitions(image_folder.Config(path=str(tmp_path / "nowhere")))
    with pytest.raises(UsageError, match=r"has no folders\. Put the images of each class into a folder"):
        image_folder.partitions(images(tmp_path, {"a.png": b"x"}))
    config = images(tmp_path, {"a/b.png": b"x"}, classes=["z"])
    with pytest.raises(UsageError, match=r"no images in folders of .* named z"):
        image_folder.partitions(config)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pip install 'shardyard\[images\]'"):
        image_folder.partitions(images(tmp_path, {}))


# --- webdataset


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


SAMPLES = [
    ("./d/0001.jpg", b"J1"),
    ("./d/0001.cls", b"7\n"),
    ("./d/0001.seg.txt", "é".encode()),
    ("./d/0002.cls", b"8"),
    ("./d/0002.png", b"P2"),
    ("./d/0002.seg.txt", b""),
]
FIELDS = {"image": "jpg;png", "label": "cls", "caption": "seg.txt"}


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_webdataset_samples(tmp_path: Path, ending: str) -> None:
    raw = tar_of(SAMPLES)
    whole = {".tar": raw, ".tar.zst": zstandard.compress(raw)}.get(ending) or gzip.compress(raw)
    (tmp_path / f"a{ending}").write_bytes(whole)
    config = webdataset.Config(paths=(str(tmp_path),), fields=FIELDS)
    assert [column.dtype for column in webdataset.schema(config)] == ["binary", "int64", "utf8"]
    found = rows_of(webdataset, config)
    assert [(row.key, *row.values.values()) for row in found] == [
        (f"a{ending}/d/0001", b"J1", 7, "é"),
        (f"a{ending}/d/0002", b"P2", 8, ""),
    ]
    for length in (len(whole) // 4, len(whole) // 3, 1024, 2048, 2060):
        (tmp_path / f"a{ending}").write_bytes(whole[: min(length, len(whole) - 20)])
        with pytest.raises(Damaged, match=rf"a\{ending} cannot be "):
            read_all(webdataset, config)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("1.jpg", b"x"), ("1.seg.txt", b"x")], "sample '1': no file .cls (it has jpg, seg.txt)"),
        ([("1.jpg", b"x"), ("1.cls", b"x"), ("1.seg.txt", b"x")], "sample '1': .cls is 'x', not a whole number"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("1.seg.txt", b"\xe9")], "sample '1': .seg.txt is not UTF-8 (byte 0)"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, files: list[tuple[str, bytes]], reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([*files, *SAMPLES]))
    found = read_all(webdataset, webdataset.Config(paths=(str(tmp_path),), fields=FIELDS))
    assert [type(row) for row in found] == [Bad, Row, Row]
    assert found[0].reason == reason


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(Damaged, match=r"a\.tar cannot be read as a tar"):
        read_all(webdataset, webdataset.Config(paths=(str(tmp_path),), fields=FIELDS))


# --- audio


def sound(rate: int = 16000, seconds: float = 0.1, channels: int = 1, hertz: float = 440) -> bytes:
    times = np.arange(int(rate * seconds)) / rate
    samples = (np.sin(2 * np.pi * hertz * times) * 16000).astype(np.int16)
    raw = io.BytesIO()
    with wave.open(raw, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples, channels).tobytes())
    return raw.getvalue()


def clips(tmp_path: Path, manifest: str, content: str, **settings: Any) -> audio.Config:
    pytest.importorskip("soundfile")
    (tmp_path / "clips").mkdir(exist_ok=True)
    for name, raw in {
        "a.wav": sound(),
        "b c.wav": sound(8000, channels=2),
        "bad.wav": b"RIFF",
        "none.wav": sound(8000, 0),
        "cut.wav": sound()[:-1000],
    }.items():
        (tmp_path / "clips" / name).write_bytes(raw)
    (tmp_path / manifest).write_text(content, encoding="utf-8")
    return audio.Config.model_validate({"manifest": str(tmp_path / manifest), **settings})


JSON_LINES = "\n".join(
    json.dumps({"path": f"clips/{name}", "text": text}) for name, text in (("a.wav", "é"), ("b c.wav", "b"))
)


@pytest.mark.parametrize(
    ("manifest", "content"),
    [
        ("m.csv", "path,text,who\nclips/a.wav,é,x\nclips/b c.wav,b,y\n"),
        ("m.tsv", "text\tpath\né\tclips/a.wav\nb\tclips/b c.wav\n"),
        ("m.jsonl", JSON_LINES),
    ],
)
def test_clips_are_decoded_at_one_rate(tmp_path: Path, manifest: str, content: str) -> None:
    config = clips(tmp_path, manifest, content)
    found = rows_of(audio, config)
    assert [row.values["text"] for row in found] == ["é", "b"]
    for row in found:
        samples = row.values["audio"]
        assert samples.dtype == np.float32 and len(samples) == 1600
        expected = np.sin(2 * np.pi * 440 * np.arange(1600) / 16000) * 16000 / 32768
        np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=0.02)


def test_clips_that_cannot_be_used_are_bad(tmp_path: Path) -> None:
    rows = [
        ("clips/bad.wav", "x"),
        ("clips/none.wav", "x"),
        ("clips/cut.wav", "x"),
        ("clips/gone.wav", "x"),
        ("", "x"),
        ("clips/a.wav", "fine"),
    ]
    content = io.StringIO()
    csv.writer(content).writerows([("path", "text"), *rows])
    found = read_all(audio, clips(tmp_path, "m.csv", content.getvalue() + "one\n"))
    assert [type(row) for row in found] == [Bad, Bad, Bad, Bad, Bad, Row, Bad]
    reasons = [row.reason for row in found if isinstance(row, Bad)]
    parts = ("bad.wav", "none.wav: has no samples", "cut.wav: is cut off: its last 1000 bytes are missing")
    parts += ("gone.wav: there is no such file", "names no file", "has 1 values")
    assert all(part in reason for part, reason in zip(parts, reasons, strict=True)), reasons
    assert not any(reason.endswith(".") for reason in reasons)  # they stand inside of sentences
    assert [row.line for row in found if isinstance(row, Bad)] == [2, 3, 4, 5, 6, 8]
    bad = bads_of(
        audio, clips(tmp_path, "m.jsonl", '{"path": "clips/a.wav"}\n{"text": "x"}\n[]\n{"path": 3, "text": "x"}')
    )
    assert [row.line for row in bad] == [1, 2, 3, 4]


def test_a_clip_or_a_file_of_a_sample_that_is_too_large_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (audio, webdataset, image_folder):
        monkeypatch.setattr(source, "MAX_VALUE_BYTES", 1 << 20)
    config = clips(tmp_path, "m.csv", "path,text\nclips/long.wav,x\nclips/a.wav,x\n")
    (tmp_path / "clips" / "long.wav").write_bytes(sound(seconds=20))  # 640 kB, which 1.3 MB of samples are made of
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(tar_of([("1.jpg", bytes((1 << 20) + 1)), ("2.jpg", b"x")]))
    pictures = images(tmp_path / "images", {"a/1.png": bytes((1 << 20) + 1), "a/2.png": picture("png")})
    shards = webdataset.Config(paths=(str(tmp_path / "shards"),), fields={"image": "jpg"})
    for source, settings in ((audio, config), (webdataset, shards), (image_folder, pictures)):
        found = read_all(source, settings)
        assert [type(row) for row in found] == [Bad, Row] and "more than 1 MB" in found[0].reason


def test_a_speaker_is_the_group(tmp_path: Path) -> None:
    content = "file,said,who\nclips/a.wav,x,ann\nclips/a.wav,y,bob\n"
    names = {"path_field": "file", "text_field": "said", "speaker_field": "who"}
    assert [row.group for row in rows_of(audio, clips(tmp_path, "m.csv", content, **names))] == ["ann", "bob"]
    with pytest.raises(UsageError, match=r"m\.csv has no column 'speaker'"):
        read_all(audio, clips(tmp_path, "m.csv", content, **{**names, "speaker_field": "speaker"}))


def test_a_clip_that_changes_changes_the_identity(tmp_path: Path) -> None:
    config = clips(tmp_path, "m.jsonl", JSON_LINES)
    before = audio.identity(config)
    json.dumps(before)
    assert audio.identity(config) == before
    (tmp_path / "clips" / "a.wav").write_bytes(sound(hertz=441, seconds=0.2))
    assert audio.identity(config) != before


def test_a_long_manifest_is_read_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clips(tmp_path, "m.csv", "path,text\n" + "".join(f"clips/a.wav,{n}\n" for n in range(100)))
    monkeypatch.setattr(audio, "_MANIFEST_BYTES", 200)
    assert len(audio.partitions(config)) > 5
    assert [row.values["text"] for row in rows_of(audio, config)] == [str(n) for n in range(100)]
    assert partition_files([], cut=True) == []


def test_wrong_manifests_and_a_missing_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"ends in '\.xml'. It must be a \.csv"):
        audio.partitions(clips(tmp_path, "m.xml", ""))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UsageError, match=r"pip install 'shardyard\[audio\]'"):
        audio.partitions(audio.Config(manifest=str(tmp_path / "m.csv")))
