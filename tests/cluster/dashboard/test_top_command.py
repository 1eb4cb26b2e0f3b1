"""`shardyard top`: what a terminal shows of runs, and what is printed where there is none."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from cluster.cli import main
from cluster.dashboard.store_view import StoreView
from cluster.dashboard.terminal import BLOCKS, event_line, printable, run_line, run_screen, sparkline, store_screen
from tests.cluster.dashboard.records import new_run, train, wait_until
from trainer.lease import Lease
from trainer.record import RunRecord

ROOT = Path(__file__).resolve().parents[3]
TOP = [sys.executable, "-m", "cluster.cli", "top"]


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return new_run(tmp_path / "store")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def text_of(shown: RenderableType, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(shown)
    return stream.getvalue()


def screen(folder: Path, width: int = 100) -> str:
    view = StoreView(str(folder / "store"), folder / "cache").run("run")
    return text_of(run_screen(view, width, time.time()), width)


@given(st.lists(st.floats()))
def test_a_sparkline_has_its_extremes_at_its_own(values: list[float]) -> None:
    values = [value for value in values if not math.isfinite(value) or abs(value) < 1e100]
    line = sparkline(values)
    good = [value for value in values if math.isfinite(value)]
    assert len(line) == len(values)
    for value, block in zip(values, line, strict=True):
        assert (block == "!") == (not math.isfinite(value))
        if good and max(good) > min(good):
            assert value != max(good) or block == BLOCKS[-1]
            assert value != min(good) or block == BLOCKS[0]


def test_a_spike_of_one_step_is_seen_with_its_step(tmp_path: Path, record: RunRecord) -> None:
    for step in range(1, 2001):
        record.metrics(step, {"loss": 9.0 if step == 1234 else 3.0 if step > 1500 else 1.0 + step / 1e6})
    record.close()
    shown = screen(tmp_path)
    assert "highest 9 at step 1,234" in shown and "lowest 1 at step 1\n" in shown.replace("  ", "\n")
    (curve,) = [line for line in shown.splitlines() if BLOCKS[-1] in line]
    # Not where a mean would put it: among the many steps of 3.0.
    assert curve.count(BLOCKS[-1]) == 1 and curve.index(BLOCKS[-1]) == 1234 * 98 // 2000


def test_everything_of_a_run_is_on_its_screen(tmp_path: Path, record: RunRecord) -> None:
    train(record, 1, 100, mfu=0.5)
    record.event("failed", summary="rank 1 was killed")
    record.next_attempt()
    record.event("started", step=100)
    train(record, 101, 250)
    with Lease.acquire(record.store):
        shown = screen(tmp_path)
    for part in (
        "run  running",
        "step 250 of 1,000",
        "1000 tok/s",
        "eta",
        "attempt 1",
        "✗",
        "rank 1 was killed",
        "attempt 2",
        "▶",
    ):
        assert part in shown, part
    assert all(len(line) <= 100 for line in shown.splitlines())
    record.event("finished", step=250)
    assert "✓" in screen(tmp_path)


@pytest.mark.parametrize("width", [20, 40, 300])
def test_a_run_that_has_done_nothing_yet_and_any_width_are_shown(tmp_path: Path, record: RunRecord, width: int) -> None:
    assert "no loss" in screen(tmp_path, width)
    record.metrics(1, {"loss": math.nan})
    record.close()
    assert "not finite" in screen(tmp_path, width).replace("\n", " ")


def test_a_terminal_obeys_nothing_that_stands_in_a_record(tmp_path: Path, record: RunRecord) -> None:
    record.event("failed", summary="\x1b]0;owned\x07 [red]x[/red] \x9b2J\r\n", **{"k\x1b": "\x1b[2J"})
    view = StoreView(str(tmp_path / "store"), tmp_path / "cache").run("run")
    shown = screen(tmp_path) + text_of(store_screen([view.summary()])) + event_line(view.events()[-1])
    shown += run_line(view.summary() | {"run": "\x1b[2J"})
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r"} and "[red]x" in shown
    assert printable("a\nb\tc") == "a b c"


def test_all_runs_are_a_table_also_those_that_cannot_be_read(
    tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store" / "bad").mkdir()
    (tmp_path / "store" / "bad" / "run.yaml").write_text("{")
    assert main(["top", "--store", str(tmp_path / "store")]) == 0
    shown = capsys.readouterr().out
    assert "damaged" in shown and "run " in shown
    assert main(["top", "--store", str(tmp_path / "nothing")]) == 0


def test_json_says_how_it_is_now(tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    train(record, 1, 7)
    assert main(["top", "run", "--json", "--store", str(tmp_path / "store")]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 7
    assert main(["top", "--json", "--store", str(tmp_path / "store")]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == ["run"]
    assert main(["top", "nothing", "--store", str(tmp_path / "store")]) == 4


def test_plain_lines_end_with_the_run(tmp_path: Path, record: RunRecord) -> None:
    with Lease.acquire(record.store):
        command = [*TOP, "run", "--store", str(tmp_path / "store")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        assert "started" in "".join(process.stdout.readline() for _ in range(2))
        train(record, 1, 9)
        record.event("finished", step=9)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    # The state and the event that led to it may be seen in one look, or the event in the next.
    assert any("finished" in line and "step 9/1,000" in line for line in out.splitlines()) and "\x1b" not in out


def test_ctrl_c_leaves_a_terminal_with_exit_code_0(tmp_path: Path, record: RunRecord) -> None:
    with Lease.acquire(record.store):
        train(record, 1, 9)
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*TOP, "run", "--store", str(tmp_path / "store")],
            stdout=theirs,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        )
        shown = b""

        def seen(what: bytes) -> bool:
            nonlocal shown
            if select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 65536)
            return what in shown

        wait_until(lambda: seen(b"step 9 of"))
        train(record, 10, 12)
        wait_until(lambda: seen(b"step 12 of"))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, b"")
        wait_until(lambda: seen(b"\x1b[?25h"))  # the cursor is back
        os.close(ours)
        os.close(theirs)
