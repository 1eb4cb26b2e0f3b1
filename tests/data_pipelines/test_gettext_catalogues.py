from __future__ import annotations

import gettext
import io
import struct
from pathlib import Path

import pytest

from configs.errors import NotFound
from data_pipelines.sources import Bad, gettext_catalogues
from tests.data_pipelines.reading import read_all, rows_of

MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n",
    "Open": "Öffnen",
    "menu\4Close": "Schließen",
    "one file\0%d files": "eine Datei\0%d Dateien",
    "OK": "OK",
    "untranslated": "",
}


def catalogue(messages: dict[str, str], order: str = "<", charset: str = "utf-8") -> bytes:
    """A .mo file, as msgfmt writes it."""
    texts = [(source.encode(charset), target.encode(charset)) for source, target in sorted(messages.items())]
    sources_at = 28
    targets_at = sources_at + 8 * len(texts)
    place = targets_at + 8 * len(texts)
    tables, content = b"", b""
    for column in (0, 1):
        for pair in texts:
            tables += struct.pack(f"{order}2I", len(pair[column]), place + len(content))
            content += pair[column] + b"\0"
    head = (0x950412DE, 0, len(texts), sources_at, targets_at, 0, 0)
    return struct.pack(f"{order}7I", *head) + tables + content


def put(folder: Path, files: dict[str, bytes]) -> gettext_catalogues.Config:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return gettext_catalogues.Config(path=str(folder))


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_are_those_that_gettext_finds(order: str) -> None:
    raw = catalogue(MESSAGES, order)
    found = dict(gettext_catalogues.parse_catalogue(raw))
    told = gettext.GNUTranslations(io.BytesIO(raw))
    assert found["Open"] == told.gettext("Open") and found["Close"] == told.pgettext("menu", "Close")
    assert found["one file"] == told.ngettext("one file", "%d files", 1)
    assert found.keys() == {"Open", "Close", "one file", "OK", "untranslated"}


def test_rows(tmp_path: Path) -> None:
    latin = {"": "Content-Type: text/plain; charset=ISO-8859-1\n", "Open": "Öffne"}
    files = {
        "de/LC_MESSAGES/a.mo": catalogue(MESSAGES),
        "de/LC_MESSAGES/b.mo": catalogue(latin, charset="latin1"),
        "fr/LC_MESSAGES/a.mo": catalogue({"": "", "Open": "Ouvrir"}),
    }
    config = put(tmp_path, files)
    assert [(row.key, *row.values.values(), row.group) for row in rows_of(gettext_catalogues, config)] == [
        ("LC_MESSAGES/a.mo:2", "Open", "Öffnen", "Open"),
        ("LC_MESSAGES/a.mo:3", "Close", "Schließen", "Close"),
        ("LC_MESSAGES/a.mo:4", "one file", "eine Datei", "one file"),
        ("LC_MESSAGES/b.mo:1", "Open", "Öffne", "Open"),
    ]
    with pytest.raises(NotFound, match=r"no file or folder .*xx\. Check data\.path and data\.language"):
        gettext_catalogues.partitions(config.model_copy(update={"language": "xx"}))


def test_what_is_no_catalogue_is_bad(tmp_path: Path) -> None:
    raw = catalogue(MESSAGES)
    unknown = catalogue({"": "Content-Type: text/plain; charset=nonsense\n", "a": "b"})
    wrong = catalogue({"": "Content-Type: text/plain; charset=UTF-8\n", "a": "ä"}, charset="latin1")
    broken = (b"", b"no catalogue, but long enough", raw[:20], raw[:40], raw[:-30], unknown, wrong)
    files = {f"de/LC_MESSAGES/{number}.mo": content for number, content in enumerate(broken)}
    found = read_all(gettext_catalogues, put(tmp_path, files))
    assert len(found) == len(broken) and all(isinstance(row, Bad) for row in found)
    assert [row.reason.split(" ", 3)[:3] for row in found[1:5]] == [
        ["no", "gettext", "catalogue"],
        *[["a", "gettext", "catalogue"]] * 3,
    ]
