"""Data sets and their examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from data_pipelines.storage import Store
from tests.cluster.dashboard.page_store import run


@pytest.fixture
def data_set(store: Path) -> str:
    from configs.schema import Plugin
    from data_pipelines.build import ensure_dataset

    found = ensure_dataset(Store(store), Plugin(name="digits"), None)
    return found.path.rpartition("/")[2]


def test_data_sets_and_their_examples_by_number(client: TestClient, store: Path, data_set: str) -> None:
    record = run(store, "reader")
    record.write_datasets([data_set])
    (store / "datasets" / "unfinished").mkdir()
    found = {row["name"]: row for row in client.get("/api/datasets").json()}
    assert found[data_set]["runs"] == ["reader"] and len(found[data_set]["fingerprint"]) == 32
    assert "no index" in found["unfinished"]["error"]
    rows = found[data_set]["splits"]["train"]["rows"]
    page = client.get(f"/datasets/{data_set}?split=train&first={rows - 1}").text
    assert f"{rows - 1:,}</h3>" in page and 'rel="prev"' in page and 'rel="next"' not in page
    assert client.get(f"/datasets/{data_set}?first=999999999").status_code == 200
    assert client.get(f"/datasets/{data_set}?first=-5").status_code == 200
    assert client.get(f"/datasets/{data_set}?split=none").status_code == 404
    examples = client.get(f"/api/datasets/{data_set}/examples?split=train&first=3&count=2").json()
    assert [example["number"] for example in examples] == [3, 4] and "label" in examples[0]["values"]
    picture = client.get(f"/api/datasets/{data_set}/picture?split=train&number=3&column=image")
    assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")
    for query in (
        "split=train&number=3&column=label",
        "split=train&number=-1&column=image",
        "split=no&number=0&column=x",
    ):
        assert client.get(f"/api/datasets/{data_set}/picture?{query}").status_code == 404


def test_a_damaged_data_set_hides_no_other(client: TestClient, store: Path, data_set: str) -> None:
    (store / "datasets" / "bad").mkdir()
    (store / "datasets" / "bad" / "index.json").write_text("{")
    for shard in (store / "datasets" / data_set).glob("train-*.arrow"):
        shard.write_bytes(b"x")
    page = client.get("/datasets").text
    assert data_set in page and "bad" in page
    assert 'role="alert"' in client.get(f"/datasets/{data_set}?split=train").text
    assert client.get("/datasets/bad").status_code in {404, 500}
