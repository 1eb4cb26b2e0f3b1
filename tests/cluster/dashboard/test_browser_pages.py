"""The pages on more than one run in a real browser: complete, quiet, live, and usable by keyboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Plugin
from data_pipelines.build import ensure_dataset
from data_pipelines.storage import Store
from tests.cluster.dashboard.browser import Dashboard, Watch, dashboard
from tests.cluster.dashboard.stores import TAGS, create, metrics, write_run, write_sweep
from trainer.record import RunRecord

pytestmark = pytest.mark.daemon

PAGES = ["/", "/compare", "/compare?runs=aa,bb&x=tokens&calm=1", "/cluster", "/checkpoints", "/datasets", "/sweeps"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def data_set(store: Path) -> str:
    return ensure_dataset(Store(store), Plugin(name="digits"), None).path.rpartition("/")[2]


@pytest.fixture(scope="module")
def live(store: Path) -> Iterator[RunRecord]:
    """A run that this process holds, at step 10 of 100."""
    record = create(store, "live", "steps=100")
    lease = record.acquire_lease()
    record.next_attempt()
    record.event("started", step=0, world_size=2, parameters=10)
    for step in range(1, 11):
        record.metrics(step, metrics(step, 100))
    record.flush()
    yield record
    record.close()
    lease.release()


@pytest.fixture(scope="module")
def server(
    store: Path, data_set: str, live: RunRecord, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dashboard]:
    short: dict[str, Any] = {"steps": 80, "fails_at": 44, "saved_at": 40, "spike_at": 30}
    write_run(store, "aa", **short)
    write_run(store, "bb", **short, overrides=("optimizer.lr=1e-3",))
    write_sweep(store)
    with dashboard(store, tmp_path_factory.mktemp("cache")) as started:
        yield started


def wait_for(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def names(page: Any) -> list[str]:
    """Of the runs in the table, as they stand there."""
    return list(page.locator("table.runs tbody th.name").all_inner_texts())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_complains_or_asks_elsewhere(browser: Any, server: Dashboard, data_set: str, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    watch = Watch(page, server.address)
    for path in [*PAGES, f"/datasets/{data_set}", "/sweeps/lr"]:
        page.goto(server.address + path)
        page.wait_for_timeout(700)
        assert page.title() != "broken out"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is too wide"
    assert (watch.errors, watch.elsewhere) == ([], [])
    context.close()


def test_pages_are_complete_without_scripts(browser: Any, server: Dashboard, data_set: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    for path, text in [("/", "live"), ("/compare?runs=aa,bb", "optimizer.lr"), ("/sweeps/lr", "lr-0002")]:
        page.goto(server.address + path)
        assert text in page.inner_text("main")
    page.goto(f"{server.address}/?search=bb")
    assert names(page) == ["bb"]
    context.close()


def test_the_overview_is_live_and_keeps_what_the_reader_did(page: Any, server: Dashboard, live: RunRecord) -> None:
    page.goto(server.address)
    row = page.locator('tr[data-key="live"]')
    row.locator('input[type="checkbox"]').check()
    page.locator('input[type="search"]').focus()
    assert "10" in row.locator(".step").inner_text()
    live.metrics(20, metrics(20, 100))
    live.flush()
    wait_for(lambda: row.locator(".step").inner_text().startswith("20"))
    assert row.locator('input[type="checkbox"]').is_checked()
    assert page.evaluate("document.activeElement.name") == "search"


def test_a_new_run_appears_by_itself(page: Any, server: Dashboard, store: Path) -> None:
    page.goto(f"{server.address}/?status=queued")
    assert "newcomer" not in names(page)
    create(store, "newcomer").close()
    wait_for(lambda: "newcomer" in names(page))


def test_filters_and_order_are_in_the_address(page: Any, server: Dashboard) -> None:
    page.goto(server.address)
    page.locator('input[type="search"]').fill("finished")
    wait_for(lambda: set(names(page)) >= {"aa", "bb"} and "live" not in names(page))
    assert "search=finished" in page.url
    page.get_by_role("link", name="Run", exact=True).click()
    wait_for(lambda: names(page)[:2] == ["aa", "bb"])
    page.get_by_role("link", name="Run").and_(page.locator("thead a")).click()
    wait_for(lambda: names(page)[0] != "aa")
    assert "sort=run" in page.url
    shown = names(page)
    page.reload()
    assert names(page) == shown


def test_curves_come_as_rows_are_seen(page: Any, server: Dashboard) -> None:
    page.goto(f"{server.address}/?search=aa")
    page.wait_for_selector('[data-sparkline="aa"] polyline')


def test_a_run_that_is_about_to_be_looked_at_is_read_once(page: Any, server: Dashboard) -> None:
    page.goto(f"{server.address}/?search=finished")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(f"{server.address}/api/runs/")))
    page.locator('tr[data-key="aa"] th a').hover()
    wait_for(lambda: "aa" in asked)
    for name in ("aa", "bb"):
        page.get_by_label(f"Compare {name}", exact=True).check()
    wait_for(lambda: {"aa", "bb"} <= set(asked))
    assert (asked.count("aa"), asked.count("bb")) == (1, 1)


def test_ticked_runs_are_compared_by_keyboard(page: Any, server: Dashboard) -> None:
    page.goto(f"{server.address}/?search=finished")
    for name in ("aa", "bb"):
        page.get_by_label(f"Compare {name}", exact=True).focus()
        page.keyboard.press("Space")
    page.locator("#compare").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare?runs=*")
    page.wait_for_selector("#chart canvas")
    assert set(page.url.partition("runs=")[2].split(",")) == {"aa", "bb"}
    page.select_option('select[name="x"]', "compute")
    page.wait_for_url("**x=compute**")
    assert "FLOPs" in page.inner_text("main")


def test_a_spike_is_seen_in_a_comparison(page: Any, store: Path, server: Dashboard) -> None:
    write_run(store, "spiked", steps=4000, fails_at=2200, saved_at=2000, spike_at=3000, spike=60.0)
    page.goto(f"{server.address}/compare?runs=spiked,aa")
    page.wait_for_selector("#chart canvas")
    found = page.locator("#chart").evaluate(
        "({chart}) => [Math.max(...chart.data.slice(1).flat().filter(Number.isFinite)), chart.scales.y.max]"
    )
    assert found[0] == 60.0 <= found[1]


def test_what_is_compared_goes_on_while_a_run_does_and_stays_zoomed(page: Any, store: Path, server: Dashboard) -> None:
    record = create(store, "goes-on", "steps=100")
    lease = record.acquire_lease()
    record.next_attempt()
    record.event("started", step=0, world_size=2, parameters=10)

    def train(first: int, last: int) -> None:
        for step in range(first, last + 1):
            record.metrics(step, metrics(step, 100))
        record.flush()

    def drawn() -> list[Any]:
        """The last step of the run, and the ends of what is seen."""
        last = "chart.data[0].findLast((_, i) => chart.data[1][i] != null)"
        told = f"({{chart}}) => [{last}, chart.scales.x.min, chart.scales.x.max]"
        found: list[Any] = page.locator("#chart").evaluate(told)
        return found

    train(1, 10)
    page.goto(f"{server.address}/compare?runs=goes-on,aa")
    page.wait_for_selector("#chart canvas")
    assert drawn() == [10, 1, 80]
    train(11, 20)
    wait_for(lambda: drawn() == [20, 1, 80])
    assert page.locator(".equal caption").first.is_visible()
    over = page.locator("#chart .u-over").bounding_box()
    page.mouse.move(over["x"] + over["width"] * 0.1, over["y"] + 50)
    page.mouse.down()
    page.mouse.move(over["x"] + over["width"] * 0.3, over["y"] + 50, steps=4)
    page.mouse.up()
    _, low, high = drawn()
    assert 5 < low < 12 and 20 < high < 30
    page.mouse.move(over["x"] + over["width"] * 0.2, over["y"] + 60)
    at = page.inner_text(".legend .at")
    train(21, 30)
    wait_for(lambda: drawn() == [30, low, high])
    assert "at step" in at and page.inner_text(".legend .at") == at  # what is under the pointer
    page.mouse.dblclick(over["x"] + over["width"] * 0.2, over["y"] + 60)
    wait_for(lambda: drawn() == [30, 1, 80])
    train(31, 90)
    record.event("finished", step=90)
    lease.release()
    record.close()
    wait_for(lambda: drawn() == [90, 1, 90])
    wait_for(lambda: page.locator(".legend .badge").first.inner_text().lower() == "finished")
    asked: list[str] = []
    page.wait_for_timeout(4000)
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(4000)
    assert asked == []  # nothing goes on any more


def test_one_run_alone_cannot_be_compared(page: Any, server: Dashboard) -> None:
    page.goto(server.address)
    page.get_by_label("Compare aa", exact=True).check()
    assert page.locator("#compare").is_disabled()


def test_a_sweep_is_drawn_and_its_lines_belong_to_rows(page: Any, server: Dashboard) -> None:
    page.goto(f"{server.address}/sweeps/lr")
    page.wait_for_selector("#lines polyline.best")
    assert page.locator("#lines polyline").count() == 4 and page.locator("#lines polyline.best").count() == 1
    page.locator('tr[data-trial="1"]').hover()
    assert page.locator("#lines polyline.told").get_attribute("data-trial") == "1"
    assert page.locator("tr.best").get_attribute("data-trial") == "2"


def test_examples_turn_pages_with_arrow_keys(page: Any, server: Dashboard, data_set: str) -> None:
    page.goto(f"{server.address}/datasets/{data_set}")
    assert page.locator("article.example img").count() == 5
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth)") is True
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**first=5")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**first=0")


def test_what_the_server_refuses_is_told_beside_the_button(page: Any, server: Dashboard) -> None:
    page.goto(f"{server.address}/checkpoints?run=aa")
    row = page.locator("tr[data-key]").first
    page.route("**/verify", lambda route: route.fulfill(status=500, json={"error": f"no such thing {TAGS}"}))
    row.get_by_role("button", name="Verify").click()
    wait_for(lambda: "no such thing <script>" in row.locator("output").inner_text())
    row.locator("summary").click()
    assert "shardyard runs resume aa" in row.locator("code").inner_text()


def test_times_are_relative_with_the_exact_one_beside(page: Any, server: Dashboard) -> None:
    page.goto(f"{server.address}/?search=aa")
    shown = page.locator('tr[data-key="aa"] time')
    assert shown.inner_text().endswith(" ago") and shown.get_attribute("title").startswith("2026-")


def test_a_narrow_window_is_enough(browser: Any, server: Dashboard) -> None:
    context = browser.new_context(viewport={"width": 420, "height": 800})
    page = context.new_page()
    for path in PAGES:
        page.goto(server.address + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is too wide"
    context.close()
