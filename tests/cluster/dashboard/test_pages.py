"""The pages on more than one run, and the JSON that they are made of."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cluster.dashboard import overview, resources
from cluster.dashboard.app import create_app
from cluster.dashboard.ask_target import slurm_node
from cluster.dashboard.runs import StoreView
from cluster.sweep_folder import Spec, SweepFolder
from configs.load import load
from data_pipelines.storage import Store
from tests.cluster.dashboard import stores
from trainer.record import RunRecord
from trainer.record_rows import RowWriter

PAGES = ["/", "/compare", "/cluster", "/checkpoints", "/datasets", "/sweeps"]
JSON = ["overview", "cluster", "checkpoints", "datasets", "sweeps"]
TAG = "<script>alert(1)</script>"
OUTSIDE = ["..%2f", "..%2f..%2fetc", "%2fetc%2fpasswd", "a%00b", "sweeps", "datasets"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def client(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.chdir(tmp_path)  # without a targets.yaml
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with TestClient(create_app(StoreView(str(store), tmp_path / "cache"))) as client:
        yield client


def run(store: Path, name: str, *overrides: str, **settings: Any) -> RunRecord:
    """A short one, that has restarted once."""
    short = {"steps": 80, "fails_at": 44, "saved_at": 40, "spike_at": 30}
    return stores.write_run(store, name, **(short | settings), overrides=overrides)


def live_run(store: Path, name: str, losses: list[float], **fields: Any) -> RunRecord:
    """One that this process holds, whose last step was just now."""
    record = stores.create(store, name)
    record.acquire_lease()
    record.next_attempt()
    record.event("placed", workers=[{"node": "n1", "gpus": ["0"]}, {"node": "n2", "gpus": ["3"]}])
    record.event("started", step=0, world_size=2, parameters=10)
    for step, loss in enumerate(losses, 1):
        record.metrics(step, stores.metrics(step, 100) | {"loss": loss})
    for kind, values in fields.items():
        record.event(kind, **values)
    record.close()
    return record


def checkpoint(record: RunRecord, step: int, size: int = 100) -> Path:
    """A whole one, but for what is in its files."""
    folder = record.store.local_path(f"checkpoints/step-{step:08d}")
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank-00000-ab-000001.safetensors").write_bytes(bytes(size))
    files = [{"name": "rank-00000-ab-000001.safetensors", "size": size}]
    manifest = {"world_size": 2, "zero_stage": 1, "config": {"precision": "bf16"}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"evaluation": {"loss": 2.5}}))
    return folder


def attention(client: TestClient) -> set[tuple[str, str]]:
    return {(each["run"], each["kind"]) for each in client.get("/api/overview").json()["attention"]}


# --- all pages


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


# --- overview


def test_the_table_sorts_filters_and_searches(client: TestClient, store: Path) -> None:
    run(store, "aa")
    run(store, "bb", "optimizer.lr=1e-3", steps=160)
    stores.create(store, "cc").close()

    def names(query: str) -> list[str]:
        return [row["run"] for row in client.get(f"/api/overview?{query}").json()["runs"]]

    assert names("sort=run&order=up") == ["aa", "bb", "cc"]
    assert names("sort=run&order=down") == ["cc", "bb", "aa"]
    assert names("sort=step&order=down")[:2] == ["bb", "aa"]
    assert names("sort=loss&order=up")[-1] == "cc" and names("sort=loss&order=down")[-1] == "cc"  # it has none
    assert names("status=queued") == ["cc"]
    assert names("search=BB") == ["bb"] and names("search=bb+finished") == ["bb"] and names("search=bb+queued") == []
    assert len(names("sort=no-such-column")) == 3


def test_counts_and_devices_are_of_all_runs(client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, "one")
    live_run(store, "two", [2.0] * 5)
    found = client.get("/api/overview?status=finished").json()
    assert found["counts"] == {"running": 1, "finished": 1} and found["total"] == 2 and len(found["runs"]) == 1
    assert found["devices"]["kind"] == "GPU" and found["devices"]["used"] == 2
    assert 0 <= found["goodput"] <= 1


@pytest.mark.parametrize(
    ("kind", "losses", "events"),
    [
        ("nan", [2.0] * 20 + [math.nan], {}),
        ("spike", [2.0] * 20 + [9.0, 2.0], {}),
        (
            "diverged",
            [2.0],
            {"diverged": {"step": 1, "what": "loss", "value": math.nan, "limit": None, "policy": "skip"}},
        ),
        ("diverged", [2.0], {"diverged": {"step": None, "value": "x"}}),  # as from another version
        ("node", [2.0], {"resized": {"workers_before": 2, "workers": 1}}),
        ("checkpoint", [2.0], {"checkpoint_failed": {"step": 1, "error": "full"}}),
        ("checkpoint", [2.0], {"checkpoint_damaged": {"error": "bits"}}),
        ("restarted", [2.0], {"failed": {"error": "gone", "final": False}}),
        ("data", [2.0], {"data_skipped": {"step": 1, "blocks": [["train", 3]]}}),
    ],
)
def test_what_needs_attention(
    client: TestClient, store: Path, kind: str, losses: list[float], events: dict[str, Any]
) -> None:
    live_run(store, "one", losses, **events)
    assert attention(client) == {("one", kind)}
    assert f'data-kind="{kind}"' in client.get("/").text


def test_a_run_that_fares_well_needs_none(client: TestClient, store: Path) -> None:
    live_run(store, "one", [8.0 * 0.99**step for step in range(60)])
    run(store, "two")
    assert attention(client) == set()


def test_a_silent_run_is_stalled(client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.clock(time.time() - 300):
        live_run(store, "one", [2.0] * 5)
    assert attention(client) == {("one", "stalled")}


def test_a_rank_that_holds_the_others_up_is_named(client: TestClient, store: Path) -> None:
    record = live_run(store, "one", [2.0] * 5)
    for rank in range(3):
        writer = RowWriter(record.store, "ranks", 1, f"rank-{rank:05d}")
        for step in range(10):
            own_s = 0.9 if rank == 1 else 0.5
            values = {"step_s": 1.0, "collective_s": 1.0 - own_s}
            writer.append({"time": time.time(), "attempt": 1, "rank": rank, "step": step, "values": values})
        writer.close()
    assert attention(client) == {("one", "straggler")}
    assert "rank 1 on" in client.get("/").text


def test_a_full_disk_is_told(client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, "one")
    monkeypatch.setattr(overview, "LOW_DISK", 1.1)
    assert (None, "disk") in attention(client)


# --- compare


def test_runs_are_compared_at_equal_cost(client: TestClient, store: Path) -> None:
    run(store, "aa")
    run(store, "bb", "optimizer.lr=1e-3", "batch.global_batch_size=8", steps=160)
    table = client.get("/api/compare/table?runs=aa,bb").json()
    assert {row["key"]: row["values"] for row in table["differences"]} == {
        "batch.global_batch_size": ["4", "8"],
        "optimizer.lr": ["0.003", "0.001"],
        "steps": ["80", "160"],
    }
    parts = {part["axis"]: part for part in table["equal"]}
    assert set(parts) == {"step", "tokens", "time", "compute"}
    assert parts["step"]["rows"][-1]["at"] == 80
    assert parts["tokens"]["rows"][-1]["at"] == 80 * 4 * 256  # where the shorter one ends
    assert parts["compute"]["rows"][-1]["at"] == 6 * 1_234_567 * 80 * 4 * 256
    mean = np.mean([stores.metrics(step, 80, 2)["loss"] for step in range(61, 81)])
    assert parts["step"]["rows"][-1]["values"][0] == pytest.approx(mean)
    curves = client.get("/api/compare?runs=aa,bb&x=time").json()["runs"]
    assert [curve["x"][0] for curve in curves] == [0, 0] and all(np.diff(curves[0]["x"]) > 0)
    assert "optimizer.lr" in client.get("/compare?runs=aa,bb&x=tokens").text


@pytest.mark.parametrize(
    ("runs", "said"), [("one", "Between 2 and 8"), (",".join("abcdefghi"), "Between 2 and 8"), ("one,no", "no run")]
)
def test_what_cannot_be_compared_is_explained(client: TestClient, store: Path, runs: str, said: str) -> None:
    run(store, "one")
    assert said in unescape(client.get(f"/compare?runs={runs}").text)
    assert said in client.get(f"/api/compare?runs={runs}").json()["error"]


def test_ticks_of_a_form_become_an_address(client: TestClient, store: Path) -> None:
    answer = client.get("/compare?run=a&run=b", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/compare?runs=a,b")


def test_runs_without_a_common_metric_have_no_table(client: TestClient, store: Path) -> None:
    run(store, "one")
    stores.create(store, "two").close()
    assert client.get("/api/compare/table?runs=one,two").json()["equal"] == []
    assert client.get("/compare?runs=one,two").status_code == 200


# --- cluster


def test_a_store_alone_tells_where_runs_were(client: TestClient, store: Path) -> None:
    run(store, "one")
    record = stores.create(store, "alone")  # as by torchrun
    record.next_attempt()
    record.event("started", step=0, world_size=3)
    record.event("finished", step=1)
    record.close()
    found = {row["run"]: row for row in client.get("/api/cluster").json()["placements"]}
    assert found["one"]["nodes"] == {"n1": 1, "n2": 1} and found["one"]["target"] == "local"
    assert sum(found["alone"]["nodes"].values()) == 3 and "?" not in found["alone"]["nodes"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lab: {type: ray, address: 'http://127.0.0.1:9'}", "No Ray dashboard answers"),
        ("lab: {type: rey}", "no type of target"),
    ],
)
def test_a_target_that_does_not_answer_shows_why(client: TestClient, text: str, said: str) -> None:
    Path("targets.yaml").write_text(text)
    deadline = time.monotonic() + 30
    while said not in (page := client.get("/cluster").text):
        assert time.monotonic() < deadline, page
        time.sleep(0.2)


def test_a_target_that_hangs_costs_the_page_three_seconds(
    client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("targets.yaml").write_text("lab: {type: ray, address: 'http://127.0.0.1:9'}\nhpc: {type: slurm}")
    released = []
    monkeypatch.setattr(resources, "PATIENCE_S", 0.3)
    monkeypatch.setattr(resources, "_question", _hangs(released))
    started = time.monotonic()
    page = client.get("/cluster").text
    assert time.monotonic() - started < 2 and page.count("It has not answered yet.") == 2
    client.get("/cluster")
    released.append(True)
    deadline = time.monotonic() + 10
    while "said at last" not in client.get("/cluster").text:
        assert time.monotonic() < deadline


def _hangs(released: list[bool]) -> Callable[[str], dict[str, Any]]:
    asked = []

    def question(name: str) -> dict[str, Any]:
        assert name not in asked or released, "a target that hangs is not asked again"
        asked.append(name)
        while not released:
            time.sleep(0.01)
        return {"answered_at": time.time(), "jobs": [], "nodes": None, "error": "said at last"}

    return question


def test_a_queue_is_shown_with_places_and_reasons(
    client: TestClient, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("targets.yaml").write_text("hpc: {type: slurm}")
    run(store, "one")
    job = {"job": "7", "run": "one", "user": "ada", "state": "waiting", "asks": "2 nodes", "why": f"busy {TAG}"}
    job |= {"position": 3, "priority": 5, "submitted_at": time.time() - 90, "may_start": time.time() + 3600}
    node = {"node": "n1", "state": "mix", "cpus": 64, "used_cpus": 32, "gpus": 8, "used_gpus": 2}
    node |= {"memory_bytes": 1 << 39, "used_bytes": 1 << 38}
    answer = {"answered_at": time.time(), "jobs": [job], "nodes": [node], "error": None}
    monkeypatch.setattr(resources, "_question", lambda name: answer)
    live_run(store, "two", [2.0] * 3)  # on n1 and n2
    page = client.get("/cluster").text
    assert 'href="/runs/two"' in page[page.index('data-key="n1"') :].partition("</tr>")[0]
    for text in ("2 nodes", "busy &lt;script&gt;", "in 59m", "256 GiB", "1m 30s ago", "/runs/one"):
        assert text in page


def test_nodes_of_slurm_are_read() -> None:
    cells = ["n1", "mix", "32/30/2/64", "512000", "N/A", "gpu:h100:8(S:0-1),shard:16", "gpu:h100:3(IDX:0-2),shard:0"]
    line = "".join(cell.ljust(width) for cell, width in zip(cells, (200, 30, 60, 30, 30, 200, 200), strict=True))
    node = slurm_node(line)
    assert (node["node"], node["used_cpus"], node["cpus"], node["used_gpus"], node["gpus"]) == ("n1", 32, 64, 3, 8)
    assert (node["memory_bytes"], node["used_bytes"]) == (512000 << 20, None)


# --- checkpoints


def test_checkpoints_tell_how_they_were_written_and_whether_they_are_whole(client: TestClient, store: Path) -> None:
    record = stores.create(store, "one", "name=one")
    record.next_attempt()
    for step in (10, 20, 30, 40, 50):
        checkpoint(record, step)
        record.event("checkpoint", step=step, size_bytes=100, stall_s=0.01, write_s=0.5)
    (checkpoint(record, 10) / "rank-00000-ab-000001.safetensors").write_bytes(b"cut")
    (checkpoint(record, 20) / "manifest.json").write_text("{")
    (checkpoint(record, 30) / "manifest.json").unlink()
    (checkpoint(record, 40) / "manifest.json").write_text(
        (checkpoint(record, 40) / "manifest.json").read_text().replace("rank-00000", "../../run.yaml/rank")
    )
    record.close()
    rows = {row["step"]: row for row in client.get("/api/checkpoints?run=one").json()}
    assert {step: row["state"] for step, row in rows.items()} == {
        10: "damaged", 20: "damaged", 30: "unfinished", 40: "damaged", 50: "whole",
    }  # fmt: skip
    whole = rows[50]
    assert (whole["world_size"], whole["zero_stage"], whole["precision"], whole["size_bytes"]) == (2, 1, "bf16", 100)
    assert (whole["stall_s"], whole["write_s"], whole["evaluation"]) == (0.01, 0.5, {"loss": 2.5})
    assert whole["command"] == f"shardyard runs resume one --store {store}"
    assert "--from one@10 --branch" in rows[10]["command"]
    page = client.get("/checkpoints?run=one").text
    assert "/api/runs/one/checkpoints/50/verify" in page and "/api/runs/one/checkpoints/50/export" in page
    assert client.get("/checkpoints?run=none").status_code == 404


def test_what_goes_on_from_a_checkpoint_has_verified_it(client: TestClient, store: Path) -> None:
    record = stores.create(store, "one")
    record.next_attempt()
    for step in (10, 20, 30):
        checkpoint(record, step)
        record.event("checkpoint", step=step)
    record.event("started", step=20)
    record.event(
        "checkpoint_damaged", error=f"Checkpoint {record.store.path('checkpoints/step-00000030')} is skipped: bits"
    )

    def states() -> dict[int, str]:
        return {row["step"]: row["state"] for row in client.get("/api/checkpoints").json()}

    assert states() == {10: "whole", 20: "verified", 30: "damaged"}
    record.event("checkpoint_verified", step=10, damage=[])
    record.event("checkpoint_verified", step=20, damage=["a block fails its digest"])
    record.event("checkpoint", step=30)  # saved anew
    record.close()
    assert states() == {10: "verified", 20: "damaged", 30: "whole"}


# --- data sets


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


# --- sweeps


def test_a_sweep_tells_its_trials_the_best_first(client: TestClient, store: Path) -> None:
    base = load(stores.RECIPE, [f"store={store}", "name=base", "steps=100", "tracking.mlflow=null"])
    trials = [{"optimizer.lr": lr} for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    spec = Spec("grid", ["optimizer.lr=1e-3,2e-3,3e-3,4e-3"], "validation/loss", "min", 0, trials)
    folder = SweepFolder.create(Store(store), "lr", spec, base)
    for number, values in ((1, [3.0, 2.5]), (2, [3.0, 2.0]), (3, [1.0, math.nan])):
        record = folder.create_run(folder.trial(number))
        record.next_attempt()
        for step, value in enumerate(values, 1):
            record.metrics(step, {"validation/loss": value})
        record.event("finished", step=2)
        record.close()
    folder.fail_trial(4, TAG)
    (store / "sweeps" / "bad").mkdir()
    (store / "sweeps" / "bad" / "sweep.json").write_text("{")
    found = client.get("/api/sweeps/lr").json()
    assert [(row["trial"], row["value"]) for row in found["trials"]] == [(2, 2.0), (1, 2.5), (3, None), (4, None)]
    assert found["best"]["run"] == "lr-0002" and found["counts"] == {"finished": 3, "failed": 1}
    page = client.get("/sweeps/lr").text
    assert "lr-0002" in page and TAG not in page and "shardyard sweep --resume lr" in page
    assert "bad" in client.get("/sweeps").text
