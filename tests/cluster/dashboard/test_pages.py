"""What holds for all pages on more than one run, and for the JSON that they are made of."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.cluster.dashboard.page_store import TAG, live_run, run

PAGES = ["/", "/compare", "/cluster", "/checkpoints", "/datasets", "/sweeps"]
JSON = ["overview", "cluster", "checkpoints", "datasets", "sweeps"]
OUTSIDE = ["..%2f", "..%2f..%2fetc", "%2fetc%2fpasswd", "a%00b", "sweeps", "datasets"]


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_store_says_what_to_do(client: TestClient, page: str) -> None:
    answer = client.get(page)
    assert answer.status_code == 200
    assert page == "/cluster" or "shardyard " in answer.text or "checkpoint.every" in answer.text


def test_an_empty_store_greets_with_the_command_to_type(client: TestClient, store: Path) -> None:
    assert f"shardyard train language_modeling-gpt-tiny store={store}" in client.get("/").text


@pytest.mark.parametrize("page", PAGES)
def test_what_runs_say_is_never_markup(client: TestClient, store: Path, page: str) -> None:
    record = live_run(store, "one", [2.0] * 20, failed={"error": TAG, "summary": TAG}, checkpoint_failed={"error": TAG})
    record.event("submitted", target=TAG)
    run(store, "two", f"tracking.experiment={json.dumps(TAG)}")
    (store / TAG.replace("/", "")).mkdir()
    (store / TAG.replace("/", "") / "run.yaml").write_text(TAG)
    (store / "sweeps" / "<script>").mkdir(parents=True)
    (store / "datasets" / "<script>").mkdir(parents=True)
    address = (
        f"{page}?runs=one,two&metric={TAG}&search={TAG}&status={TAG}&run=&log={TAG}" if "check" not in page else page
    )
    answer = client.get(address)
    assert answer.status_code == 200
    assert "<script>" not in answer.text and "<script>" in unescape(answer.text)


@pytest.mark.parametrize("page", PAGES)
def test_a_damaged_run_hides_no_other(client: TestClient, store: Path, page: str) -> None:
    run(store, "good")
    (store / "broken").mkdir(parents=True)
    (store / "broken" / "run.yaml").write_text("name: [")
    answer = client.get(page)
    assert answer.status_code == 200 and ("good" in answer.text or page in {"/datasets", "/sweeps"})
    for path in JSON:
        assert client.get(f"/api/{path}").status_code == 200


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    "path", ["/datasets/{}", "/sweeps/{}", "/checkpoints?run={}", "/api/sweeps/{}", "/api/checkpoints?run={}"]
)
def test_a_name_leads_nowhere_else(client: TestClient, store: Path, path: str, name: str) -> None:
    run(store, "one")
    (store.parent / "run.yaml").write_text((store / "one" / "run.yaml").read_text())
    (store.parent / "index.json").write_text("{}")
    (store.parent / "sweep.json").write_text("{}")
    answer = client.get(path.format(name), follow_redirects=False)  # 307: to the name without its slash
    assert answer.status_code in {307, 400, 404}, answer.text


def test_an_error_is_a_page_for_people_and_json_for_programs(client: TestClient) -> None:
    assert "There is no sweep" in client.get("/sweeps/none").text
    assert client.get("/api/sweeps/none").json()["error"].startswith("There is no sweep 'none'")
    assert "text/html" in client.get("/sweeps/none").headers["content-type"]
