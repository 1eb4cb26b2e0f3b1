"""The page of a run in a real browser."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.dashboard.browser import PARTS, Dashboard, Watch, chart, dashboard, drawn, until, visit
from tests.cluster.dashboard.stores import TAGS, clock, metrics, write_run
from tests.cluster.dashboard.test_step_examples import PICTURES
from tests.tiny import tiny_config
from tests.trainer.attempts import launched
from trainer.record import RunRecord
from trainer.step_examples import step_examples

pytestmark = pytest.mark.daemon

SPIKE_AT, SPIKE = 1234, 40.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    write_run(store, spike_at=SPIKE_AT, spike=SPIKE)
    with dashboard(store, tmp_path_factory.mktemp("cache")) as started:
        yield started


def ink(of: Any, x: float, y: float) -> int:
    """Pixels that are drawn on within three of a place of a chart, of the band's colour or of the line's."""
    found: int = of.evaluate(
        """({chart}, [x, y]) => {
            const {plot} = chart;
            const [left, top] = [plot.valToPos(x, "x", true), plot.valToPos(y, "y", true)].map(Math.round);
            const {data} = plot.ctx.getImageData(left - 3, top - 3, 7, 7);
            let inked = 0;
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 40 && data[i + 2] - data[i] > 60) inked++;
            return inked;
        }""",
        [x, y],
    )
    return found


def test_no_part_of_it_errs_or_asks_anybody_else(server: Dashboard, page: Any) -> None:
    watch = Watch(page, server.address)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for part in PARTS:
            visit(page, f"{server.address}/runs/restarted#{part}")
            page.wait_for_selector(f"#{part}:not([hidden])")
            page.wait_for_load_state("load")
            until(page, "document.getElementById('connection').dataset.state === 'live'")
            page.mouse.wheel(0, 3000)
            page.wait_for_timeout(300)
            assert page.locator(f"#{part}").inner_text().strip()
    assert watch.errors == [] and watch.elsewhere == []


@pytest.mark.parametrize(
    "chosen", ["", "log=1&", "smooth=20&", "smooth=2000&log=1&", "x=tokens&", "x=time&smooth=500&"]
)
@pytest.mark.parametrize("zoom", [None, (900, 1600), (1200, 1260), (1233, 1235)])
def test_a_spike_of_one_step_is_seen(
    server: Dashboard, page: Any, chosen: str, zoom: tuple[int, int] | None, store: Path
) -> None:
    rows = RunRecord.open(str(store), "restarted").metrics_table()
    when = {row["step"]: row["time"] for row in rows if "loss" in row}
    tokens = 256 * 4  # task.seq_len and batch.global_batch_size of the recipe
    place = {"x=tokens": lambda step: step * tokens, "x=time": lambda step: when[step]}.get(
        chosen[:-1].partition("&")[0], float
    )
    given = "" if zoom is None else f"from={place(zoom[0])}&to={place(zoom[1])}"
    page.goto(f"{server.address}/runs/restarted#curves?{chosen}{given}")
    loss = chart(page, "loss")
    page.wait_for_timeout(100)  # a frame
    found = drawn(loss)
    assert max(value for value in found["max"] if value is not None) == SPIKE
    assert found["low"] < SPIKE <= found["high"] and all(found["shown"])
    at = found["x"][found["max"].index(SPIKE)]
    assert found["from"] <= at <= found["to"]
    assert ink(loss, at, SPIKE) > 0
    assert ink(loss, found["from"] + 0.02 * (found["to"] - found["from"]), SPIKE) == 0  # it is not ink everywhere
    if zoom == (1233, 1235):
        assert found["x"].count(at) == 1 and len(found["x"]) <= 5  # at full detail, with a neighbour on each side


def test_curves_are_asked_for_in_their_order_and_few_at_a_time(server: Dashboard, page: Any) -> None:
    asked: list[str] = []
    together = [0, 0]  # now, and at most

    def begin(request: Any) -> None:
        if "/series?" in request.url:
            asked.append(request.url.partition("metric=")[2].partition("&")[0])
            together[0] += 1
            together[1] = max(together)

    def end(request: Any) -> None:
        together[0] -= "/series?" in request.url

    page.on("request", begin)
    page.on("requestfinished", end)
    page.goto(f"{server.address}/runs/restarted")
    chart(page, "grad_norm")
    until(page, "[...document.querySelectorAll('.chart')].filter((each) => each.dataset.state === 'shown').length > 3")
    assert asked[0] == "loss" and len(asked) > 3 and together[1] <= 2


def test_dragging_fetches_the_range_at_full_detail_and_a_double_click_takes_it_back(
    server: Dashboard, page: Any
) -> None:
    page.goto(f"{server.address}/runs/restarted")
    loss = chart(page, "loss")
    assert len(drawn(loss)["x"]) < 1000
    box = loss.locator(".u-over").bounding_box()
    left, middle = (box["x"] + share * box["width"] for share in (0.60, 0.64))
    page.mouse.move(left, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(middle, box["y"] + 50, steps=4)
    page.mouse.up()
    until(page, "location.hash.includes('from=')")
    until(page, "chart => chart.chart.curve.count.every((each) => each === 1)", loss.element_handle())
    found = drawn(loss)
    assert 1150 < found["from"] < found["to"] < 1320
    assert found["x"][1:-1] == list(range(int(found["x"][1]), int(found["x"][-1])))  # every step of it
    other = drawn(chart(page, "lr"))
    assert (other["from"], other["to"]) == (found["from"], found["to"])

    again = page.url
    page.mouse.dblclick(left, box["y"] + 50)
    until(page, "!location.hash.includes('from=')")
    until(page, "chart => chart.chart.plot.scales.x.max === 2000", loss.element_handle())

    visit(page, again)  # the address brings it back
    assert drawn(chart(page, "loss"))["from"] == found["from"]


def test_a_restart_and_what_it_took_back(server: Dashboard, page: Any) -> None:
    page.goto(f"{server.address}/runs/restarted")
    loss = chart(page, "loss")
    mark = loss.locator(".mark")
    assert mark.count() == 1
    assert mark.get_attribute("title").startswith("Attempt 2 after: Rank 1 on n2 failed after step 1100")
    superseded = loss.evaluate("({chart}) => chart.superseded.map(([x]) => x)")
    assert min(superseded) == 1001 and max(superseded) == 1100
    bad = chart(page, "grad_norm").evaluate("({chart}) => chart.curve.bad.reduce((sum, each) => sum + each, 0)")
    assert bad == 10


def test_ticks_tell_where_they_are(server: Dashboard, page: Any) -> None:
    page.goto(f"{server.address}/runs/restarted")
    ticks = [9000, 10000, 12250, 12485, 1.5e6, 1204000, 2e9, 0.25]
    found = page.evaluate("async (ticks) => ticks.map((await import('/static/common.js')).short)", ticks)
    assert found == ["9,000", "10k", "12.25k", "12.485k", "1.5M", "1.204M", "2B", "0.25"]


def test_a_chart_has_its_numbers(server: Dashboard, page: Any) -> None:
    page.goto(f"{server.address}/runs/restarted#curves?from=1230&to=1240")
    loss = chart(page, "loss")
    loss.get_by_role("button", name="Numbers of loss").click()
    rows = loss.locator("tbody tr").all_inner_texts()
    assert any(row.split("\t")[0] == "1,234" and row.split("\t")[3] == "40" for row in rows)
    assert loss.locator(".drawing").is_hidden()
    loss.get_by_role("button", name="Numbers of loss").click()
    assert loss.locator(".drawing").is_visible()


def test_what_looks_like_html_is_shown_as_text(server: Dashboard, page: Any) -> None:
    watch = Watch(page, server.address)
    for part in PARTS:
        visit(page, f"{server.address}/runs/restarted#{part}{'?attempt=1&rank=1' if part == 'logs' else ''}")
        page.wait_for_selector(f"#{part}:not([hidden])")
        if part not in {"data", "speed"}:
            until(page, "([part, tags]) => document.getElementById(part).textContent.includes(tags)", [part, TAGS])
        assert page.title() == "restarted - Shardyard"
        assert page.locator("main script, main img[src='x']").count() == 0
    assert watch.errors == [] and watch.elsewhere == []


def test_everything_is_reached_by_keyboard(server: Dashboard, page: Any) -> None:
    page.goto(f"{server.address}/runs/restarted")
    page.wait_for_selector("#curves:not([hidden])")
    page.locator("#tab-curves").focus()
    for part in (*PARTS[1:], PARTS[0]):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"#{part}:not([hidden])")
        assert page.evaluate("document.activeElement.id") == f"tab-{part}"
        assert page.url.endswith(f"#{part}") or f"#{part}?" in page.url
    drawing = chart(page, "loss").locator(".drawing")
    drawing.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert "step" in chart(page, "loss").locator(".values").inner_text()


def test_logs(server: Dashboard, page: Any) -> None:
    page.goto(f"{server.address}/runs/restarted#logs?attempt=1&rank=0")
    log = page.get_by_role("log")
    log.get_by_text("rank 0 line 2999 of attempt 1", exact=True).wait_for()
    page.get_by_text("First failure of attempt 1").wait_for()
    page.get_by_role("button", name="Show in its log").click()
    log.get_by_text("Traceback (most recent call last):").wait_for()
    assert log.locator(".line").first.inner_text().startswith("Traceback")

    page.get_by_label("Search this log").fill("LINE 1234")
    page.keyboard.press("Enter")
    log.get_by_text("rank 1 line 1234 of attempt 1").wait_for()
    assert log.locator(".line").count() == 1
    log.get_by_role("button", name=re.compile(r"^[\d,]+$")).click()
    log.get_by_text("rank 1 line 1235 of attempt 1", exact=True).wait_for()


def test_a_log_without_a_line_says_so(server: Dashboard, page: Any, store: Path) -> None:
    record = write_run(store, "silent", steps=80, fails_at=44, saved_at=40, spike_at=50)
    path = record.store.local_path("attempts/0002/rank-00000.log")
    assert path is not None
    path.write_text("")
    page.goto(f"{server.address}/runs/silent#logs?attempt=2&rank=0")
    page.get_by_text("This worker has printed nothing yet.").wait_for()
    path.write_text("at last\n")
    page.get_by_role("log").get_by_text("at last", exact=True).wait_for()
    assert page.get_by_text("This worker has printed nothing yet.").count() == 0


def test_logs_are_followed(server: Dashboard, page: Any, store: Path) -> None:
    record = write_run(store, "talks", steps=80, fails_at=44, saved_at=40, spike_at=50, ended=False)
    page.goto(f"{server.address}/runs/talks#logs")
    page.get_by_role("log").get_by_text("rank 0 line 2999 of attempt 2", exact=True).wait_for()
    path = record.store.local_path("attempts/0002/rank-00000.log")
    assert path is not None
    with path.open("a") as file:
        file.write("one more\nand half of")
        file.flush()
        page.get_by_text("one more", exact=True).wait_for()
        page.get_by_text("and half of", exact=True).wait_for()
        file.write(" another\n")
    page.get_by_text("and half of another", exact=True).wait_for()
    assert page.get_by_text("and half of", exact=True).count() == 0


def test_rows_come_by_themselves_also_after_the_server_was_away(tmp_path: Path, browser: Any, page: Any) -> None:
    record = write_run(tmp_path / "store", "live", steps=2000, fails_at=100, saved_at=50, spike_at=1, ended=False)
    # As if it had come no further than this: its record is cut, and goes on.
    record = RunRecord.open(str(tmp_path / "store"), "live")
    record.attempt = 3
    write = _Writer(record, first=2001)
    watch = Watch(page, "")
    with dashboard(tmp_path / "store", tmp_path / "cache") as server:
        page.goto(f"{server.address}/runs/live#curves?smooth=20")
        loss = chart(page, "loss")
        until(page, "document.getElementById('connection').dataset.state === 'live'")
        write.rows(1)
        reached = "([chart, step]) => chart.chart.curve.x.at(-1) === step"
        until(page, reached, [loss.element_handle(), write.step])
        page.wait_for_timeout(1500)  # what the new attempt has changed is fetched
        fetched = len(watch.series)
        for _ in range(3):
            write.rows(5)
            until(page, reached, [loss.element_handle(), write.step])
        found = drawn(loss)
        assert found["x"][-15:] == list(range(write.step - 14, write.step + 1))
        assert found["max"][-15:] == pytest.approx(write.losses[-15:])
        assert found["line"][-1] == pytest.approx(sum(write.losses[-16:]) / 20 + 4 * found["line"][-17] / 20, rel=0.2)
        assert found["to"] == write.step
        assert page.locator("#loss").inner_text() == f"{write.losses[-1]:.4g}"
        assert len(watch.series) == fetched  # they came with the stream

        server.stop()
        until(page, "document.getElementById('connection').dataset.state === 'lost'")
        write.rows(7)
        server.start()
        until(page, reached, [loss.element_handle(), write.step])
        until(page, "document.getElementById('connection').dataset.state === 'live'")
        assert drawn(loss)["x"][-22:] == list(range(write.step - 21, write.step + 1))  # nothing is lost, nothing twice
    record.close()


def test_what_comes_before_a_late_stream_is_not_missed(tmp_path: Path, page: Any) -> None:
    write_run(tmp_path / "store", "late", steps=200, fails_at=100, saved_at=50, spike_at=1, ended=False)
    record = RunRecord.open(str(tmp_path / "store"), "late")
    record.attempt = 2
    write = _Writer(record, first=201)
    held: list[Any] = []
    page.route(re.compile("/stream$"), lambda route: held.append(route))
    with dashboard(tmp_path / "store", tmp_path / "cache") as server:
        page.goto(f"{server.address}/runs/late")
        loss = chart(page, "loss")
        write.rows(5)
        held[0].continue_()
        until(page, "([chart, step]) => chart.chart.curve.x.at(-1) === step", [loss.element_handle(), write.step])
        assert drawn(loss)["x"][-6:] == list(range(200, 206))
    record.close()


class _Writer:
    """Rows of steps that follow each other."""

    def __init__(self, record: RunRecord, first: int) -> None:
        self._record = record
        self.step = first - 1
        self.losses: list[float] = []

    def rows(self, number: int) -> None:
        """Write some; they are on disk when it returns."""
        with clock(time.time()):
            for _ in range(number):
                self.step += 1
                values = metrics(self.step, 3000)
                self.losses.append(values["loss"])
                self._record.metrics(self.step, values)
        self._record.flush()


def test_stopping_asks_first_and_answers_are_shown(server: Dashboard, page: Any, store: Path) -> None:
    record = write_run(store, "asked", steps=80, fails_at=44, saved_at=40, spike_at=50, ended=False)
    tokens = []

    def answer(route: Any) -> None:
        tokens.append(route.request.headers.get("x-shardyard-token"))
        if route.request.url.endswith("/stop"):
            route.fulfill(json={"message": f"It is stopping. {TAGS}"})
        else:
            route.fulfill(status=400, json={"error": f"It cannot. {TAGS}"})

    page.route(re.compile("/api/runs/asked/(stop|resume)$"), answer)
    with record.acquire_lease():
        page.goto(f"{server.address}/runs/asked")
        page.get_by_role("button", name="Stop", exact=True).click()
        page.get_by_role("button", name="Let it run").click()
        assert tokens == []
        page.get_by_role("button", name="Stop", exact=True).click()
        page.get_by_role("button", name="Stop it").click()
        page.get_by_text(f"It is stopping. {TAGS}").wait_for()
    page.get_by_role("button", name="Resume").click()  # its launcher is gone
    page.get_by_text(f"It cannot. {TAGS}").wait_for()
    assert tokens == 2 * [page.locator("meta[name=forgery-token]").get_attribute("content")]


def test_the_examples_of_a_step(page: Any, tmp_path: Path) -> None:
    record = launched(tiny_config(tmp_path, **PICTURES))
    record.next_attempt()
    record.event("started", step=0, world_size=2)
    for step in range(1, 7):
        record.metrics(step, {"loss": 1.0, "examples": 5.0 * step})
    record.close()
    with dashboard(tmp_path / "runs", tmp_path / "cache") as server:
        watch = Watch(page, server.address)
        visit(page, f"{server.address}/runs/tiny#data")
        until(page, "() => document.querySelector('#examples [name=step]')?.value === '6'")
        assert page.locator(".example").count() == 0  # each look takes seconds, so nobody looks unasked
        page.fill("#examples [name=step]", "4")
        page.click("#examples button")
        page.locator(".example").first.wait_for()
        wanted = [str(each["sample_id"]) for each in step_examples(record, 4, 5)["examples"]]
        shown = "() => [...document.querySelectorAll('.example')].map((each) => each.dataset.example)"
        assert page.evaluate(shown) == wanted
        until(page, "() => [...document.querySelectorAll('.example img')].every((each) => each.naturalWidth === 8)")
        assert page.url.endswith("#data?step=4") and not watch.errors and not watch.elsewhere
        visit(page, page.url)  # as somebody whom it was sent to
        page.locator(".example").first.wait_for()
        page.fill("#examples [name=step]", "7")
        page.click("#examples button")
        page.get_by_text("has recorded the steps up to 6").wait_for()
        assert page.evaluate(shown) == []
