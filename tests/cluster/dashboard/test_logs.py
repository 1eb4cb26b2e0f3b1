"""Pieces of logs, against the whole of them; and paths that must not lead out of a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.dashboard import logs
from cluster.dashboard.app import create_app
from cluster.dashboard.store_view import StoreView
from configs.errors import NotFound
from data_pipelines.storage import Store
from tests.cluster.dashboard.stores import write_run


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store(tmp_path / "store" / "run")


def write(run: Store, data: bytes, attempt: int = 1, rank: int = 0) -> None:
    run.write_atomic(f"attempts/{attempt:04d}/rank-{rank:05d}.log", data)


def texts(piece: dict[str, Any]) -> list[str]:
    return [line["text"] for line in piece["lines"]]


@pytest.mark.parametrize("limit", [1, 7, 64, 1000, 10**6])
def test_pieces_forwards_and_backwards_are_the_whole(run: Store, limit: int) -> None:
    rng = random.Random(limit)
    whole = ["x" * rng.randrange(0, min(limit, 40)) + str(number) for number in range(200)]
    data = "".join(line + "\n" for line in whole).encode()
    write(run, data)

    found, place = [], 0
    while place < len(data):
        piece = logs.piece(run, 1, 0, start=place, stop=None, limit=max(limit, 64))
        assert piece["start"] == place < piece["stop"] and piece["size_bytes"] == len(data)
        found += texts(piece)
        place = piece["stop"]
    assert found == whole

    found, stop = [], None
    while stop != 0:
        piece = logs.piece(run, 1, 0, start=None, stop=stop, limit=max(limit, 64))
        assert piece["start"] < piece["stop"] == (len(data) if stop is None else stop)
        found = texts(piece) + found
        stop = piece["start"]
    assert found == whole
    assert all(data[line["place"] :].startswith(line["text"].encode()) for line in piece["lines"])


def test_a_line_without_an_end_is_shown_and_read_again_when_it_has_grown(run: Store) -> None:
    write(run, b"one\ntwo")
    piece = logs.piece(run, 1, 0, start=0, stop=None, limit=100)
    assert (texts(piece), piece["stop"]) == (["one", "two"], 4)
    write(run, b"one\ntwo and more\n")
    piece = logs.piece(run, 1, 0, start=piece["stop"], stop=None, limit=100)
    assert (texts(piece), piece["stop"]) == (["two and more"], 17)


def test_a_line_longer_than_a_piece_hinders_nobody(run: Store) -> None:
    write(run, b"a" * 1000 + b"\nend\n")
    place, reads = 0, 0
    while place < 1005:
        place = logs.piece(run, 1, 0, start=place, stop=None, limit=64)["stop"]
        reads += 1
    assert reads < 30
    stop, reads = 1005, 0
    while stop:
        stop = logs.piece(run, 1, 0, start=None, stop=stop, limit=64)["start"]
        reads += 1
    assert reads < 30
    shown = logs.piece(run, 1, 0, start=0, stop=None, limit=10**6)["lines"][0]["text"]
    assert len(shown) == 1000
    write(run, b"a" * 100_000)
    assert len(logs.piece(run, 1, 0, start=0, stop=None, limit=10**6)["lines"][0]["text"]) < 5000


def test_words_to_a_terminal_are_left_out(run: Store) -> None:
    write(run, b"\x1b[31mred\x1b[0m\n 10%\r 50%\r100%\nold\r\n\xff\n")
    assert texts(logs.piece(run, 1, 0, start=0, stop=None, limit=100)) == ["red", "100%", "old", "\ufffd"]


def test_a_search_finds_what_a_reader_of_the_whole_finds(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(logs, "_SEARCHED_BYTES", 350)
    monkeypatch.setattr(logs, "MOST_HITS", 3)
    rng = random.Random(0)
    whole = ["".join(rng.choice("abAB ") for _ in range(rng.randrange(60))) for _ in range(300)]
    write(run, "\n".join(whole).encode())
    for wanted in ("ab", "aab", "baba", "no such"):
        found, place, requests = [], 0, 0
        while place is not None:
            part = logs.search(run, 1, 0, wanted, start=place)
            assert len(part["lines"]) <= 3
            found += texts(part)
            place, requests = part["next"], requests + 1
        assert found == [line for line in whole if wanted in line.lower()]
        assert requests > 10


def test_a_large_log_is_not_read_as_a_whole(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.local_path("attempts/0001/rank-00000.log")
    assert path is not None
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a tebibyte of nothing
        file.seek(0, 2)
        file.write(b"\nthe end\n")
    read: list[int] = []
    monkeypatch.setattr(logs, "_read", _counting(read))
    piece = logs.piece(run, 1, 0, start=None, stop=None, limit=1000)
    assert texts(piece)[-1] == "the end" and sum(read) < 2000
    assert logs.search(run, 1, 0, "the end", start=0)["next"] == logs._SEARCHED_BYTES
    assert sum(read) < logs._SEARCHED_BYTES + 3000


def _counting(read: list[int]) -> Any:
    original = logs._read

    def counted(*arguments: Any) -> bytes:
        data = original(*arguments)
        read.append(len(data))
        return data

    return counted


def test_a_link_that_leads_elsewhere_is_not_followed(run: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    path = run.local_path("attempts/0001/rank-00000.log")
    assert path is not None
    path.parent.mkdir(parents=True)
    path.symlink_to(secret)
    with pytest.raises(NotFound):
        logs.piece(run, 1, 0, start=0, stop=None, limit=100)
    with pytest.raises(NotFound):
        logs.search(run, 1, 0, "secret", start=0)


def test_over_http(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", steps=80, fails_at=44, saved_at=40, spike_at=50)
    client = TestClient(create_app(StoreView(str(tmp_path / "runs"), tmp_path / "cache")))
    base = "/api/runs/restarted/logs"

    index = client.get(f"{base}/index").json()
    assert [(log["attempt"], log["rank"]) for log in index["logs"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    (failure,) = index["failures"]
    assert (failure["attempt"], failure["rank"]) == (1, 1)
    around = client.get(base, params={"attempt": 1, "rank": 1, "offset": failure["place"]}).json()
    assert around["lines"][0]["text"] == "Traceback (most recent call last):"

    found = client.get(f"{base}/search", params={"attempt": 2, "rank": 0, "text": "LINE 777 "}).json()
    assert texts(found) == ["rank 0 line 777 of attempt 2"] and found["next"] is None

    assert client.get(base, params={"attempt": 3, "rank": 0}).status_code == 404
    for wrong in ({"attempt": "../1", "rank": 0}, {"attempt": 1, "rank": "../../x"}, {"attempt": -1, "rank": 0}):
        assert client.get(base, params=wrong).status_code == 422
    assert client.get(base, params={"attempt": 1, "rank": 0, "limit": 1 << 30}).status_code == 422
    assert client.get("/api/runs/..%2Fx/logs", params={"attempt": 1, "rank": 0}).status_code == 404
